"""What a model is asked about a picture, as data."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Literal

from cocoa_jax.data.synthesis.languages import LANGUAGES

Form = Literal["text", "question", "keywords"]

_PAIR = re.compile(r"\s*\W*question\W*:\W*(?P<question>.+?)\s*\n\s*\W*answer\W*:\W*(?P<answer>.+)", re.I | re.S)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One thing to ask for.

    Args:
        ask: what the model is told; ``{language}`` and ``{words}``, the record's own words, are filled in.
        query: what block A says beside the picture when the answer is rebuilt; ``{question}`` and ``{words}`` likewise.
        form: ``text``; ``question``, an answer in two lines ``Question: ...`` and ``Answer: ...``, the second of which
            is rebuilt; ``keywords``, parted by commas.
        shortest, longest: of the text that is rebuilt, in columns of a fixed-width page (wide characters count twice).
        picture: whether the picture is shown; without, the record's words are all that the model sees.
        weight: how often it is drawn.
        tokens: of an answer, about; for the estimate.
    """

    ask: str
    query: str
    form: Form = "text"
    shortest: int = 12
    longest: int = 1500
    picture: bool = True
    weight: float = 1.0
    tokens: int = 60

    def __post_init__(self) -> None:
        if not self.ask or not 1 <= self.shortest <= self.longest or not self.weight > 0:
            raise ValueError(
                f"prompt {self.ask[:40]!r}: it needs words, a weight above 0 and 1 <= shortest <= longest "
                f"(they are {self.weight}, {self.shortest}, {self.longest})"
            )
        if not self.picture and "{words}" not in self.ask:
            raise ValueError(f"prompt {self.ask[:40]!r} shows neither picture nor {{words}}: put one of them in")

    @property
    def hash(self) -> str:
        """Twelve hex digits over all of it; every row carries it."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()[:12]

    def asked(self, language: str, words: str) -> str:
        """What the model is told."""
        return self.ask.replace("{language}", LANGUAGES[language].name).replace("{words}", words)

    def stored(self, answer: str, language: str, words: str) -> tuple[str, str] | None:
        """(block A's words, block B's) of an answer; None for one of another form."""
        question, text = "", answer
        if self.form == "question":
            found = _PAIR.fullmatch(answer)
            if found is None:
                return None
            question, text = found["question"].strip(" *\"'"), found["answer"].strip(" *\"'")
        if self.form == "keywords":
            # Commas of Chinese and Japanese too, and what numbers or marks the lines of a list.
            found_parts = re.split("[,\uff0c\u3001\n]", answer)
            parts = [re.sub(r"\A\s*\d+[.)]", "", part).strip(" .;*-\"'") for part in found_parts]
            text = ", ".join(dict.fromkeys(part for part in parts if part))
            if text.count(",") < 1:
                return None
        query = self.query.replace("{question}", " ".join(question.split())).replace("{words}", words)
        # The words of another language cannot be foreseen from the picture alone.
        told = f" Answer in {LANGUAGES[language].name}." if language != "en" and self.form != "question" else ""
        return f"{query}{told}".strip(), " ".join(text.split())


PROMPTS: dict[str, Prompt] = {
    "caption": Prompt(
        "Write one sentence in {language} that says what this picture shows. Give the sentence alone.",
        "Find an image caption describing the given image.",
        longest=300,
        tokens=25,
    ),
    "description": Prompt(
        "Describe this picture in {language} in three to six sentences: what there is, where each thing is, colours, "
        "materials, and any writing that can be read. Give the description alone.",
        "Describe the given image in detail.",
        shortest=80,
        tokens=130,
    ),
    "question": Prompt(
        "Ask one question in {language} that can be answered only by somebody who sees this picture, and answer it in "
        "a few words of {language}. Give two lines:\nQuestion: ...\nAnswer: ...",
        "Represent the given image with the following question: {question}",
        form="question",
        shortest=1,
        longest=200,
        tokens=35,
    ),
    "keywords": Prompt(
        "List four to ten keywords in {language} for what this picture shows, parted by commas. Give the keywords "
        "alone.",
        "Which keywords describe the given image?",
        form="keywords",
        shortest=8,
        longest=300,
        tokens=25,
    ),
    "rephrase": Prompt(
        "Say this in other words, in {language}. Give the new wording alone.\n\n{words}",
        "{words}",
        shortest=8,
        picture=False,
        tokens=40,
    ),
}
"""Prompts that come with the package; ``rephrase`` is for records without pictures too."""


def chosen_prompts(names: list[str], own: Mapping[str, Prompt]) -> dict[str, Prompt]:
    """The prompts of these names, those of ``own`` before those of the package.

    Raises:
        ValueError: there is none of a name.
    """
    known = PROMPTS | dict(own)
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise ValueError(f"prompts {unknown or names} do not exist: choose of {', '.join(known)}")
    return {name: known[name] for name in dict.fromkeys(names)}
