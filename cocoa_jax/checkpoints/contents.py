"""What a tree of arrays holds, in words that survive on disk: dtype, shape and checksum of every array by its path."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cocoa_jax.checkpoints.threads import spread

Tree = Any  # a pytree of arrays, or of their jax.ShapeDtypeStruct
Contents = Mapping[str, Mapping[str, Any]]
SEAL = "records"  # beside the names of the trees

_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint32}
_GOLDEN = np.uint32(0x9E3779B1)
_PIECE = 2**15  # elements of a host's array that are mixed at once: few enough for the cache
_PIECES = 16  # that a thread is worth


def contents_of(tree: Tree) -> dict[str, Any]:
    """Dtype, shape and checksum of every array by its path."""
    described = zip(_described(tree).items(), checksums(tree), strict=True)
    return {key: {**what, "checksum": value} for (key, what), value in described}


def sealed(records: Mapping[str, Any]) -> dict[str, Any]:
    """Records of a checkpoint (JSON) with a checksum over all of them among the ``contents``."""
    return {**records, "contents": {**records["contents"], SEAL: _seal(records)}}


def is_whole(records: Mapping[str, Any]) -> bool:
    """Whether records are as ``sealed`` left them; those of a checkpoint from before it have no checksum."""
    contents = records["contents"]
    if not isinstance(contents, dict):
        return False
    own = {name: part for name, part in contents.items() if name != SEAL}
    return SEAL not in contents or contents[SEAL] == _seal({**records, "contents": own})


def _seal(records: Mapping[str, Any]) -> int:
    plain = json.loads(json.dumps(records))  # as it is read: keys are texts, and tuples lists
    return zlib.crc32(json.dumps(plain, sort_keys=True).encode())


def _described(tree: Tree) -> dict[str, Any]:
    return {key: {"dtype": str(leaf.dtype), "shape": list(leaf.shape)} for key, leaf in flat(tree)}


def flat(tree: Tree) -> list[tuple[str, Any]]:
    """Arrays of a tree with their paths, names joined by slashes."""
    # Paths spell fields of optax's named tuples and keys of dicts alike, so they survive a change of container.
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves]


def checksums(tree: Tree) -> list[int]:
    """One number per array, in the order of ``flat``; computed where the arrays are."""
    sums = []
    for leaf in jax.tree.leaves(tree):
        # One call per array: the arrays of an optimizer state need not share their devices.
        sums.append(_checksum(leaf))
        # Devices of a CPU share its threads: those of two programs, waiting for their own kind, can hold all of them.
        if any(device.platform == "cpu" for device in sums[-1].devices()):
            sums[-1].block_until_ready()
    return [int(value) for value in jax.device_get(sums)]


def checksum_of(array: np.ndarray) -> int:
    """The number that ``checksums`` gives, for an array in host memory that is too large for a second copy."""
    bits = np.ascontiguousarray(array).reshape(-1).view(_UNSIGNED[array.dtype.itemsize])
    places = np.arange(_PIECE, dtype=np.uint32) * _GOLDEN

    def total_of(begin: int, end: int) -> int:
        total = 0
        for start in range(begin, end, _PIECE):
            piece = bits[start : min(start + _PIECE, end)]
            first = np.uint32(start * int(_GOLDEN) % 2**32)
            total += int(np.sum(_mix((places[: piece.size] + first) + piece), dtype=np.uint32))
        return total

    return sum(spread(total_of, bits.size, _PIECE * _PIECES)) % 2**32


@jax.jit
def _checksum(array: jax.Array) -> jax.Array:
    """Sum of all elements' bits, each mixed with the element's place, modulo 2^32; the same on any mesh.

    A changed element changes the sum, because mixing is one-to-one in 32 bits. Many changes at once, such as a
    doubling of all values, do not cancel, because it is not linear.
    """
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(array, _UNSIGNED[array.dtype.itemsize]).astype(jnp.uint32)
    index = jnp.zeros((), jnp.uint32)
    for axis, size in enumerate(bits.shape):
        index = index * jnp.uint32(size % 2**32) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    mixed = _mix(bits + index * _GOLDEN)
    # Rows add up side by side, which one long row does not.
    return jnp.sum(mixed if bits.ndim < 2 else jnp.sum(mixed, axis=-2, dtype=jnp.uint32), dtype=jnp.uint32)


def _mix(bits: Any) -> Any:
    """A one-to-one map of 32 bits in which every bit reaches every other; source: MurmurHash3's finalizer."""
    # In place for numpy's arrays, which belong to nobody else.
    bits ^= bits >> np.uint32(16)
    bits *= np.uint32(0x85EBCA6B)
    bits ^= bits >> np.uint32(13)
    bits *= np.uint32(0xC2B2AE35)
    bits ^= bits >> np.uint32(16)
    return bits


def mismatches(name: str, tree: Tree, stored: Contents, *, same_dtype: bool) -> list[str]:
    """Every array that is on one side only, or differs in shape (or dtype), with both sides."""
    wanted = _described(tree)
    missing, extra = wanted.keys() - stored.keys(), stored.keys() - wanted.keys()
    problems = [f"{name}/{key}: not in the checkpoint, wanted {_text(wanted[key])}" for key in sorted(missing)]
    problems += [f"{name}/{key}: the checkpoint has {_text(stored[key])}, not wanted" for key in sorted(extra)]
    compared = ("shape", "dtype") if same_dtype else ("shape",)
    problems += [
        f"{name}/{key}: the checkpoint has {_text(stored[key])}, wanted {_text(wanted[key])}"
        for key in wanted
        if key in stored and any(wanted[key][part] != stored[key][part] for part in compared)
    ]
    return problems


def _text(description: Mapping[str, Any]) -> str:
    return f"{description['dtype']}{description['shape']}"
