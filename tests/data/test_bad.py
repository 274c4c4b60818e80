"""Bad records: skipped by a rule that every host and worker follows, counted, named, or the end of the run."""

import dataclasses
import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from cocoa_jax.data.bad import Bad, BadConfig, KnownBad, Ledger, TooManyBad
from cocoa_jax.data.intake import check
from cocoa_jax.data.packing import RowShare
from cocoa_jax.data.pipeline import STATS, BatchConfig, MaskingConfig, RowsConfig, stage_batches, stage_dataset
from cocoa_jax.data.pixels import ImageError
from cocoa_jax.data.sources import Content, Image, Record, RecordError

ROWS = RowsConfig(batch_size=6, shapes=((4, 48, 64), (8, 48, 64)), examples_per_row=2, masked_per_row=24)
SKIP = BadConfig("skip", ceiling=1.0)
CONFIG = BatchConfig("bridge", ROWS, masking=MaskingConfig(0.5, 0.5), bad=SKIP)
UNREADABLE, UNDECODABLE = {3, 7}, {1, 11}


def drawn(source: str, index: int, reason: str) -> Bad:
    return Bad(source, index, reason, step=0, place=0)


@dataclasses.dataclass(frozen=True)
class Spoilt:
    """Records of a picture and its number, some of which cannot be read and some not decoded."""

    name: str
    pictures: tuple[Image, ...]

    def __len__(self) -> int:
        return len(self.pictures)

    def record(self, index: int, rng: np.random.Generator) -> Record:
        if index in UNREADABLE:
            raise RecordError(f"{self.name} {index}: missing")
        picture = self.pictures[index]
        if index in UNDECODABLE:
            picture = dataclasses.replace(picture, data=b"no picture")
        return Record(f"{index}", self.name, Content("", (picture,)), Content(f"number {index}"), f"{index}")


@pytest.fixture(scope="module")
def spoilt(noise):
    return {"some": Spoilt("some", tuple(noise(28, 28, i) for i in range(14)))}


def batches(spoilt, processors, **more):
    options = {"seed": 2, "steps": 5, "config": CONFIG} | more
    return stage_dataset(options.pop("config"), spoilt, {"some": 1.0}, processors["2"], **options)


def same(left, right) -> None:
    for key in left.keys() | right.keys():
        np.testing.assert_array_equal(left[key], right[key], err_msg=key)


def test_others_take_the_places_of_bad_records_and_all_are_named(spoilt, processors, tmp_path):
    report = tmp_path / "bad.jsonl"
    made = list(batches(spoilt, processors, report=report))
    for batch in made:
        assert len(batch["example"]) == 6 and (batch["example"] >= 0).all()
        assert (batch["pool"] >= 0).sum() == 6
    assert sum(int(batch["stats"][STATS.index("bad_records")]) for batch in made) >= 4
    lines = [json.loads(line) for line in report.read_text().splitlines()]
    assert {line["index"] for line in lines} == UNREADABLE | UNDECODABLE and len(lines) == 4
    assert all(line["reason"].startswith(f"some {line['index']}: ") and line["source"] == "some" for line in lines)
    # A batch is a function of seed and step: another order of building gives the same.
    again = batches(spoilt, processors)
    for step in (3, 0, 4):
        same(again[step], made[step])


def test_threads_and_workers_skip_the_same(spoilt, processors):
    whole = list(batches(spoilt, processors))
    threaded = stage_batches(CONFIG, spoilt, {"some": 1.0}, processors["2"], seed=2, steps=5, threads=3)
    for left, right in zip(threaded, whole, strict=True):
        same(left, right)
    assert pickle.loads(pickle.dumps(Ledger(SKIP, None))).__reduce__() == Ledger(SKIP, None).__reduce__()


