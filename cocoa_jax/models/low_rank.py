"""What trains in the place of a frozen map or table: low-rank updates of linear maps, and single rows of the embedding.

Sources: LoRA, arXiv 2106.09685; DoRA, arXiv 2402.09353; the arithmetic of both is that of PEFT, which is tested.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, UInt32

from cocoa_jax.models.spread import row_parts, whole

PRODUCT = "linear_product"  # what a remat policy keeps so that no matrix is multiplied again
SMALLEST = 1e-30  # of a squared norm: a column of zeros keeps a gain of 1 instead of 0 / 0


class DropoutWords(nnx.Variable):
    """What ``dropped`` takes, by layer; an argument of every call like the parameters, never advanced in place."""


class ColumnNorm(nnx.Variable):
    """The norm of every column of a kernel and its update: an argument of every call, made once a step."""


class LowRank(nnx.Module):
    """``scale * a @ b`` beside a frozen kernel, and with DoRA the length of every column of their sum.

    Args:
        stack: leading axes of the kernel, (L,) where layers are stacked.
        rank: inner width r of ``a`` [I, r] and ``b`` [r, O].
        scale: factor of the product.
        dora: whether the lengths (``magnitude`` [O]) are trained apart from the directions.
        rate: share of the inputs that is dropped; 0 leaves the words out.
        weight_too: with DoRA, whether the frozen kernel's share of what training adds sees the dropped inputs too.
    """

    def __init__(
        self,
        stack: tuple[int, ...],
        inputs: int,
        outputs: int,
        *,
        rank: int,
        scale: float,
        dora: bool,
        rate: float,
        weight_too: bool,
    ):
        self.scale, self.rate, self.weight_too = scale, rate, weight_too
        self.a = nnx.Param(jnp.zeros((*stack, inputs, rank)))
        self.b = nnx.Param(jnp.zeros((*stack, rank, outputs)))
        self.magnitude = nnx.Param(jnp.zeros((*stack, outputs))) if dora else None
        self.norm = ColumnNorm(jnp.zeros((*stack, outputs))) if dora else None
        self.words = DropoutWords(jnp.zeros((*stack, 4), jnp.uint32)) if rate else None

    def __call__(
        self, x: Float[Array, "B I"], y: Float[Array, "B O"], kernel: Float[Array, "I O"]
    ) -> Float[Array, "B O"]:
        """What the adapted map gives in the place of ``y = x @ kernel``, before any bias.

        Products are made in the type of ``x`` and summed in that of ``y``, float32: gains stay near 1, where bfloat16
        has steps of 1/128.
        """
        kept = x if self.words is None else dropped(x, self.words[...], self.rate)
        a, b = self.a[...], self.b[...]
        # They are gathered whole: where rows and ``a`` lie over the same axis alone, XLA would rather send the few KiB
        # round by round, in loops that stand where weights should be gathered beside products.
        inner = kept @ whole(a.astype(x.dtype))
        update = self.scale * jnp.matmul(inner, whole(b.astype(x.dtype)), preferred_element_type=y.dtype)
        if self.magnitude is None or self.norm is None:
            return y + update
        gain = self.magnitude[...] / self.norm[...]
        # As PEFT: the frozen map itself sees every input, what training adds to it sees the kept ones.
        again = self.words is not None and self.weight_too
        seen = jnp.matmul(kept, kernel.astype(x.dtype), preferred_element_type=y.dtype) if again else y
        # Rounded, as it is kept for the gains' gradients; of what comes out it is the small part.
        changed = checkpoint_name((seen + update).astype(x.dtype), PRODUCT)
        return y + update + (gain - 1) * changed


def dropped(x: Float[Array, "B I"], words: UInt32[Array, " four"], rate: float) -> Float[Array, "B I"]:
    """``x`` with a share ``rate`` of its numbers set to zero and the rest scaled to keep the mean.

    Args:
        words: two random ones, and of which chunk of a batch in how many chunks these rows are (see ``cut_rows``).
    """
    kept = hashed(words, *x.shape) >= np.uint32(rate * 2**32)
    return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)


def hashed(words: UInt32[Array, " four"], rows: int, columns: int) -> UInt32[Array, "rows columns"]:
    """Random bits that are a function of two words and the place alone, by three rounds of shift and product.

    The place is that in the whole batch, whatever the chunks and devices that its rows are cut into. Bits of
    ``jax.random`` cost the vector units of a TPU twenty rounds each, again in every pass; a dropout mask needs no such
    quality. Source of the constants: triple32 of github.com/skeeto/hash-prospector.
    """
    first, second, chunk, chunks = words
    parts = row_parts(rows)
    shape = parts, rows // parts, columns
    part, row, column = (jax.lax.broadcasted_iota(jnp.uint32, shape, axis) for axis in range(3))
    own = np.uint32(shape[1] * columns % 2**32)  # the numbers of a part; where scalars meet, no vector unit counts them
    bits = row * np.uint32(columns) + column + part * (chunks * own) + (first + chunk * own)
    bits = bits.reshape(rows, columns)
    bits = (bits ^ (bits >> 17)) * np.uint32(0xED5AD4BB)
    bits ^= second  # without it all words would give one sequence, begun elsewhere
    bits = (bits ^ (bits >> 11)) * np.uint32(0xAC4C1B51)
    bits = (bits ^ (bits >> 15)) * np.uint32(0x31848BAB)
    return bits ^ (bits >> 14)


def column_norm(
    kernel: Float[Array, "*L I O"], a: Float[Array, "*L I R"], b: Float[Array, "*L R O"], scale: float
) -> Float[Array, "*L O"]:
    """Length of every column of ``kernel + scale * a @ b`` in float32, from matrices of rank size.

    |W + sAB|^2 = |W|^2 + 2s <W, AB> + s^2 |AB|^2 by columns, where <W, AB> is the sum over r of (A^T W) B and |AB|^2
    that of (A^T A B) B: the product A B is never made.
    """
    wide = kernel.astype(jnp.float32)
    squares = jnp.sum(jnp.square(wide), axis=-2)
    cross = jnp.sum(jnp.einsum("...ir,...io->...ro", a, wide, precision="highest") * b, axis=-2)
    gram = jnp.einsum("...ir,...is->...rs", a, a, precision="highest")
    own = jnp.sum(jnp.einsum("...rs,...so->...ro", gram, b, precision="highest") * b, axis=-2)
    return jnp.sqrt(jnp.maximum(squares + 2 * scale * cross + scale**2 * own, SMALLEST))


def merged(
    kernel: Float[Array, "*L I O"],
    a: Float[Array, "*L I R"],
    b: Float[Array, "*L R O"],
    magnitude: Float[Array, "*L O"] | None,
    scale: float,
) -> Float[Array, "*L I O"]:
    """The one kernel that gives what kernel and update give together, in the type of the kernel."""
    adapted = kernel.astype(jnp.float32) + scale * jnp.matmul(a, b, precision="highest")
    if magnitude is not None:
        adapted *= (magnitude / column_norm(kernel, a, b, scale))[..., None, :]
    return adapted.astype(kernel.dtype)


class TrainedRows(nnx.Module):
    """Rows of a frozen table that are trained: n rows [n, D], which stand in the places ``ids``."""

    def __init__(self, ids: tuple[int, ...], width: int):
        self.ids = ids
        self.rows = nnx.Param(jnp.zeros((len(ids), width)))

    def read(self, words: Float[Array, "*B D"], ids: Int[Array, "*B"]) -> Float[Array, "*B D"]:
        """What was read from the table, with the trained rows where ``ids`` name them."""
        # A few selections: writing the rows into the table would copy all of it.
        for place, row in zip(self.ids, self.rows[...], strict=True):
            words = jnp.where((ids == place)[..., None], row.astype(words.dtype), words)
        return words

    def score(self, scores: Float[Array, "*B V"], hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """The scores of a head that is tied to the table, with those of the trained rows."""
        own = jnp.matmul(hidden, self.rows[...].T.astype(hidden.dtype), preferred_element_type=scores.dtype)
        columns = jnp.arange(scores.shape[-1])
        for place, column in zip(self.ids, jnp.moveaxis(own, -1, 0), strict=True):
            scores = jnp.where(columns == place, column[..., None], scores)
        return scores
