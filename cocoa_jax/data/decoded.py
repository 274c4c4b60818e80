"""Pictures that stay decoded in memory, for data sets that are seen many times and fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import UInt8

from cocoa_jax.data.sources import Image


@dataclasses.dataclass(eq=False)
class DecodedPictures:
    """Bytes of patches by picture, kept until ``limit`` bytes are full.

    Nothing is thrown out again: epochs are shuffled, so any pictures that fit serve as well as any others.
    """

    limit: int
    used: int = 0
    kept: dict[Image, UInt8[np.ndarray, "3 n S"]] = dataclasses.field(default_factory=dict)

    def get(self, image: Image, make: Callable[[Image], UInt8[np.ndarray, "3 n S"]]) -> UInt8[np.ndarray, "3 n S"]:
        """What ``make`` gives for ``image``, now or at an earlier call."""
        found = self.kept.get(image)
        if found is None:
            found = make(image)
            # Two threads that meet here store the same bytes twice, or one of them past the limit: no harm.
            if self.used + found.nbytes <= self.limit:
                self.used += found.nbytes
                self.kept[image] = found
        return found