@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_skip_the_same_and_name_each_record_once(spoilt, processors, tmp_path, monkeypatch, workers):
    monkeypatch.syspath_prepend(Path(__file__).parents[2])  # workers inherit it, and import this file for its source
    whole = list(batches(spoilt, processors, steps=8))
    report = tmp_path / "bad.jsonl"
    made = stage_batches(
        CONFIG, spoilt, {"some": 1.0}, processors["2"], seed=2, steps=8, threads=0, workers=workers, report=report
    )
    for left, right in zip(made, whole, strict=True):
        same(left, right)
    drawn = [int(batch["stats"][STATS.index("bad_records")]) for batch in whole]
    assert sum(drawn[0::2]) >= 4 and sum(drawn[1::2]) >= 4, "both workers meet bad records, the same ones too"
    named = [json.loads(line)["index"] for line in report.read_text().splitlines()]
    assert sorted(named) == sorted(UNREADABLE | UNDECODABLE)


def test_a_ledger_repeats_nothing_that_its_file_has(tmp_path):
    path = tmp_path / "bad.jsonl"
    first, second = Ledger(SKIP, path), Ledger(SKIP, path)
    first.note(8, [drawn("s", 1, "one")])
    second.note(8, [drawn("s", 1, "one"), drawn("s", 2, "two")])
    first.note(8, [drawn("s", 2, "two"), drawn("t", 2, "another source")])
    with path.open("a") as file:
        file.write("[7]\n{no line of ours}\n")
    Ledger(SKIP, path).note(8, [drawn("t", 2, "another source"), drawn("s", 3, "three")])
    named = [json.loads(line) for line in path.read_text().splitlines() if '"reason"' in line]
    assert [(bad["source"], bad["index"]) for bad in named] == [("s", 1), ("s", 2), ("t", 2), ("s", 3)]
    with path.open("a") as file:
        file.write('{"source": "s", "index": 4, "rea')
    first.note(8, [drawn("s", 4, "four")])
    assert json.loads(path.read_text().splitlines()[-1])["reason"] == "four"
    Ledger(SKIP, path).note(8, [drawn("s", 4, "four"), drawn("s", 5, "five")])
    last = [json.loads(line) for line in path.read_text().splitlines()[-2:]]
    assert [bad["index"] for bad in last] == [4, 5], "a line that was cut short swallows none"


def test_hosts_agree_on_a_picture_that_one_of_them_alone_decodes(spoilt, processors):
    whole = batches(spoilt, processors)
    halves = [batches(spoilt, processors, share=RowShare((i,), 2)) for i in (0, 1)]
    for step in range(5):
        parts = [half[step] for half in halves]
        np.testing.assert_array_equal(np.concatenate([part["tokens"] for part in parts]), whole[step]["tokens"])
        np.testing.assert_array_equal(np.concatenate([part["patches"] for part in parts]), whole[step]["patches"])


def test_every_host_counts_what_was_drawn_once(spoilt, processors, monkeypatch):
    """One host alone finds out by decoding, and builds such a batch anew; whatever is drawn in a place counts too."""
    noted = []
    monkeypatch.setattr(Ledger, "note", lambda self, drawn, found: noted.append((drawn, len(found))))
    alone, half = batches(spoilt, processors), batches(spoilt, processors, share=RowShare((1,), 2))
    counts = [int(alone[step]["stats"][STATS.index("bad_records")]) for step in range(5)]
    assert sum(counts) >= 4 and noted == [(6 + bad, bad) for bad in counts]
    noted.clear()
    assert all(half[step] for step in range(5))
    assert noted == [(6 + bad, bad) for bad in counts]


