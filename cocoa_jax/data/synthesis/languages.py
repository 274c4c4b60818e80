"""Which language a text is in, as far as its script and its commonest words tell."""

from __future__ import annotations

import dataclasses
import re
import unicodedata
from collections import Counter
from functools import lru_cache

_LEAST_SHARE = 0.6  # of the letters; names and writing in a picture may be in another script
_KANA_FROM = 12  # letters; Japanese without a single kana is hardly longer
_CLEAR = 2  # common words of another language that a text holds by chance or in a quotation: fewer prove nothing
_WORD = re.compile(r"[^\W\d_]+")


@dataclasses.dataclass(frozen=True)
class Language:
    """A language by its English name, its scripts as Unicode names begin, and common words that others lack."""

    name: str
    scripts: tuple[str, ...]
    words: frozenset[str] = frozenset()


def _told(name: str, words: str, script: str = "LATIN") -> Language:
    return Language(name, (script,), frozenset(words.split()))


LANGUAGES: dict[str, Language] = {
    "en": _told("English", "the and of is with are to it this that there has which from by its his her an"),
    "de": _told("German", "der die das und ist mit ein eine einen einem auf im den dem von sind zu nicht vor hat"),
    "fr": _told("French", "le les et est une des du avec sur dans au qui il elle sont pour aux cette deux d l"),
    "es": _told("Spanish", "el los las y es con del por una en que se su al está unos sobre dos muy hay"),
    "it": _told("Italian", "il gli e è di con che della del nella sono sul sulla una per degli si ha due al"),
    "pt": _told("Portuguese", "o os as e é um uma com do da em no na que são dos por ao está dois"),
    "nl": _told("Dutch", "het een en van met op zijn dat die er aan naar voor niet deze heeft twee door wordt"),
    "pl": _told("Polish", "i w na z jest się nie do to są oraz przez dwa który która pod przed ze po"),
    "tr": _told("Turkish", "bir ve bu ile için üzerinde olan var da de çok iki olarak gibi yer"),
    "vi": _told("Vietnamese", "một và của có là trên với trong người các những được cho màu đang hai"),
    "id": _told("Indonesian", "yang dan di dengan sebuah dari ini pada untuk adalah seorang itu dua berwarna"),
    "ru": _told("Russian", "и в на с не что по из это у для от как", "CYRILLIC"),  # noqa: RUF001
    "uk": _told("Ukrainian", "і в на з не що та із це у для від як є", "CYRILLIC"),  # noqa: RUF001
    "ar": Language("Arabic", ("ARABIC",)),
    "he": Language("Hebrew", ("HEBREW",)),
    "hi": Language("Hindi", ("DEVANAGARI",)),
    "th": Language("Thai", ("THAI",)),
    "el": Language("Greek", ("GREEK",)),
    "ko": Language("Korean", ("HANGUL",)),
    "ja": Language("Japanese", ("CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA")),
    "zh": Language("Chinese", ("CJK",)),
}
"""Languages that can be asked for and are recognised."""


def other_language(text: str, code: str) -> str:
    """Why ``text`` is not in the language ``code``; "" where nothing speaks against it."""
    wanted = LANGUAGES[code]
    scripts = Counter(_script(letter) for letter in text if letter.isalpha())
    total = scripts.total()
    if not total:
        return ""
    right = sum(scripts[script] for script in wanted.scripts)
    if right < _LEAST_SHARE * total:
        return f"language: {scripts.most_common(1)[0][0].lower()} letters, not {wanted.name}"
    kana = scripts["HIRAGANA"] + scripts["KATAKANA"]
    if code == "zh" and kana > 0.1 * total:
        return "language: Japanese, not Chinese"
    if code == "ja" and not kana and total >= _KANA_FROM:
        return "language: no kana, not Japanese"
    words = Counter(_WORD.findall(text.lower()))
    hits = {
        other: sum(words[word] for word in language.words)
        for other, language in LANGUAGES.items()
        if language.words and language.scripts == wanted.scripts
    }
    best = max(hits, key=lambda other: hits[other], default=code)
    if hits and hits[best] >= _CLEAR and hits[best] > 2 * hits[code]:
        return f"language: {LANGUAGES[best].name}, not {wanted.name}"
    return ""


@lru_cache(maxsize=4096)
def _script(letter: str) -> str:
    return unicodedata.name(letter, "UNNAMED").split()[0]
