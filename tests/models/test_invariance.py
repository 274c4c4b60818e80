"""What an embedding may depend on: its own example, all of it, and nothing else."""

import dataclasses
import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from cocoa_jax.data.inference import embedding_rows
from cocoa_jax.data.packing import RowsConfig
from cocoa_jax.data.processor import Processor
from cocoa_jax.data.processor_settings import ProcessorConfig
from cocoa_jax.data.rows import VisibilityConfig
from cocoa_jax.data.sources import Content, Image
from cocoa_jax.models.config import read_config
from cocoa_jax.models.inputs import Inputs
from cocoa_jax.models.qwen2_vl import bind, graph_of
from cocoa_jax.objectives.embedding import embed_examples

TOLERANCE = 1e-5  # float32, summed in another order
SHAPES = {
    "packed": RowsConfig(batch_size=9, shapes=((3, 64, 64),), examples_per_row=6, masked_per_row=6),
    "one a row": RowsConfig(batch_size=9, shapes=((9, 64, 64),), examples_per_row=1, masked_per_row=1),
    "padded": RowsConfig(batch_size=9, shapes=((5, 96, 80),), examples_per_row=2, masked_per_row=2),
}


def picture(width: int, height: int, seed: int) -> Image:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(buffer, "PNG")
    return Image(buffer.getvalue(), width, height, f"noise {seed}")


CONTENTS = [
    Content("a kiwi fruit"),
    Content("", (picture(84, 56, 1),)),
    Content("two small boats", (picture(56, 112, 2),)),
    Content("x"),
    Content("one beside the other", (picture(28, 28, 3), picture(84, 84, 4))),
    Content("the red car on a green hill"),
    Content("", (picture(112, 84, 5),)),
]


class Tiny:
    """A random model of a family and whatever embeds contents with it."""

    def __init__(self, family: str, backbone):
        config = read_config(backbone)
        if family == "2.5":
            more = {"family": "2.5", "window": 56, "full_layers": (1,), "tokens_per_second": 2.0}
            config = dataclasses.replace(config, vision=dataclasses.replace(config.vision, **more))
        self.processor = Processor.load(backbone, config, ProcessorConfig(784, 16 * 784, 16))
        graph, shapes = graph_of(config)
        rng = np.random.default_rng(0)

        def draw(path, leaf):  # biases and norms too: at birth they are all zeros or ones
            kind = path[-1].key
            deviation = leaf.shape[-2] ** -0.5 if kind == "kernel" else 0.1
            return rng.standard_normal(leaf.shape, np.float32) * np.float32(deviation) + (kind == "scale")

        self.params = jax.tree.map_with_path(draw, shapes)
        self.run = jax.jit(lambda params, batch: embed_examples(bind(graph, params), batch))
        self.see = jax.jit(lambda params, batch: bind(graph, params)(Inputs.from_batch(batch)))

    def batches(self, contents, shape: str, attention: str = "bidirectional"):
        return embedding_rows(contents, self.processor, SHAPES[shape], VisibilityConfig(attention))

    def embed(self, contents, shape: str, change=lambda batch: batch) -> np.ndarray:
        out = np.full((len(contents), self.processor.config.text.width), np.nan, np.float32)
        for batch, held in self.batches(contents, shape):
            rows = self.run(self.params, {**change(batch), "example": np.arange(held.size, dtype=np.int32)})
            used = held.ravel() >= 0
            out[held.ravel()[used]] = np.asarray(rows)[used]
        return out


@pytest.fixture(scope="module")
def tiny(backbone):
    return functools.cache(lambda family: Tiny(family, backbone))


