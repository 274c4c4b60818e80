"""Instructions and text templates, as data; training and evaluation use the same strings.

Where MMEB has the task, its wording is kept (arXiv 2410.05160 and its public data), with "image" for "everyday image".
"""

import hashlib
import json
from collections.abc import Sequence

import numpy as np

INSTRUCTIONS: dict[str, str] = {
    "picture": "Represent the given image.",
    "caption": "Find me an image that matches the given caption: {text}",
    "picture-caption": "Find an image caption describing the given image.",
    "flat-3d": "Find an image that shows the same thing in 3D.",
    "3d-flat": "Find an image that shows the same thing drawn flat.",
    "skin-tone": "Given an image, find a similar image with the described changes: {text}",
    "category": "Represent the given image for classification",
    "scenery": "Identify the scene shown in the image",
    "keyword": "Represent the given image with the following question: Which word also describes it?",
    "tile": 'Select the portion of the image that isolates the object labeled as "{text}"',
    "tile-target": "Represent the given cropped image of the object",
}
TONE_TEXT = "with {tone} skin tone"
INSTRUCTION_RATE = (
    0.75  # of the training pairs that also make sense bare; the rest lets people embed bare words and pictures
)
BRIDGE_PROMPTS = (
    "",
    INSTRUCTIONS["picture"],
    INSTRUCTIONS["picture-caption"],
)  # what may stand beside the picture in block A

# (weight, template). A template is open to a picture that has words for all its fields.
RECONSTRUCTION_TEMPLATES: tuple[tuple[float, str], ...] = (
    (3.0, "{caption}"),
    (3.0, "{caption}: {keywords}"),
    (1.0, "{keywords}"),
    (1.0, "{style}: {caption}"),
    (1.0, "{caption} ({label})"),
    (1.0, "{description}"),
    (1.0, "{caption}. {description}"),
)
QUERY_TEMPLATES: tuple[tuple[float, str], ...] = (
    (5.0, "{caption}"),
    (2.0, "{caption}: {keywords}"),
    (2.0, "{keywords}"),
    (1.0, "{description}"),
)
LONGEST = 200  # characters of a text: the few longer descriptions are about their drawing's history


def instructions_hash() -> str:
    """Twelve hex digits over every string here that a model is shown; result files carry it."""
    shown = [
        INSTRUCTIONS,
        TONE_TEXT,
        INSTRUCTION_RATE,
        BRIDGE_PROMPTS,
        RECONSTRUCTION_TEMPLATES,
        QUERY_TEMPLATES,
        LONGEST,
    ]
    return hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()[:12]


def plain(text: str) -> str:
    """Words as the model is shown them: lower case, single spaces, no underscores (file names serve as captions)."""
    return " ".join(text.replace("_", " ").lower().split())


def shorten(text: str, limit: int = LONGEST) -> str:
    """At most `limit` characters, cut between words."""
    return text if len(text) <= limit else text[: limit + 1].rsplit(" ", 1)[0][:limit]


def instruct(name: str, text: str = "") -> str:
    """The instruction of a task around its text."""
    return INSTRUCTIONS[name].format(text=text)


def fill_all(fields: dict[str, str], keywords: Sequence[str], rng: np.random.Generator) -> str:
    """The caption, all keywords in a random order, and the description, cut to `LONGEST`; `fields` as for `fill`."""
    words = ": ".join(filter(None, (fields["caption"], ", ".join(keywords[i] for i in rng.permutation(len(keywords))))))
    return shorten(". ".join(filter(None, (words, fields["description"]))))


def fill(
    templates: Sequence[tuple[float, str]], fields: dict[str, str], keywords: Sequence[str], rng: np.random.Generator
) -> str:
    """One template drawn by weight among those whose fields are not empty, with a random subset of the keywords.

    `fields` holds every field but `keywords`; `caption` must not be empty.
    """
    chosen = rng.permutation(len(keywords))[: rng.integers(1, len(keywords) + 1)] if keywords else ()
    filled = {**fields, "keywords": ", ".join(keywords[index] for index in chosen)}
    open_ = [
        (weight, text) for weight, text in templates if all(filled[name] for name in filled if f"{{{name}}}" in text)
    ]
    weights = np.array([weight for weight, _ in open_])
    return shorten(open_[rng.choice(len(open_), p=weights / weights.sum())][1].format(**filled))