def test_what_a_check_found_is_skipped_unread(spoilt, processors, tmp_path, monkeypatch):
    found = list(check(CONFIG, spoilt, processors["2"], seed=0, threads=2))
    assert [index for _, index, _ in found] == list(range(14))
    reasons = {index: reason for _, index, reason in found if reason}
    assert reasons.keys() == UNREADABLE | UNDECODABLE and "cannot be decoded" in reasons[1]
    KnownBad("abc", 0, {"some": 14}, {"some": reasons}).save(tmp_path / "bad.json")
    known = KnownBad.load(tmp_path / "bad.json", "abc", 0, ceiling=0.5)
    assert known.reasons == {"some": reasons}
    whole = list(batches(spoilt, processors))
    for part in (0, 1):  # with a check hosts need not look at each other's pictures, and still agree
        half = batches(spoilt, processors, known=known, share=RowShare((part,), 2))
        for step in range(5):
            rows = whole[step]["tokens"]
            np.testing.assert_array_equal(half[step]["tokens"], np.split(rows, 2)[part])
    stop, plain, read = dataclasses.replace(CONFIG, bad=BadConfig("stop", ceiling=0.5)), Spoilt.record, []
    monkeypatch.setattr(Spoilt, "record", lambda self, index, rng: read.append(index) or plain(self, index, rng))
    for config in (CONFIG, stop):
        made = batches(spoilt, processors, config=config, known=known)
        for step in range(5):
            same(made[step], whole[step])
    assert read and not set(read) & (UNREADABLE | UNDECODABLE)
    unlisted = dataclasses.replace(known, reasons={"some": {index: "listed" for index in UNREADABLE}})
    with pytest.raises(ImageError, match="cannot be decoded"):
        list(batches(spoilt, processors, config=stop, known=unlisted))
    with pytest.raises(ValueError, match="about data abc, this is xyz"):
        KnownBad.load(tmp_path / "bad.json", "xyz", 0, ceiling=0.5)
    with pytest.raises(TooManyBad, match="4 of 14 records"):
        KnownBad.load(tmp_path / "bad.json", "abc", 0, ceiling=0.2)
    with pytest.raises(ValueError, match="no list of bad records"):
        KnownBad.load(tmp_path / "other.json", "abc", 0, ceiling=0.2)


@pytest.mark.parametrize(("bad", "error"), [(UNREADABLE, RecordError), (UNDECODABLE, ImageError)])
def test_stop_is_the_default_and_names_the_record(spoilt, processors, monkeypatch, bad, error):
    other = UNREADABLE | UNDECODABLE if bad is UNDECODABLE else set()
    monkeypatch.setattr(f"{__name__}.UNREADABLE", UNREADABLE - other)
    monkeypatch.setattr(f"{__name__}.UNDECODABLE", UNDECODABLE if bad is UNDECODABLE else set())
    config = dataclasses.replace(CONFIG, bad=BadConfig())
    with pytest.raises(error, match=r"missing|cannot be decoded"):
        list(batches(spoilt, processors, config=config))


def test_a_failing_disk_is_no_bad_record(spoilt, processors, monkeypatch):
    def broken(self, index, rng):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Spoilt, "record", broken)
    with pytest.raises(OSError, match="Input/output"):
        batches(spoilt, processors)[0]


def test_a_source_of_bad_records_alone_ends(spoilt, processors, monkeypatch):
    monkeypatch.setattr(f"{__name__}.UNREADABLE", set(range(14)))
    noted = []
    monkeypatch.setattr(Ledger, "note", lambda self, drawn, found: noted.append((drawn, len(found))))
    with pytest.raises(RecordError, match="some: 64 records in a row cannot be used, the last: some "):
        batches(spoilt, processors)[0]
    assert noted == [(64, 64)]


def test_the_ceiling_is_a_share_of_a_thousand_records_at_least():
    ledger = Ledger(BadConfig("skip", ceiling=0.002), None)
    ledger.note(8, [drawn("s", 1, "one")])
    ledger.note(8, [drawn("s", 2, "two")])
    with pytest.raises(TooManyBad, match=r"3 of 24 records .* 0\.002; the last: three"):
        ledger.note(8, [drawn("s", 3, "three")])
    with pytest.raises(TooManyBad):
        Ledger(BadConfig("skip", ceiling=0.0), None).note(8, [drawn("s", 1, "one")])
    Ledger(BadConfig("stop", ceiling=0.0), None).note(8, [drawn("s", 1, "of the list, whose ceiling was its own")])
    wide = Ledger(BadConfig("skip", ceiling=0.002), None)
    wide.note(5000, [drawn("s", i, "many") for i in range(10)])
    with pytest.raises(ValueError, match="it is a share"):
        BadConfig(ceiling=2.0)
