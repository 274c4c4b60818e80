"""Batches planned from stored lengths are the batches that reading all records would have made."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from cocoa_jax.data.bad import BadConfig, KnownBad, Ledger, TooManyBad
from cocoa_jax.data.batches import choose
from cocoa_jax.data.mixture import DatasetConfig, MixtureConfig, open_mixture
from cocoa_jax.data.packing import PackingError, RowsConfig, RowShare
from cocoa_jax.data.pipeline import STATS, BatchConfig, MaskingConfig, built_ahead, stage_dataset
from cocoa_jax.data.planned import PlannedBuilder, shrunk
from cocoa_jax.data.prepare import BuildConfig, build
from cocoa_jax.data.prepared import PreparedSource
from cocoa_jax.data.readers.stages import StagedSource
from cocoa_jax.data.sources import Content, RecordError, content_key

ROWS = RowsConfig(batch_size=6, shapes=((4, 64, 192), (8, 64, 192)), examples_per_row=4, masked_per_row=24)
MASKING = MaskingConfig(text_ratio=0.5, image_ratio=0.5)
STAGES = {
    "warmup": BatchConfig("warmup", ROWS, masking=MASKING),
    "bridge": BatchConfig("bridge", ROWS, masking=MASKING),
    "contrastive": BatchConfig("contrastive", ROWS),
}


@pytest.fixture(scope="module")
def prepared(noise, mixed_pairs, processors, tmp_path_factory):
    @dataclasses.dataclass(frozen=True)
    class Long(mixed_pairs):
        """All records are of use to all stages, and their texts are of different lengths.

        Pictures that are made smaller are wrong targets of some and, by their keys, the right ones of others.
        """

        def record(self, index, rng):
            record = super().record(index, rng)
            query = dataclasses.replace(record.query, text="Find it: " + "a kiwi " * (index % 4))
            target = dataclasses.replace(record.target, text="two small boats " * (1 + index % 3), images=())
            key = record.image_key if index % 4 else ""
            wrong = tuple(dataclasses.replace(c, text=f"{c.text} {index % 5}") for c in record.negatives)
            wrong = tuple(dataclasses.replace(c, images=c.images and (large[index % 4],)) for c in wrong)
            record = dataclasses.replace(record, target_key=content_key(Content(images=(large[index % 5],))))
            return dataclasses.replace(record, query=query, target=target, image_key=key, negatives=wrong)

    sizes = [(28 * (1 + i % 4), 28 * (1 + i // 4 % 3)) for i in range(11)]
    large = [noise(400, 300, 20 + i) for i in range(5)]
    source = Long(tuple(noise(w, h, i) for i, (w, h) in enumerate(sizes)), name="long")
    folder = tmp_path_factory.mktemp("prepared")
    return build("long", source, "x", processors["2"], str(folder), BuildConfig(workers=0, shard_records=8))


def mixture(prepared, stage):
    dataset = DatasetConfig("prepared", path=prepared.folder, cap=17)
    return open_mixture(MixtureConfig({"long": dataset}), stage)


def dataset(prepared, processors, stage, config=None, **more):
    options = {"seed": 5, "steps": 8} | more
    mixed = mixture(prepared, stage)
    return stage_dataset(config or STAGES[stage], mixed.sources, mixed.weights, processors["2"], **options)


def assert_same(left, right):
    assert left.keys() == right.keys()
    for key in left:
        assert left[key].dtype == right[key].dtype
        np.testing.assert_array_equal(left[key], right[key], err_msg=key)


@pytest.mark.parametrize(
    ("stage", "negatives"), [*((stage, 0) for stage in STAGES), ("contrastive", 1), ("contrastive", 2)]
)
def test_it_is_what_reading_all_records_makes(prepared, processors, stage, negatives, monkeypatch):
    """Of hard negatives every third record has none, one and two."""
    config = dataclasses.replace(STAGES[stage], negatives=negatives)
    planned = dataset(prepared, processors, stage, config)
    with monkeypatch.context() as patch:
        patch.setattr("cocoa_jax.data.pipeline.stored_lengths", lambda *_: None)
        plain = dataset(prepared, processors, stage, config)
    absent = no_picture = both = 0
    for step in range(8):
        left, right = planned[step], plain[step]
        if stage == "contrastive":  # hashes are numbered in another order than the keys themselves
            pairs = [[part.pop("image_key") for part in (left, right)]]
            assert (left["example"] < 0).sum() == (left.get("negative_key", np.zeros(0)) < 0).sum()
            targets = ("target_key", "negative_key") if negatives else ("target_key",)
            pairs.append([np.concatenate([part.pop(key) for key in targets]) for part in (left, right)])
            for mine, other in pairs:
                np.testing.assert_array_equal(mine[:, None] == mine, other[:, None] == other)
                np.testing.assert_array_equal(mine == -1, other == -1)
            no_picture += int((pairs[0][0] == -1).sum())
            absent += int((pairs[1][0] == -1).sum())
            both += int(np.isin(pairs[1][0][6:], pairs[1][0][:6]).sum())
        assert_same(left, right)
    assert (absent > 0) == (negatives > 0) and (no_picture > 0) == (stage == "contrastive")
    assert (both > 0) == (negatives == 2), "wrong targets that are the right ones of others"


def test_others_stand_in_for_records_of_no_use(noise, mixed_pairs, processors, tmp_path, monkeypatch):
    """Every second target is of pictures alone, which stage 2 does not rebuild."""
    pictures = mixed_pairs(tuple(noise(28, 28, seed) for seed in range(4)))
    made = build("mixed", pictures, "x", processors["2"], str(tmp_path), BuildConfig(workers=0))
    config = dataclasses.replace(STAGES["bridge"], bad=BadConfig("skip", 1.0))
    report, noted, plain = tmp_path / "bad.jsonl", [], Ledger.note

    def spy(self, drawn, found):
        noted.append((drawn, [(bad.source, bad.index, bad.step, bad.place) for bad in found]))
        plain(self, drawn, found)

    monkeypatch.setattr(Ledger, "note", spy)
    made_of = dataset(made, processors, "bridge", config, report=report)
    planned = [made_of[step] for step in range(8)]
    for batch, (drawn, found) in zip(planned, noted, strict=True):
        assert (batch["pool"] >= 0).sum() == 6
        assert batch["stats"][STATS.index("bad_records")] == len(found) == drawn - 6
    named = [json.loads(line) for line in report.read_text().splitlines()]
    assert sorted(bad["index"] for bad in named) == [0, 2, 4, 6]
    assert all("of no use to stage 'bridge'" in bad["reason"] for bad in named)
    counted = noted.copy()
    noted.clear()
    with monkeypatch.context() as patch:
        patch.setattr("cocoa_jax.data.pipeline.stored_lengths", lambda *_: None)
        plain_of = dataset(made, processors, "bridge", config)
        for step in range(8):
            assert_same(planned[step], plain_of[step])
    assert noted == counted
    strict = dataset(made, processors, "bridge", dataclasses.replace(config, bad=BadConfig("skip", 0.01)))
    with pytest.raises(TooManyBad, match=r"the ceiling is a share of 0\.01; the last: .* of no use to stage 'bridge'"):
        [strict[step] for step in range(8)]
    with pytest.raises(RecordError, match=r"of no use to stage 'bridge': leave its data set out of the stage"):
        dataset(made, processors, "bridge", steps=1)[0]


@pytest.mark.parametrize("action", ["skip", "stop"])
def test_what_a_check_found_is_skipped_unread(prepared, processors, monkeypatch, action):
    listed = KnownBad("x", 0, {"long": 17}, {"long": {3: "listed", 8: "listed"}})
    config = dataclasses.replace(STAGES["contrastive"], bad=BadConfig(action, 1.0))
    read, plain = [], StagedSource.record
    monkeypatch.setattr(StagedSource, "record", lambda self, index, rng: read.append(index) or plain(self, index, rng))
    planned = dataset(prepared, processors, "contrastive", config, known=listed)
    assert sum(int(planned[step]["stats"][STATS.index("bad_records")]) for step in range(8)) > 0
    assert len(read) == 48 and not {3, 8} & set(read)


def test_a_window_counts_its_records_once(prepared, processors, monkeypatch):
    noted = []
    monkeypatch.setattr(Ledger, "note", lambda self, drawn, found: noted.append((drawn, len(found))))
    planned = dataset(prepared, processors, "warmup", dataclasses.replace(STAGES["warmup"], rows=WINDOW), steps=6)
    assert all(planned[step] for step in range(6))
    assert noted == [(15, 0), (15, 0)]


def test_the_steps_of_a_window_tell_its_bad_records_and_dropped_masks_once(
    noise, mixed_pairs, processors, tmp_path, monkeypatch
):
    """Every second target is of pictures alone, which stage 2 does not rebuild; a row hides one token."""
    pictures = mixed_pairs(tuple(noise(28, 28, seed) for seed in range(4)))
    made = build("mixed", pictures, "x", processors["2"], str(tmp_path), BuildConfig(workers=0))
    rows = dataclasses.replace(WINDOW, masked_per_row=1)
    config = dataclasses.replace(STAGES["bridge"], rows=rows, bad=BadConfig("skip", 1.0))
    noted, chosen = [], []
    monkeypatch.setattr(Ledger, "note", lambda self, drawn, found: noted.append(len(found)))
    monkeypatch.setattr("cocoa_jax.data.planned.choose", lambda *given: chosen.append(choose(*given)) or chosen[-1])
    batches = dataset(made, processors, "bridge", config, steps=6)
    stats = np.array([batches[step]["stats"] for step in range(6)])[:, [STATS.index("bad_records"), -1]]
    dropped = [chosen[step][1] for step in (0, 3)]
    assert min(*noted, *dropped) > 0 and STATS[-1] == "dropped_masks"
    assert stats.reshape(2, 3, 2).sum(axis=1).tolist() == [list(pair) for pair in zip(noted, dropped, strict=True)]


def test_pictures_that_were_made_smaller_than_a_stage_reads_are_told(noise, mixed_pairs, processors, tmp_path):
    plain = processors["2"]
    larger = dataclasses.replace(
        plain, pixels=dataclasses.replace(plain.pixels, max_pixels=2 * plain.pixels.max_pixels)
    )
    sources = {}
    for name, side in (("small", 28), ("large", 400)):
        pictures = mixed_pairs((noise(side, side, 1),), name=name)
        made = build(name, pictures, "x", plain, str(tmp_path), BuildConfig(workers=0))
        sources[name] = open_mixture(
            MixtureConfig({name: DatasetConfig("prepared", made.folder, cap=1)}), "contrastive"
        ).sources[name]
    assert shrunk(sources.values(), plain) == [] and shrunk([pictures], larger) == []
    assert shrunk(sources.values(), larger) == ["large"]
    del made.statistics["max_pixels"]  # a build of an earlier version
    assert shrunk([made], larger) == []


def test_an_example_that_is_not_as_long_as_stored_ends_the_run(prepared, processors, monkeypatch):
    plain = PlannedBuilder._useful

    def longer(self, draws, window):
        chosen, table, replaced = plain(self, draws, window)
        return chosen, [found + np.array([1, 0, 0, 0]) for found in table], replaced

    monkeypatch.setattr(PlannedBuilder, "_useful", longer)
    with pytest.raises(PackingError, match=r"example \d+ has \d+ tokens .* stored are .*: build the data again"):
        dataset(prepared, processors, "bridge")[0]


@pytest.mark.parametrize("stage", STAGES)
def test_a_process_reads_only_what_its_rows_hold(prepared, processors, stage, monkeypatch):
    whole = dataset(prepared, processors, stage)[1]
    read = []
    plain = PreparedSource.record

    def spy(self, index, rng=None):
        read.append(index)
        return plain(self, index, rng)

    monkeypatch.setattr(PreparedSource, "record", spy)
    parts, seen = [], []
    for index in (0, 1):
        read.clear()
        parts.append(dataset(prepared, processors, stage, share=RowShare((index,), 2))[1])
        seen.append(set(read))
    assert len(seen[0] | seen[1]) == 6 and (stage == "contrastive" or not seen[0] & seen[1])
    for key, value in whole.items():
        if key in ("example", "target_key", "image_key", "stats"):
            np.testing.assert_array_equal(parts[0][key], value)
        else:
            np.testing.assert_array_equal(np.concatenate([part[key] for part in parts]), value, err_msg=key)


WINDOW = dataclasses.replace(ROWS, window=3, batch_size=5, shapes=((4, 64, 192), (6, 64, 192)))


def test_a_window_is_an_exact_cover_of_its_records(prepared, processors, monkeypatch):
    config = dataclasses.replace(STAGES["bridge"], rows=WINDOW)
    read = []
    plain = PlannedBuilder._read

    def spy(self, *given):
        found = plain(self, *given)
        read.append(len(found))
        return found

    monkeypatch.setattr(PlannedBuilder, "_read", spy)
    batches = dataset(prepared, processors, "bridge", config, steps=6)
    rows = [batches[step] for step in range(6)]
    for window in (rows[:3], rows[3:]):
        assert len({batch["tokens"].shape for batch in window}) == 1
        documents = [int((batch["pool"] >= 0).sum()) for batch in window]
        assert sum(documents) == 15
        assert documents == [batch["stats"][STATS.index("examples_used")] for batch in window]
    assert sum(read) == 30
    used = [batch["stats"][STATS.index("rows_used")] for batch in rows[:3]]
    assert max(used) - min(used) <= 1
    again = dataset(prepared, processors, "bridge", config, steps=6)
    for step in (5, 0, 4):  # in any order: a window is a function of its number
        assert_same(again[step], rows[step])


@pytest.mark.parametrize("most", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_workers_hosts_and_resuming_change_nothing(prepared, processors, monkeypatch, most):
    """0 and 2 workers, and in the slow form 0, 1, 2 and 4 on both hosts: a worker takes seconds to start."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    config = dataclasses.replace(STAGES["warmup"], rows=WINDOW)
    for host in (0, 1):
        whole = dataset(prepared, processors, "warmup", config, share=RowShare((host,), 2))
        for workers in (0, 1, 2, 4) if most == 4 else (0, 2 * host):
            iterator = iter(built_ahead(whole[3:], threads=1, workers=workers))  # as a run that continues
            for step in range(3, 8):
                assert_same(next(iterator), whole[step])
            iterator.close()


def test_a_window_needs_stored_lengths(prepared, processors, noise):
    config = dataclasses.replace(STAGES["bridge"], rows=WINDOW)
    with pytest.raises(PackingError, match=r"'long'.* have no stored lengths for these settings: build them"):
        dataset(prepared, {"2": processors["2.5"]}, "bridge", config)
    with pytest.raises(ValueError, match="a batch of stage 3 is planned alone"):
        BatchConfig("contrastive", WINDOW)
