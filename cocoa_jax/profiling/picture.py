"""A picture of masks and of the tiles that a span kernel visits under them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cocoa_jax.attention.tiles import Blocks, count_tiles, query_hulls
from cocoa_jax.profiling.masks import mask_spans

SKIPPED, HIDDEN, WHOLE, SEEN = "#ffffff", "#f6cd98", "#a9c7e8", "#2f4b7c"
_PIXELS = 256  # of a panel; what is visible is drawn at this resolution


def draw_masks(names: Sequence[str], length: int, block: int, path: str | Path) -> Path:
    """One panel a mask: what each query sees, over the tiles that are skipped, visited and masked.

    Args:
        names: masks, see ``masks.MASKS``.
        length: T, tokens of the row.
        block: side of a tile.
        path: an SVG or PNG file to write.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle

    figure = Figure(figsize=(3.0 * len(names), 3.7), layout="constrained")
    blocks = Blocks(block, block)
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        spans = mask_spans(name, length)
        hulls, tiles = query_hulls(spans, length, blocks), count_tiles(spans, length, blocks)
        for query in range(hulls.lo.shape[1]):
            for key in range(blocks.grid(length, length)[1]):
                visited = hulls.lo[0, query] <= key < hulls.hi[0, query]
                whole = hulls.full_lo[0, query] <= key < hulls.full_hi[0, query]
                colour = SKIPPED if not visited else WHOLE if whole else HIDDEN
                place = key * block, query * block
                axis.add_patch(Rectangle(place, block, block, facecolor=colour, edgecolor="#b8b8b8", linewidth=0.6))
        at = np.linspace(0, length - 1, _PIXELS).round().astype(int)
        seen = np.asarray(spans.as_mask(length))[0][np.ix_(at, at)]
        axis.imshow(
            np.where(seen[..., None], _colour(SEEN, 0.45), 0.0),
            extent=(0, length, length, 0),
            interpolation="nearest",
            zorder=2,  # above the tiles
        )
        axis.set(xlim=(0, length), ylim=(length, 0), aspect="equal", xticks=[0, length], yticks=[0, length])
        axis.set(xlabel="keys", ylabel="queries")
        axis.set_title(f"{name}: {tiles.visited} of {tiles.total} tiles,\n{tiles.masked} need a mask", fontsize=10)
    patches = [
        Patch(facecolor=SKIPPED, edgecolor="#b8b8b8", label="skipped: nobody sees it"),
        Patch(facecolor=WHOLE, label="visited, everybody sees all of it: no mask"),
        Patch(facecolor=HIDDEN, label="visited, masked"),
        Patch(facecolor=SEEN, alpha=0.45, label="what a query sees"),
    ]
    figure.legend(handles=patches, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=110, metadata={"Date": None} if target.suffix == ".svg" else None)
    return target


def _colour(hexadecimal: str, alpha: float) -> np.ndarray:
    """Red, green, blue and opacity, 0 to 1."""
    return np.array([int(hexadecimal[i : i + 2], 16) / 255 for i in (1, 3, 5)] + [alpha])
