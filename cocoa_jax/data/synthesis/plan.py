"""What is to be asked, in which order, and what that will cost."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from cocoa_jax.data.naming import OpenedSource
from cocoa_jax.data.pixels import ImageError
from cocoa_jax.data.sources import RecordError
from cocoa_jax.data.synthesis.endpoint import EndpointConfig
from cocoa_jax.data.synthesis.filters import FilterConfig
from cocoa_jax.data.synthesis.languages import LANGUAGES
from cocoa_jax.data.synthesis.pictures import sent_size, subject
from cocoa_jax.data.synthesis.prompts import Prompt, chosen_prompts

_LOOKED_AT = 16  # records whose pictures are measured for the estimate
_LETTERS_A_TOKEN = 4
_TOKEN_SIDE = 28  # pixels of the square that one visual token of Qwen2-VL covers; others are near it


@dataclasses.dataclass(frozen=True)
class TextsConfig:
    """Which texts are asked for.

    Args:
        prompts: names, of `PROMPTS` or of ``own``.
        languages: codes such as en, de, zh.
        per_picture: how many of the pairs of prompt and language each picture gets, drawn by the prompts' weights.
        limit: at most so many requests; null for all. A higher limit later goes on where the lower one ended.
        seed: of order, drawing and sampling.
        tries: how often an answer is asked for until one passes the filters.
        probe: after so many answers the estimate is made anew from them.
        budget: US dollars; the run does not begin, or ends, when the estimate is above it.
        own: prompts of one's own by name.
    """

    prompts: list[str] = dataclasses.field(default_factory=lambda: ["caption", "description", "question", "keywords"])
    languages: list[str] = dataclasses.field(default_factory=lambda: ["en"])
    per_picture: int = 1
    limit: int | None = None
    seed: int = 0
    tries: int = 2
    probe: int = 16
    budget: float | None = None
    own: dict[str, Prompt] = dataclasses.field(default_factory=dict)
    filters: FilterConfig = FilterConfig()  # noqa: RUF009

    def __post_init__(self) -> None:
        unknown = [code for code in self.languages if code not in LANGUAGES]
        if unknown or not self.languages:
            raise ValueError(f"languages {unknown or self.languages} are not known: choose of {', '.join(LANGUAGES)}")
        pairs = len(self.chosen) * len(set(self.languages))
        if not 1 <= self.per_picture <= pairs:
            raise ValueError(f"per_picture is {self.per_picture}: there are {pairs} pairs of prompt and language")
        if min(self.tries, self.probe, self.limit or 1) < 1:
            raise ValueError(f"tries {self.tries}, probe {self.probe}, limit {self.limit}: each starts at 1")

    @property
    def chosen(self) -> dict[str, Prompt]:
        """The prompts by name."""
        return chosen_prompts(self.prompts, self.own)


@dataclasses.dataclass(frozen=True)
class Task:
    """One request: a prompt in a language about a record."""

    source: OpenedSource
    index: int
    prompt: str
    language: str
    seed: int

    @property
    def name(self) -> str:
        """Names it in the files."""
        return f"{self.source.name}/{self.index}/{self.prompt}/{self.language}"


def tasks(sources: Sequence[OpenedSource], config: TextsConfig) -> Iterator[Task]:
    """Every request of a run, in an order that is a function of seed and sources; a limit takes its beginning."""
    ends = np.cumsum([len(opened.source) for opened in sources])
    pairs = [(prompt, language) for prompt in config.chosen for language in dict.fromkeys(config.languages)]
    weights = np.array([config.chosen[prompt].weight for prompt, _ in pairs])

    def all_of_them() -> Iterator[Task]:
        for place in np.random.default_rng(config.seed).permutation(int(ends[-1])):
            number = int(np.searchsorted(ends, place, side="right"))
            index = int(place) - (int(ends[number - 1]) if number else 0)
            rng = np.random.default_rng((config.seed, number, index))
            for pair in rng.choice(len(pairs), config.per_picture, replace=False, p=weights / weights.sum()):
                prompt, language = pairs[int(pair)]
                yield Task(sources[number], index, prompt, language, int(rng.integers(2**31)))

    return itertools.islice(all_of_them(), config.limit)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What is left to do.

    Args:
        tokens_in, tokens_out: of all requests left together.
        dollars: None where no prices are given.
        seconds: None before anything was answered.
        measured: answers that it is made from; 0 for sizes of pictures and typical answers.
    """

    requests: int
    tokens_in: float
    tokens_out: float
    dollars: float | None
    seconds: float | None
    measured: int

    def line(self) -> str:
        """In words."""
        told = f"from {self.measured} answers" if self.measured else "from the sizes of some pictures"
        dollars = "prices not given" if self.dollars is None else f"{self.dollars:.2f} US dollars"
        time = "time not known before the first answers" if self.seconds is None else f"about {_duration(self.seconds)}"
        return (
            f"estimate {told}: {self.requests} requests, {self.tokens_in / 1e6:.3f} M tokens there, "
            f"{self.tokens_out / 1e6:.3f} M back, {dollars}, {time}"
        )


def foreseen(
    todo: Mapping[str, int], sources: Sequence[OpenedSource], texts: TextsConfig, at: EndpointConfig
) -> Estimate:
    """The estimate before anything was asked; ``todo`` is how many requests each prompt has left."""
    visual = _visual_tokens(sources, at.max_pixels)
    tokens_in = tokens_out = 0.0
    for name, count in todo.items():
        prompt = texts.chosen[name]
        tokens_in += count * (len(prompt.ask) / _LETTERS_A_TOKEN + visual * prompt.picture)
        tokens_out += count * prompt.tokens
    return Estimate(sum(todo.values()), tokens_in, tokens_out, _dollars(tokens_in, tokens_out, at), None, 0)


def measured(left: int, tokens: tuple[int, int], answers: int, seconds: float, at: EndpointConfig) -> Estimate:
    """The estimate after ``answers`` that took ``tokens`` and, each by itself, ``seconds`` altogether."""
    tokens_in, tokens_out = (left * count / max(answers, 1) for count in tokens)
    time = left * seconds / max(answers, 1) / at.concurrency
    return Estimate(left, tokens_in, tokens_out, _dollars(tokens_in, tokens_out, at), time, answers)


def _visual_tokens(sources: Sequence[OpenedSource], max_pixels: int) -> float:
    """Of a picture on average, of some that are spread over all sources."""
    found = []
    for opened in sources:
        for index in np.linspace(0, len(opened.source) - 1, min(_LOOKED_AT, len(opened.source)), dtype=int):
            try:
                image = subject(opened.source, int(index)).image
            except (RecordError, ImageError):
                continue
            if image is not None:
                found.append(
                    math.prod(
                        math.ceil(side / _TOKEN_SIDE) for side in sent_size(image.width, image.height, max_pixels)
                    )
                )
    return float(np.mean(found)) if found else 0.0


def _dollars(tokens_in: float, tokens_out: float, at: EndpointConfig) -> float | None:
    if at.price_in is None and at.price_out is None:
        return None
    return (tokens_in * (at.price_in or 0) + tokens_out * (at.price_out or 0)) / 1e6


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"
