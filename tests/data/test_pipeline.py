"""Batches: layout, visibility, hidden tokens, and the same bytes whatever builds them."""

import dataclasses
import itertools
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import grain
import numpy as np
import pytest

from cocoa_jax.attention.spans import Spans
from cocoa_jax.data import pipeline
from cocoa_jax.data.example import BLOCK_B
from cocoa_jax.data.inference import embedding_rows
from cocoa_jax.data.packing import PackingError, RowShare
from cocoa_jax.data.pipeline import (
    STATS,
    BatchConfig,
    MaskingConfig,
    RowsConfig,
    VisibilityConfig,
    built_ahead,
    rejected,
    stage_batches,
    stage_dataset,
    widest_bytes,
)
from cocoa_jax.data.pixels import ImageError
from cocoa_jax.data.sources import Content, Image, Record
from cocoa_jax.data.vision_plan import plan_image

ROWS = RowsConfig(batch_size=6, shapes=((4, 64, 160), (8, 64, 160)), examples_per_row=4, masked_per_row=24)
MASKING = MaskingConfig(text_ratio=0.5, image_ratio=0.5)
STAGES = {
    "warmup": BatchConfig("warmup", ROWS, masking=MASKING),
    "bridge": BatchConfig("bridge", ROWS, masking=MaskingConfig(text_ratio=0.5, image_ratio=0.0)),
    "contrastive": BatchConfig("contrastive", ROWS, negatives=1),
}
FAMILIES = ["2", "2.5"]


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Text of random words beside a picture; the target key repeats every five records."""

    name: str
    pictures: tuple[Image, ...]

    def __len__(self) -> int:
        return len(self.pictures)

    def record(self, index: int, rng: np.random.Generator) -> Record:
        words = " ".join(rng.choice(["kiwi", "red", "boat", "joy"], rng.integers(1, 7)))
        picture = Content(images=(self.pictures[index],))
        query = Content(words, picture.images) if self.name == "both" else picture
        return Record(f"{index}", self.name, query, Content(f"{words} {index}"), f"key {index % 5}", (Content("no"),))


@pytest.fixture(scope="module")
def sources(noise):
    sizes = [(28 * (1 + i % 4), 28 * (1 + i // 4 % 3)) for i in range(13)]
    pictures = tuple(noise(w, h, i) for i, (w, h) in enumerate(sizes))
    return {"both": Pairs("both", pictures), "plain": Pairs("plain", pictures[:7])}


WEIGHTS = {"both": 2.0, "plain": 1.0}


def dataset(stage, sources, processor, **more):
    options = {"seed": 5, "steps": 9} | more
    return stage_dataset(STAGES[stage], sources, WEIGHTS, processor, **options)


def assert_same(left: dict, right: dict, without: Sequence[str] = ()) -> None:
    assert left.keys() == right.keys()
    for key in left.keys() - set(without):
        assert left[key].dtype == right[key].dtype, key
        np.testing.assert_array_equal(left[key], right[key], err_msg=key)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stage", STAGES)
def test_shapes_and_types_are_those_documented(sources, processors, stage, family):
    batch = dataset(stage, sources, processors[family])[0]
    b = len(batch["tokens"])
    assert (b, 64, 160) in ROWS.shapes
    shapes = {
        "tokens": ((b, 64), np.int32),
        "positions": ((b, 64, 3), np.int32),
        "token_start": ((b, 64), np.int32),
        "token_end": ((b, 64), np.int32),
        "unit": ((b, 64), np.int32),
        "patches": ((b, 160, 1176), np.float32),
        "patch_positions": ((b, 160, 2), np.int32),
        "patch_start": ((b, 160), np.int32),
        "patch_end": ((b, 160), np.int32),
        "pool": ((b, 4, 1), np.int32),
        "example": ((18 if stage == "contrastive" else 6,), np.int32),
        "stats": ((len(STATS),), np.int32),
    }
    if family == "2.5":
        shapes |= {"window_start": ((b, 160), np.int32), "window_end": ((b, 160), np.int32)}
    if stage == "contrastive":
        shapes |= {key: ((6,), np.int32) for key in ("target_key", "image_key", "negative_key")}
    else:
        shapes |= {"predict_at": ((b, 24), np.int32), "predict_id": ((b, 24), np.int32)}
    if stage == "warmup":
        shapes |= {"hidden_unit": ((b, 40), np.bool_), "unit_seed": ((b, 40), np.uint32)}
    assert {key: (value.shape, value.dtype) for key, value in batch.items()} == shapes


def documents(batch: dict) -> list[tuple[int, int, int]]:
    """(row, first column, one past the last) of each document: positions restart at 0 there."""
    found = []
    for row, position in enumerate(batch["positions"]):
        length = int((batch["token_end"][row] > batch["token_start"][row]).sum())
        starts = [c for c in range(length) if (position[c] == 0).all()]
        found += [(row, a, z) for a, z in itertools.pairwise([*starts, length])]
    return found


@pytest.mark.parametrize(
    ("attention", "strict"), [("bidirectional", False), ("bidirectional", True), ("causal", False)]
)
@pytest.mark.parametrize("stage", STAGES)
def test_every_token_sees_what_its_stage_says(sources, processors, stage, attention, strict):
    if stage == "bridge" and attention == "causal":
        return
    config = dataclasses.replace(STAGES[stage], visibility=VisibilityConfig(attention, strict))
    batch = stage_dataset(config, sources, WEIGHTS, processors["2"], seed=1, steps=2)[0]
    expected = np.zeros((len(batch["tokens"]), 64, 64), bool)
    bridges = {row: set(columns[columns >= 0].tolist()) for row, columns in enumerate(batch["pool"][..., 0])}
    for row, first, end in documents(batch):
        for q in range(first, end):
            for k in range(first, end):
                if stage == "bridge":
                    e = next(c for c in bridges[row] if first <= c < end)
                    sees = k <= e if q < e or (q == e and strict) else (k >= e or q == e)
                else:
                    sees = attention == "bidirectional" or k <= q
                expected[row, q, k] = sees
    np.testing.assert_array_equal(Spans(batch["token_start"], batch["token_end"]).as_mask(64), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_examples_are_the_examples_alone(sources, processors, family):
    """Tokens, positions, units, pixels and patch spans of each document equal those of a row that holds it alone."""
    processor = processors[family]
    contents = [Content(f"kiwi {i}", sources["both"].pictures[i : i + 2]) for i in range(0, 12, 2)]
    contents.append(Content("words alone"))
    alone_config = dataclasses.replace(ROWS, examples_per_row=1, shapes=((1, 64, 160),))
    alone = [next(embedding_rows([c], processor, alone_config, VisibilityConfig()))[0] for c in contents]
    seen = []
    for batch, held in embedding_rows(contents, processor, ROWS, VisibilityConfig()):
        columns, patches = np.zeros(len(held), int), np.zeros(len(held), int)
        for row, slot in np.argwhere(held >= 0):
            single = {key: value[0] for key, value in alone[held[row, slot]].items()}
            n, p = int(single["token_end"][0]), int((single["patch_end"] > 0).sum())
            c, q = columns[row], patches[row]
            for key in ("tokens", "positions"):
                np.testing.assert_array_equal(batch[key][row, c : c + n], single[key][:n])
            for key in ("token_start", "token_end"):
                np.testing.assert_array_equal(batch[key][row, c : c + n], single[key][:n] + c)
            assert batch["pool"][row, slot, 0] == single["pool"][0, 0] + c
            shown = single["unit"][:n] >= 0
            np.testing.assert_array_equal(
                batch["unit"][row, c : c + n], np.where(shown, single["unit"][:n] + q // 4, -1)
            )
            for key in ("patches", "patch_positions"):
                np.testing.assert_array_equal(batch[key][row, q : q + p], single[key][:p])
            for key in {"patch_start", "patch_end", "window_start", "window_end"} & batch.keys():
                np.testing.assert_array_equal(batch[key][row, q : q + p], single[key][:p] + q)
            columns[row], patches[row] = c + n, q + p
            seen.append(int(held[row, slot]))
        for row in range(len(held)):  # what is left is padding
            assert not batch["tokens"][row, columns[row] :].any() and not batch["patches"][row, patches[row] :].any()
            assert (
                not batch["token_end"][row, columns[row] :].any() and not batch["patch_end"][row, patches[row] :].any()
            )
            assert (batch["unit"][row, columns[row] :] == -1).all()
    assert sorted(seen) == list(range(len(contents)))


def test_patch_spans_are_pictures_and_windows(sources, processors):
    processor = processors["2.5"]
    image = sources["both"].pictures[11]
    batch, _ = next(embedding_rows([Content(images=(image, image))], processor, ROWS, VisibilityConfig()))
    plan = plan_image(processor.pixels.grid(image), processor.config.vision)
    n = len(plan.order)
    assert batch["patch_start"][0, : 2 * n].tolist() == [0] * n + [n] * n
    assert batch["patch_end"][0, : 2 * n].tolist() == [n] * n + [2 * n] * n
    ends = np.cumsum(plan.windows * 2)
    np.testing.assert_array_equal(batch["window_end"][0, : 2 * n], np.repeat(ends, plan.windows * 2))


@pytest.mark.parametrize("stage", ["warmup", "bridge"])
@pytest.mark.parametrize("shift", [True, False])
def test_hidden_tokens_are_replaced_and_asked_for(sources, processors, stage, shift):
    processor = processors["2"]
    masking = dataclasses.replace(MASKING, shift=shift)
    nothing = MaskingConfig(0.0, 0.0, shift=shift)
    batches = {
        m: stage_dataset(dataclasses.replace(STAGES[stage], masking=m), sources, WEIGHTS, processor, seed=3, steps=4)[2]
        for m in (masking, nothing)
    }
    batch, plain = batches[masking], batches[nothing]
    truth = plain["tokens"].copy()  # stage 2 hides at least one token a document even at ratio 0
    rows, slots = np.nonzero(plain["predict_at"] >= 0)
    assert len(rows) == (len(list(documents(plain))) if stage == "bridge" else 0)
    truth[rows, plain["predict_at"][rows, slots] + shift] = plain["predict_id"][rows, slots]
    rows, slots = np.nonzero(batch["predict_at"] >= 0)
    columns = batch["predict_at"][rows, slots] + shift
    assert len(rows) > 10
    np.testing.assert_array_equal(batch["predict_id"][rows, slots], truth[rows, columns])
    assert (batch["tokens"][rows, columns] == processor.mask_id).all()
    assert (batch["tokens"] == processor.mask_id).sum() == len(rows)
    others = batch["tokens"] != processor.mask_id
    np.testing.assert_array_equal(batch["tokens"][others], truth[others])
    assert (truth[rows, columns] > 8).all(), "special tokens are never hidden"
    unused = batch["predict_at"] < 0
    assert (batch["predict_id"][unused] == -1).all()
    for row, first, end in documents(batch):
        mine = columns[(rows == row) & (columns >= first) & (columns < end)]
        assert (mine - shift >= first).all(), "predicted from a state of its own document"
        if stage == "bridge":
            e = int(batch["pool"][row][(batch["pool"][row] >= first) & (batch["pool"][row] < end)][0])
            assert len(mine) >= 1 and (mine > e).all(), "block B alone, at least one token"


@dataclasses.dataclass(frozen=True)
class Digits(Pairs):
    """Texts of digits, one token each; ``turn`` exchanges the digits and nothing else."""

    turn: bool = False

    def record(self, index: int, rng: np.random.Generator) -> Record:
        text = "".join(rng.choice(list("0123456"), 12))
        text = text.translate(str.maketrans("0123456", "6543210")) if self.turn else text
        return Record(f"{index}", self.name, Content(text, (self.pictures[index],)), Content(text), "")


@pytest.mark.parametrize("stage", ["warmup", "bridge"])
def test_every_example_hides_places_of_its_own(sources, processors, stage):
    """Texts of equal length, half of whose twelve tokens are hidden: two alike are a chance of one in thousands."""
    rows = dataclasses.replace(ROWS, masked_per_row=64)
    config = BatchConfig(stage, rows, masking=MaskingConfig(0.5, 0.5))
    source = {"d": Digits("d", sources["plain"].pictures)}
    batch = stage_dataset(config, source, {"d": 1.0}, processors["2"], seed=0, steps=1)[0]
    hidden = batch["tokens"] == processors["2"].mask_id
    patterns = [hidden[row, end - 12 : end].tobytes() for row, _, end in documents(batch)]
    assert len(patterns) == len(set(patterns)) == 6


@pytest.mark.parametrize("stage", ["warmup", "bridge"])
def test_no_input_knows_the_true_id_of_a_hidden_token(sources, processors, stage):
    """Exchange all ids of a text that is wholly hidden: no array but predict_id may change."""
    processor, pictures = processors["2"], sources["plain"].pictures
    rows = dataclasses.replace(ROWS, masked_per_row=64)
    config = BatchConfig(stage, rows, masking=MaskingConfig(1.0, 0.5, shift=True))
    base, changed = (
        stage_dataset(config, {"d": Digits("d", pictures, turn)}, {"d": 1.0}, processor, seed=0, steps=2)[1]
        for turn in (False, True)
    )
    different = [key for key in base if (base[key] != changed[key]).any()]
    # Block A of stage 2 is shown as it is.
    assert different == (["predict_id"] if stage == "warmup" else ["tokens", "predict_id"])
    if stage == "bridge":
        for row, first, end in documents(base):
            e = next(c for c in base["pool"][row, :, 0] if first <= c < end)
            assert (base["tokens"][row, e:end] == changed["tokens"][row, e:end]).all()


def test_the_masked_budget_is_kept_and_counted(sources, processors):
    tight = dataclasses.replace(ROWS, masked_per_row=4)
    config = dataclasses.replace(STAGES["bridge"], rows=tight, masking=MaskingConfig(1.0, 0.0))
    wide = dataclasses.replace(config, rows=dataclasses.replace(ROWS, masked_per_row=64))
    few, all_ = (stage_dataset(c, sources, WEIGHTS, processors["2"], seed=0, steps=1)[0] for c in (config, wide))
    asked, possible = (int((b["predict_at"] >= 0).sum()) for b in (few, all_))
    assert few["stats"][STATS.index("dropped_masks")] == possible - asked > 0
    assert all_["stats"][STATS.index("dropped_masks")] == 0
    for row, first, end in documents(few):
        at = few["predict_at"][row]
        assert ((at >= first) & (at < end)).any(), "every document keeps one"


def test_hidden_units_belong_to_pictures_and_have_seeds(sources, processors):
    batch = dataset("warmup", sources, processors["2.5"])[0]
    real = batch["patch_end"][:, ::4] > 0
    assert not batch["hidden_unit"][~real].any() and 0.2 < batch["hidden_unit"][real].mean() < 0.8
    assert len(set(batch["unit_seed"][real].tolist())) == real.sum()


@pytest.mark.parametrize("stage", STAGES)
def test_examples_are_found_where_the_index_says(sources, processors, stage):
    batch = dataset(stage, sources, processors["2"])[3]
    assert len(set(batch["example"].tolist())) == len(batch["example"])
    rows, slots = np.divmod(batch["example"], ROWS.examples_per_row)
    if stage == "contrastive":
        columns = batch["pool"][rows, slots, 0]
        assert (batch["tokens"][rows, columns] == 2).all()
        assert set(batch["pool"][batch["pool"] >= 0].tolist()) == set(columns.tolist())
        where = {(row, end - 1): (row, first, end) for row, first, end in documents(batch)}
        found = [where[row, column] for row, column in zip(rows, columns, strict=True)]
        texts = [
            processors["2"].text.decode(batch["tokens"][row, first : end - 1].tolist()) for row, first, end in found
        ]
        assert texts[12:] == ["no"] * 6 and all(text[-1].isdigit() for text in texts[6:12])
        for query, target in zip(texts[:6], texts[6:12], strict=True):
            assert batch["stats"][0] == 1 or target.rsplit(" ", 1)[0] in query


def test_a_contrastive_batch_has_one_kind_and_equal_keys_are_equal(sources, processors):
    kinds = []
    for batch in dataset("contrastive", sources, processors["2"]):
        assert (batch["target_key"] < 5).all() and len(np.unique(batch["target_key"])) <= 5
        kinds.append(int(batch["stats"][0]))
    assert kinds.count(0) == 6 and kinds.count(1) == 3  # weights 2 : 1


@pytest.mark.parametrize(("size", "steps"), [(6, 5), (1, 26)])
def test_an_epoch_uses_every_record_once(sources, processors, size, steps):
    """13 records, 6 or 1 a batch: the first 13 drawn are all different, and the next epoch has another order."""
    seen: list[str] = []

    @dataclasses.dataclass(frozen=True)
    class Spy(Pairs):
        def record(self, index, rng):
            seen.append(str(index))
            return super().record(index, rng)

    spy = {"both": Spy("both", sources["both"].pictures)}
    config = dataclasses.replace(STAGES["bridge"], rows=dataclasses.replace(ROWS, batch_size=size))
    batches = stage_dataset(config, spy, {"both": 1.0}, processors["2"], seed=0, steps=steps)
    for step in range(steps):
        batches[step]
    assert len(set(seen[:13])) == len(set(seen[13:26])) == 13 and seen[:13] != seen[13:26]


@pytest.mark.parametrize("stage", STAGES)
def test_threads_and_resuming_change_nothing(sources, processors, stage):
    whole = [dataset(stage, sources, processors["2"])[step] for step in range(9)]
    for threads in (0, 2):
        batches = stage_batches(STAGES[stage], sources, WEIGHTS, processors["2"], seed=5, steps=9, threads=threads)
        iterator = iter(batches)
        for step in range(4):
            assert_same(next(iterator), whole[step])
        fresh = iter(built_ahead(dataset(stage, sources, processors["2"])[4:], threads))
        for step in range(4, 9):
            assert_same(next(fresh), whole[step])
        with pytest.raises(StopIteration):
            next(fresh)


@pytest.mark.parametrize(("size", "ahead"), [(0, 6), (10, 6), (100, 5), (400, 2)])
def test_large_batches_are_built_ahead_up_to_a_limit_of_bytes(monkeypatch, size, ahead):
    monkeypatch.setattr(pipeline, "_AHEAD", 500)
    built: list[int] = []
    numbers = grain.MapDataset.range(50).map(lambda index: built.append(index) or {"tokens": np.zeros(1)})
    iterator = iter(built_ahead(numbers, threads=3, batch_bytes=size))
    next(iterator)
    began = time.monotonic()
    while len(built) <= ahead and time.monotonic() < began + 10:
        time.sleep(0.01)
    time.sleep(0.2)  # in which more would be
    iterator.close()
    assert len(built) == 1 + ahead


@pytest.mark.parametrize(("workers", "ahead", "threads"), [(0, 6, 3), (1, 6, 3), (2, 5, 3), (4, 2, 2), (8, 2, 2)])
def test_workers_share_the_bytes_of_a_host(monkeypatch, workers, ahead, threads):
    class Dataset:
        def to_iter_dataset(self, options):
            assert (options.prefetch_buffer_size, options.num_threads) == (ahead, threads)
            return self

        def mp_prefetch(self, options):
            assert options.num_workers == workers > 0
            return self

    monkeypatch.setattr(pipeline, "_AHEAD", 500)
    built_ahead(Dataset(), threads=3, workers=workers, batch_bytes=50)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_bytes_of_the_largest_batch_are_known_before_it_is_built(sources, processors, monkeypatch, family):
    config = dataclasses.replace(STAGES["contrastive"], rows=dataclasses.replace(ROWS, shapes=((8, 64, 160),)))
    given = config, sources, WEIGHTS, processors[family]
    built = sum(array.nbytes for array in stage_dataset(*given, seed=5, steps=1)[0].values())
    assert widest_bytes(config, processors[family]) == pytest.approx(built, rel=1e-3)  # counts are no rows
    more_rows = dataclasses.replace(config, rows=dataclasses.replace(ROWS, shapes=((2, 64, 160), (32, 64, 80))))
    monkeypatch.setattr(pipeline, "built_ahead", lambda *asked: asked)
    *_, size = stage_batches(more_rows, *given[1:], seed=5, steps=1, share=RowShare((0,), 2))
    assert size == pytest.approx(built, rel=0.01)  # half of twice as many patches


def test_worker_processes_change_nothing(sources, processors, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2])  # workers inherit it, and import this file for its source
    batches = stage_batches(
        STAGES["bridge"], {"both": Worker("both", sources["both"].pictures)}, {"both": 1.0}, processors["2"],
        seed=5, steps=3, threads=0, workers=2,
    )  # fmt: skip
    plain = stage_dataset(STAGES["bridge"], {"both": sources["both"]}, {"both": 1.0}, processors["2"], seed=5, steps=3)
    iterator = iter(batches)
    for step in range(3):
        assert_same(next(iterator), plain[step])
    iterator.close()


class Worker(Pairs):
    """Fails when a worker has started a JAX back end."""

    def record(self, index, rng):
        if "jax._src.xla_bridge" in sys.modules:
            assert not sys.modules["jax._src.xla_bridge"].backends_are_initialized()
        return super().record(index, rng)


@pytest.mark.parametrize("stage", STAGES)
def test_shares_of_two_processes_are_the_whole(sources, processors, stage):
    whole = dataset(stage, sources, processors["2.5"])[1]
    parts = [dataset(stage, sources, processors["2.5"], share=RowShare((i,), 2))[1] for i in (0, 1)]
    shared = {"example", "target_key", "image_key", "negative_key", "stats"}
    for key, value in whole.items():
        if key in shared:
            for part in parts:
                np.testing.assert_array_equal(part[key][:5], value[:5])
        else:
            np.testing.assert_array_equal(np.concatenate([part[key] for part in parts]), value, err_msg=key)


def test_steps_and_seeds_differ(sources, processors):
    batches = [dataset("bridge", sources, processors["2"], seed=s)[n]["tokens"] for s, n in [(0, 0), (0, 1), (1, 0)]]
    for i in range(3):
        for j in range(i):
            assert batches[i].shape != batches[j].shape or (batches[i] != batches[j]).any()


def test_only_local_pixels_are_decoded(sources, processors, noise):
    broken = dataclasses.replace(noise(112, 84, 99), data=b"no picture")
    pictures = (broken, *sources["both"].pictures[:5])
    mixed = {"both": Pairs("both", pictures)}
    outcomes = []
    for index in (0, 1):
        part = stage_dataset(
            STAGES["bridge"],
            mixed,
            {"both": 1.0},
            processors["2"],
            seed=0,
            steps=1,
            share=RowShare((index,), 2),
        )
        try:
            outcomes.append(part[0]["tokens"].shape)
        except ImageError as error:
            assert "noise-112x84-99: cannot be decoded" in str(error)
            outcomes.append(None)
    assert outcomes.count(None) == 1


def test_records_that_fit_no_row_are_named_before_training(sources, processors, noise):
    small = dataclasses.replace(ROWS, shapes=((4, 64, 40),))
    config = dataclasses.replace(STAGES["bridge"], rows=small)
    big = Pairs("both", (noise(28, 28), noise(112, 112), noise(56, 84)))
    reasons = rejected(config, big, processors["2"], seed=0)
    assert list(reasons) == [1]
    assert reasons[1] == "both 1: the example: 64 patches, a row holds 40: lower max_pixels or widen rows.shapes"
    with pytest.raises(PackingError, match="both 1: the example: 64 patches"):
        stage_dataset(config, {"both": big}, {"both": 1.0}, processors["2"], seed=0, steps=1)[0]


def test_more_rows_than_the_widest_shape_has_are_counted(sources, processors):
    narrow = dataclasses.replace(ROWS, shapes=((1, 64, 160), (2, 64, 160)), examples_per_row=1)
    config = dataclasses.replace(STAGES["bridge"], rows=narrow)
    batch = stage_dataset(config, sources, WEIGHTS, processors["2"], seed=0, steps=1)[0]
    assert len(batch["tokens"]) == 6 and batch["stats"][STATS.index("extra_rows")] == 4


def test_settings_that_contradict_are_refused(sources, processors):
    with pytest.raises(ValueError, match="stages 1 and 2 need it"):
        BatchConfig("warmup", ROWS)
    with pytest.raises(ValueError, match="3 has none"):
        BatchConfig("contrastive", ROWS, masking=MASKING)
    with pytest.raises(ValueError, match="not causal"):
        BatchConfig("bridge", ROWS, VisibilityConfig("causal"), MASKING)
    with pytest.raises(ValueError, match=r"differ in \['plain'\]"):
        stage_dataset(STAGES["bridge"], sources, {"both": 1.0}, processors["2"], seed=0, steps=1)
    with pytest.raises(ValueError, match="no weight"):
        stage_dataset(STAGES["bridge"], sources, {"both": 0.0, "plain": 0.0}, processors["2"], seed=0, steps=1)
    with pytest.raises(PackingError, match="cannot be shared by 3"):
        dataset("bridge", sources, processors["2"], share=RowShare((0,), 3))


def test_building_a_batch_starts_no_jax_back_end():
    code = (
        "import numpy as np, cocoa_jax.data.pipeline\n"
        "from cocoa_jax.attention import spans\n"
        "s = spans.segments([3, 2], 8)\n"
        "out = [spans.truncated(s, s), spans.causal(s), spans.bidirectional(s)]\n"
        "assert all(isinstance(o.start, np.ndarray) for o in out)\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge.backends_are_initialized()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_block_names():
    assert BLOCK_B == 3