def to_the_right(batch: dict) -> dict:
    """The same rows with padding on the left: tokens moved by all that is free, patches by one empty unit."""
    moved = {name: array.copy() for name, array in batch.items()}
    for row in range(len(batch["tokens"])):
        free = {"token": int((batch["token_end"][row] == 0).sum())}
        free["patch"] = free["window"] = min(4, int((batch["patch_end"][row] == 0).sum()))
        for name, array in moved.items():
            kind = name.split("_")[0].removesuffix("es")
            by = free.get(kind, free["token"])
            if name == "pool":
                array[row] += np.where(array[row] >= 0, by, 0)
                continue
            if name.endswith(("_start", "_end")):  # an interval moves with what it points at; (0, 0) stays
                array[row] += np.where(batch[f"{kind}_end"][row] > 0, by, 0)
            array[row] = np.roll(array[row], by, axis=0)
        moved["unit"][row] += np.where(moved["unit"][row] >= 0, free["patch"] // 4, 0)
    return moved


@pytest.mark.parametrize("family", ["2", "2.5"])
def test_company_order_padding_and_packing_do_not_matter(tiny, family):
    model = tiny(family)
    want = model.embed(CONTENTS, "packed")
    np.testing.assert_allclose(np.linalg.norm(want, axis=1), 1, atol=TOLERANCE)
    spread = np.abs(want[:, None] - want)[~np.eye(len(want), dtype=bool)].max(-1)
    assert spread.min() > 0.05  # all differ, or equality would say nothing
    others = {
        "alone": np.concatenate([model.embed([content], "packed") for content in CONTENTS]),
        "one a row": model.embed(CONTENTS, "one a row"),
        "more padding": model.embed(CONTENTS, "padded"),
        "backwards": model.embed(CONTENTS[::-1], "packed")[::-1],
        "fewer": np.concatenate([model.embed(CONTENTS[:3], "packed"), model.embed(CONTENTS[3:], "packed")]),
        "padding on the left": model.embed(CONTENTS, "packed", to_the_right),
    }
    for name, got in others.items():
        np.testing.assert_allclose(got, want, atol=TOLERANCE, err_msg=name)


def test_packing_does_pack(tiny):
    (batch, held), *more = tiny("2").batches(CONTENTS, "packed")
    assert not more and (np.sum(held >= 0, axis=1) > 1).any() and (held >= 0).sum() == len(CONTENTS)
    moved = to_the_right(batch)
    assert (moved["token_end"][:, 0] == 0).any() and moved["token_end"][:, -1].all()


@pytest.mark.parametrize("family", ["2", "2.5"])
def test_a_late_token_moves_an_early_state_unless_attention_is_causal(tiny, family):
    model, contents = tiny(family), CONTENTS[4:5]
    for attention, moves in (("bidirectional", True), ("causal", False)):
        ((batch, _),) = model.batches(contents, "packed", attention)
        last = int(np.flatnonzero(batch["token_end"][0])[-1])
        other = {**batch, "tokens": batch["tokens"].copy()}
        other["tokens"][0, last] += 1
        before, after = (np.asarray(model.see(model.params, x))[0] for x in (batch, other))
        moved = np.abs(after - before).max(-1)
        assert moved[last] > 1e-3
        assert (moved[:last] > 1e-4).all() if moves else (moved[:last] == 0).all()


def test_a_pixel_moves_every_state_of_its_example_and_no_other(tiny):
    model = tiny("2.5")
    ((batch, held),) = model.batches([CONTENTS[1], CONTENTS[0]], "packed")
    other = {**batch, "patches": batch["patches"].copy()}
    other["patches"][0, 5] += 1
    before, after = (np.asarray(model.see(model.params, x))[0] for x in (batch, other))
    moved = np.abs(after - before).max(-1)
    assert held[0].tolist()[:2] == [0, 1]
    first, second = (int(column) for column in batch["pool"][0, :2, 0])
    assert (moved[: first + 1] > 1e-5).all() and (moved[first + 1 : second + 1] == 0).all()


def test_the_head_on_the_pooled_state_gives_the_logits(golden_batch, golden_params):
    """Embeddings are taken after the final norm, from the state that the LM head reads."""
    batch = golden_batch("qwen2", "right")
    graph, _ = graph_of(batch.config)
    at = np.argmax(batch.files["segment_ids"] == 2, axis=1).astype(np.int32)
    spans = batch.spans("bidir")
    rows = {**batch.batch, "token_start": spans.start, "token_end": spans.end, "pool": at[:, None, None]}
    rows["example"] = np.arange(3, dtype=np.int32)

    @jax.jit
    def both(params, rows):
        model = bind(graph, params)
        pooled = embed_examples(model, rows)
        state = model(Inputs.from_batch(rows))[jnp.arange(3), at]
        return pooled, jnp.linalg.norm(state, axis=-1, keepdims=True), model.logits(state)

    pooled, length, logits = both(golden_params("qwen2"), rows)
    want = batch.files["bidir.logits"][np.arange(3), at]
    head = golden_params("qwen2")["text"]["embed"]["table"].T
    np.testing.assert_allclose(np.asarray(pooled) * np.asarray(length) @ head, want, atol=1e-4 * np.abs(want).max())
    np.testing.assert_allclose(logits, want, atol=1e-4 * np.abs(want).max())
