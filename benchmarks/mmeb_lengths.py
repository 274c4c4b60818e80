"""Lengths of examples as training on MMEB might see them, made from what is in this repository; no MMEB data is needed.

What they are made of, and what is only assumed:
- which data sets and how many records of each: the 20 training sets of MMEB with the caps of the published settings;
- which sides have pictures: as published (design of MMEB: classification and questions ask about a picture, t2i and
  VisDial look for one, CIRR, NIGHTS and grounding have one on both sides);
- instructions: the published strings, their words counted;
- shapes of pictures: the true aspect ratios of the embedded pictures (train split), drawn at random. ASSUMED: every
  picture has more pixels than the resolution allows, so that all are resized to the upper limit; documents of MMEB are
  taller than these pictures;
- words: ASSUMED to be as many as the embedded pictures' captions have (labels, answers) or their descriptions
  (questions, captions, news), ten descriptions for a dialogue; 1.3 tokens a word, rounded up.
"""

from __future__ import annotations

import math

import numpy as np

from cocoa_jax.data.pixels import PixelSettings
from cocoa_jax.data.readers.mmeb import QUERY_INSTRUCTIONS, TRAIN_CAPS
from cocoa_jax.data.sources import Image, load_pictures

TOKENS_A_WORD = 1.3
BRIDGE, AROUND_A_PICTURE, PATCHES_A_TOKEN = 1, 2, 4
LABEL = ("ImageNet_1K", "N24News", "HatefulMemes", "VOC2007", "SUN397")
QUESTION = ("OK-VQA", "A-OKVQA", "DocVQA", "InfographicsVQA", "ChartQA", "Visual7W")
WORDS_TO_PICTURE = ("VisDial", "VisualNews_t2i", "MSCOCO_t2i", "WebQA")
PICTURE_TO_WORDS = ("VisualNews_i2t", "MSCOCO_i2t")
BOTH = ("CIRR", "NIGHTS", "MSCOCO")


class MmebLengths:
    """Draws records: tokens and patches [n, 2 (query, target), 2]."""

    def __init__(self, resolution: str):
        pictures = load_pictures("train")
        self._sizes = [(p.image.width, p.image.height) for p in pictures]
        self._short = np.array([len(p.caption.split()) for p in pictures])
        self._long = np.array([max(1, len(p.description.split())) for p in pictures])
        self._pixels = pixel_settings(resolution)

    def draw(self, dataset: str, count: int, rng: np.random.Generator) -> np.ndarray:
        """The lengths of ``count`` records of a data set."""
        instruction = len(QUERY_INSTRUCTIONS[dataset.replace("ImageNet_1K", "ImageNet-1K")].split())
        short, long = (rng.choice(words, count) for words in (self._short, self._long))
        none, one = np.zeros(count, int), self._visual(rng, count)
        if dataset in LABEL:
            query, target = (instruction + none, one), (short, none)
        elif dataset in QUESTION:
            query, target = (instruction + long, one), (short, none)
        elif dataset in PICTURE_TO_WORDS:
            query, target = (instruction + none, one), (long, none)
        elif dataset in WORDS_TO_PICTURE:
            words = long if dataset != "VisDial" else rng.choice(self._long, (count, 10)).sum(axis=1)
            query, target = (instruction + words, none), (4 + none, one)
        else:
            words = none if dataset == "NIGHTS" else long
            query, target = (instruction + words, one), (4 + none, self._visual(rng, count))
        return np.stack([self._example(*query), self._example(*target)], axis=1)

    def _visual(self, rng: np.random.Generator, count: int) -> np.ndarray:
        chosen = rng.integers(len(self._sizes), size=count)
        grids = [self._pixels.grid(Image(b"", 40 * w, 40 * h, "")) for w, h in (self._sizes[i] for i in chosen)]
        return np.array([rows * columns // PATCHES_A_TOKEN for _, rows, columns in grids])

    def _example(self, words: np.ndarray, visual: np.ndarray) -> np.ndarray:
        text = np.ceil(words * TOKENS_A_WORD).astype(int)
        tokens = text + visual + AROUND_A_PICTURE * (visual > 0) + BRIDGE
        return np.stack([tokens, PATCHES_A_TOKEN * visual], axis=1)


def pixel_settings(resolution: str) -> PixelSettings:
    """``square:448`` or ``dynamic:64..576`` with the published patches of 14 pixels."""
    kind, _, rest = resolution.partition(":")
    least, _, most = rest.partition("..")
    limits = (int(rest) ** 2,) * 2 if kind == "square" else (int(least) * 784, int(most) * 784)
    side = int(rest) if kind == "square" else 0
    return PixelSettings(14, 2, 2, *limits, resample=3, table=np.zeros((3, 256), np.float32), square=side)


def shares() -> dict[str, float]:
    """How much of a mixture each data set is."""
    total = sum(TRAIN_CAPS.values())
    return {name: cap / total for name, cap in TRAIN_CAPS.items()}


def rounded_up(number: float, step: int) -> int:
    """The next multiple."""
    return math.ceil(number / step) * step
