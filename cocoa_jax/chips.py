"""The TPU chips that can be compiled for, with the rates that the static model divides by.

Sources of the rates: the chip's page at https://cloud.google.com/tpu/docs (v4, v5e, v5p, v6e, tpu7x), read on
2026-11. The clock is no published figure: it is the peak divided by the FLOPs that the matrix units take a cycle
(MXUs x side^2 x 2). For v6e and tpu7x the compiler schedules more than the two units of 256x256 that the page names
would take (455,675 FLOPs a cycle for a bfloat16 product of 4096^3 on v6e), so four are counted.
"""

from __future__ import annotations

import dataclasses

MXU_128 = 4 * 128 * 128 * 2  # FLOPs a cycle of one TensorCore with four units of 128x128
MXU_256 = 4 * 256 * 256 * 2


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device as JAX sees it: a chip, or one of its two TensorCores where JAX lists them apart.

    Args:
        name: as in the name of a topology.
        kind: JAX's ``device_kind``.
        peak_flops: bfloat16 FLOPs a second.
        flops_per_cycle: of one TensorCore.
        cores: TensorCores that act as this one device.
        devices_per_chip: JAX devices that a chip counts for.
        hbm_gib: what the compiler lets a program take of its memory; it says so when it refuses a larger one.
        hbm_bandwidth: bytes a second.
        ici_bandwidth: bytes a second that one chip can send over all its links of the interconnect together.
        dcn_bandwidth: bytes a second that one chip's share of its host's network can send to other slices.
        host: chips of one host along each axis; smaller slices have to be asked for apart.
        shapes: the slices that are known to compile.
        source: page of the rates.
    """

    name: str
    kind: str
    peak_flops: float
    flops_per_cycle: int
    cores: int
    devices_per_chip: int
    hbm_gib: float
    hbm_bandwidth: float
    ici_bandwidth: float
    dcn_bandwidth: float
    host: tuple[int, ...]
    shapes: tuple[str, ...]
    source: str

    @property
    def clock(self) -> float:
        """Cycles a second, see the head of this file."""
        return self.peak_flops / (self.flops_per_cycle * self.cores)

    def bandwidth_in(self, shape: str) -> float:
        """Bytes a second that one device can send in a slice such as ``4x4``, at the corner where links are missing.

        Sides of 16 chips (of a plane) and slices of whole cubes of 4x4x4 are closed to rings, and miss none. Source:
        https://jax-ml.github.io/scaling-book/tpus.
        """
        sides = [int(side) for side in shape.split("x")]
        cubes = len(sides) == 3 and all(side % 4 == 0 for side in sides)
        links = sum(min(side - 1, 2 if cubes or side == 16 else 1) for side in sides)
        return self.ici_bandwidth * max(links, 1) / (2 * len(sides))

    @property
    def hbm_bytes(self) -> float:
        return self.hbm_gib * 2**30


_PLANE = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBE = ("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
_DOCS = "https://cloud.google.com/tpu/docs/"

# The pages give the interconnect of a chip in both directions together: a ring uses half of it to send. That of v4
# is not on its page: six links of 45 GB/s, from https://jax-ml.github.io/scaling-book/tpus. Where a chip is two
# devices, each has half of everything. The data-centre network of v5e and v6e is what the pages give for a pod of 256
# chips, divided; for the others it is assumed: 25, 50 and 100 Gbit/s a chip of v4, v5p and tpu7x.
CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip("v4", "TPU v4", 275e12, MXU_128, 2, 1, 31.25, 1200e9, 270e9, 3.125e9, (2, 2, 1), (), _DOCS + "v4"),
        Chip("v5e", "TPU v5 lite", 197e12, MXU_128, 1, 1, 15.75, 819e9, 200e9, 3.125e9, (2, 2), _PLANE, _DOCS + "v5e"),
        Chip("v5p", "TPU v5", 459e12, MXU_128, 2, 1, 95.74, 2765e9, 600e9, 6.25e9, (2, 2, 1), _CUBE, _DOCS + "v5p"),
        Chip("v6e", "TPU v6 lite", 918e12, MXU_256, 1, 1, 31.25, 1638e9, 400e9, 12.5e9, (2, 2), _PLANE, _DOCS + "v6e"),
        Chip(
            "tpu7x",
            "TPU7x",
            1153.5e12,
            MXU_256,
            1,
            2,
            94.75,
            3690e9,
            300e9,
            6.25e9,
            (2, 2, 1),
            _CUBE,
            _DOCS + "tpu7x",
        ),
    )
}


def known_topologies() -> list[str]:
    """Every slice that this package compiles for, such as ``v5e:4x4``."""
    return [f"{chip.name}:{shape}" for chip in CHIPS.values() for shape in chip.shapes]


def chip_of_kind(kind: str) -> Chip | None:
    """The chip of a present device by JAX's ``device_kind``; None where it is no TPU of the table."""
    return next((chip for chip in CHIPS.values() if chip.kind == kind), None)
