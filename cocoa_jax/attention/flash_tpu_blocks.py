"""Block sizes of the TPU kernels per device kind, head width and length; made by ``benchmarks/tune_flash_tpu.py``."""

from __future__ import annotations

from typing import NamedTuple

from cocoa_jax.attention.tiles import Blocks

LANES = 128


class Tuning(NamedTuple):
    """The sizes of one call.

    Args:
        forward: tile of the forward kernel.
        backward: tile of the backward kernel.
        heads: most query heads per tile.
    """

    forward: Blocks
    backward: Blocks
    heads: int


class Device(NamedTuple):
    """What a kind of TPU allows.

    Args:
        vmem: bytes of vector memory that a kernel may use.
        keys: most keys whose gradients stay in vector memory; longer rows are done in parts.
    """

    vmem: int
    keys: int


DEVICES = {
    "TPU v5 lite": Device(100 * 2**20, 16384),
    "TPU v5": Device(56 * 2**20, 8192),
    "TPU v6 lite": Device(100 * 2**20, 16384),
}
OTHER = Device(56 * 2**20, 8192)  # the smallest vector memory of the TPUs from v5 on


# Heads of width 128, by kind and kernel: longest row, then queries and keys of a tile; the last one has no end.
_WHOLE, _HALF, _SMALL = (512, 512), (256, 512), (256, 256)
_ANY = 1 << 31
_Sizes = tuple[tuple[int, tuple[int, int]], ...]
TABLE: dict[str, tuple[_Sizes, _Sizes]] = {
    "TPU v5 lite": (
        ((512, _WHOLE), (2048, _HALF), (_ANY, _WHOLE)),
        ((512, _WHOLE), (1024, _HALF), (2048, _SMALL), (_ANY, _HALF)),
    ),
    "TPU v5": (
        ((512, _WHOLE), (2048, _HALF), (_ANY, _WHOLE)),
        ((512, _WHOLE), (1024, _HALF), (2048, _SMALL), (4096, _HALF), (_ANY, _WHOLE)),
    ),
    "TPU v6 lite": (
        ((_ANY, _WHOLE),),
        ((512, _WHOLE), (2048, _HALF), (_ANY, _WHOLE)),
    ),
}
# Narrower heads, as those of the vision tower, have key heads of their own: one head a tile, which has to be large.
NARROW: tuple[_Sizes, _Sizes] = (((_ANY, _WHOLE),), ((_ANY, _WHOLE),))
HEADS = 7  # of a tile: the more, the longer the program and its compilation


def device(kind: str) -> Device:
    """The limits of a device by JAX's ``device_kind``."""
    return DEVICES.get(kind, OTHER)


def tuning(kind: str, width: int, keys: int) -> Tuning:
    """The tuned sizes for a device kind, a head width and a number of keys; an unknown device gets those of v5e."""
    forward, backward = NARROW if width < LANES else TABLE.get(kind, TABLE["TPU v5 lite"])
    return Tuning(_choose(forward, keys), _choose(backward, keys), HEADS)


def _choose(sizes: _Sizes, keys: int) -> Blocks:
    return Blocks(*next(blocks for longest, blocks in sizes if keys <= longest))


def fit(blocks: Blocks, queries: int, keys: int) -> Blocks:
    """Blocks no longer than the padded lengths: a short row does not pay for a whole block."""
    whole = [-(-length // LANES) * LANES for length in (queries, keys)]
    return Blocks(min(blocks.query, whole[0]), min(blocks.key, whole[1]))


def heads_per_tile(shared: int, most: int) -> int:
    """The largest divisor of the query heads of one key head that is at most ``most``."""
    return max(n for n in range(1, shared + 1) if shared % n == 0 and n <= most)
