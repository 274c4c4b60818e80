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


def device(kind: str) -> Device:
    """The limits of a device by JAX's ``device_kind``."""
    return DEVICES.get(kind, OTHER)


def tuning(kind: str, width: int, keys: int) -> Tuning:
    """The tuned sizes for a device kind, a head width and a number of keys."""
    return Tuning(Blocks(512, 512), Blocks(512, 512), 6)


def fit(blocks: Blocks, queries: int, keys: int) -> Blocks:
    """Blocks no longer than the padded lengths: a short row does not pay for a whole block."""
    whole = [-(-length // LANES) * LANES for length in (queries, keys)]
    return Blocks(min(blocks.query, whole[0]), min(blocks.key, whole[1]))


def heads_per_tile(shared: int, most: int) -> int:
    """The largest divisor of the query heads of one key head that is at most ``most``."""
    return max(n for n in range(1, shared + 1) if shared % n == 0 and n <= most)
