"""Which answers of a model are worth training on: tidied, then checked."""

from __future__ import annotations

import dataclasses
import re
import unicodedata
from collections import Counter

from cocoa_jax.data.synthesis.languages import other_language
from cocoa_jax.data.synthesis.prompts import Prompt

_RUN = 3  # words in a row that are compared
_REPEATED_FROM = 12  # words; a shorter text may repeat itself

_THOUGHTS = re.compile(r"<think(?:ing)?>.*?</think(?:ing)?>|\A.*</think(?:ing)?>", re.S)
_FENCE = re.compile(r"\A```\w*\n(.*)\n```\Z", re.S)
_KIND = r"(?:captions?|descriptions?|keywords?)"
# "Here is" may also begin the text itself: it is a label if it names what follows, or stands on a line of its own.
_LABEL = re.compile(
    rf"\A\W*(?:(?:{_KIND}|here (?:is|are)\b[^\n:]{{0,80}}\b{_KIND}\b[^\n:]{{0,40}})\W*:(?!\d)"
    r"|here (?:is|are)\b[^\n:]{0,80}:\W*\n)[\s*]*",
    re.I,
)
_QUOTES = {'"': '"', "'": "'", "“": "”", "„": "“", "«": "»", "「": "」", "*": "*"}
_WORD = re.compile(r"[^\W_]+")

REFUSALS: tuple[str, ...] = (
    r"\bI(?:'m| am)(?: very| so)? sorry\b",
    r"\bI apologi[sz]e\b",
    r"\b(?:I|we)(?: cannot| can't| can not|'m unable to| am unable to| am not able to| won't) "
    r"(?:see|view|help|assist|provide|describe|identify|process|access|answer|determine|write|create)",
    r"\bas an? (?:AI|artificial|language|large language)\b",
    r"\b(?:no|without an?|don't see an?|do not see an?) (?:image|picture|photo)[^.]{0,20} "
    r"(?:provided|attached|given|shared|uploaded)",
    r"\bplease (?:provide|upload|share|attach)\b",
    r"\b(?:es tut mir leid|tut mir leid|ich kann (?:das|dieses|kein)[^.]{0,20} nicht|als KI)\b",
    r"\b(?:je suis désolé|désolé, |je ne peux pas|en tant qu'IA)",
    r"\b(?:lo siento|no puedo (?:ver|ayudar|describir|identificar)|como modelo de lenguaje)\b",
    r"\b(?:mi dispiace|non posso (?:vedere|aiutare|descrivere))\b",
    r"\b(?:desculpe|sinto muito|não posso (?:ver|ajudar|descrever))\b",
    r"(?:извините|к сожалению, я|я не могу)",
    r"(?:抱歉|对不起|對不起|我无法|我無法|作为(?:一个)?(?:AI|人工智能|语言模型))",
    r"(?:申し訳(?:ありません|ございません)|すみません|できません。?\Z)",
    r"(?:죄송합니다|할 수 없습니다)",
)
"""What models say when they do not answer, in some languages; searched without regard to case."""
_REFUSAL = re.compile("|".join(REFUSALS), re.I)


@dataclasses.dataclass(frozen=True)
class FilterConfig:
    """Which answers are rejected.

    Args:
        language: whether the answer must be in the language that was asked for.
        refusals: whether it may not say that the model cannot.
        cut: whether an answer that ended at the limit of tokens is rejected.
        overlap: largest share of the answer's runs of three words that the prompt holds too.
        repetition: largest share of its runs of three words that it holds more than once.
        repeats: how many pictures may have the same text for a prompt and language; 0 for any number.
    """

    language: bool = True
    refusals: bool = True
    cut: bool = True
    overlap: float = 0.5
    repetition: float = 0.5
    repeats: int = 1

    def __post_init__(self) -> None:
        if not (0 <= self.overlap <= 1 and 0 <= self.repetition <= 1) or self.repeats < 0:
            raise ValueError(
                f"filters has overlap {self.overlap}, repetition {self.repetition}, repeats {self.repeats}: the first "
                "two are shares from 0 to 1, the last is a number from 0"
            )


def tidy(answer: str) -> str:
    """An answer without thoughts, fences, labels and quotation marks around it."""
    text = _THOUGHTS.sub("", answer).strip()
    text = _FENCE.sub(r"\1", text).strip()
    text = _LABEL.sub("", text).strip()
    while len(text) > 1 and _QUOTES.get(text[0]) == text[-1] and text[0] not in text[1:-1]:
        text = text[1:-1].strip()
    return text


def reason_against(
    text: str, query: str, asked: str, prompt: Prompt, language: str, finish: str, config: FilterConfig
) -> str:
    """Why a text may not be used, "" where it may; the words before the colon name the kind.

    Args:
        text: what would be rebuilt.
        query: what stands beside it, a question of the model perhaps.
        asked: what the model was told.
        finish: why it stopped, as the endpoint says.
    """
    if config.cut and finish == "length":
        return "cut: it reached the limit of tokens"
    length = columns(text)
    if not prompt.shortest <= length <= prompt.longest:
        return f"length: {length} columns, {prompt.shortest} to {prompt.longest} are asked for"
    whole = f"{query} {text}" if prompt.form == "question" else text
    if config.refusals and (found := _REFUSAL.search(whole)):
        return f"refusal: {found[0]!r}"
    if config.language and prompt.form != "question" and (wrong := other_language(text, language)):
        return wrong
    if config.language and prompt.form == "question":
        # The instruction before the question is ours and English; a few words of an answer tell little.
        before = prompt.query.partition("{question}")[0]
        if wrong := other_language(f"{query.removeprefix(before)} {text}", language):
            return wrong
    own, told = _runs(text), _runs(asked)
    if own and (shared := sum(count for run, count in own.items() if run in told) / own.total()) > config.overlap:
        return f"overlap: {shared:.0%} of it stands in the prompt"
    if own.total() > _REPEATED_FROM and (again := 1 - len(own) / own.total()) > config.repetition:
        return f"repetition: {again:.0%} of it was said before"
    return ""


def columns(text: str) -> int:
    """The width of a text on a page; a Chinese character says about as much as two of an alphabet."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)


def same(text: str) -> str:
    """Equal for texts that say the same in the same words."""
    return " ".join(_WORD.findall(unicodedata.normalize("NFKC", text).casefold()))


def _runs(text: str) -> Counter[tuple[str, ...]]:
    words = _WORD.findall(text.casefold())
    return Counter(zip(*(words[start:] for start in range(_RUN)), strict=False))
