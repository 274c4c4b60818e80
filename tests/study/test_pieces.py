"""Pieces on disk: they come back as they were, hits included, and what is claimed is one process's until it ends."""

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cocoa_jax.study.pieces import TaskHits, claimed, read_result, read_results, write_result


@given(hits=st.lists(st.booleans(), min_size=1, max_size=40))
def test_hits_come_back(hits):
    task = TaskHits("vqa", "test_seen", 9, 0.1, np.array(hits))
    written = json.loads(json.dumps(task.to_json()))
    back = TaskHits.from_json(written)
    assert back.hits.tolist() == hits and (back.meta_task, back.split, back.candidates) == ("vqa", "test_seen", 9)
    assert written["p_at_1"] == pytest.approx(np.mean(hits)) and written["queries"] == len(hits)


def test_a_piece_comes_back(tmp_path, made):
    piece = made("cocoa", 1, 2e-3, 0.5)
    write_result(tmp_path, "cocoa-1", piece)
    back = read_results(tmp_path)["cocoa-1"]
    assert (back.arm, back.seed, back.rate, back.stages, back.flops) == ("cocoa", 1, 2e-3, piece.stages, 2e12)
    assert all((back.tasks[name].hits == task.hits).all() for name, task in piece.tasks.items())
    assert not list(tmp_path.rglob("*.partial"))
    # A folder of nothing but pieces, as it is committed.
    assert read_results(tmp_path / "pieces").keys() == {"cocoa-1"}


def test_means_are_over_tasks_not_queries(made):
    piece = made("cocoa", 0, 1e-3, 0.5)
    rates = {name: task.hits.mean() for name, task in piece.tasks.items()}
    assert piece.mean() == pytest.approx(np.mean(list(rates.values())))
    assert piece.mean("test_seen") == pytest.approx(np.mean([r for name, r in rates.items() if "test_seen" in name]))
    assert piece.mean(meta_task="vqa") == pytest.approx(np.mean([r for name, r in rates.items() if "keyword" in name]))
    assert np.isnan(piece.mean("validation"))


def test_a_damaged_piece_is_named(tmp_path):
    (tmp_path / "torn.json").write_text('{"arm": "cocoa"')
    with pytest.raises(ValueError, match=r"torn\.json is no piece of a study .*remove it"):
        read_result(tmp_path / "torn.json")


def test_claims_are_exclusive_and_end_with_their_process(tmp_path):
    holder = "import sys, time; from pathlib import Path; from cocoa_jax.study.pieces import claimed\n"
    holder += "with claimed(Path(sys.argv[1]), ['a', 'b']) as ours: print(ours, flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", holder, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None and other.stdout.readline() == "True\n"
    with claimed(tmp_path, ["b", "c"]) as ours:
        assert not ours
    with claimed(tmp_path, ["c"]) as ours:
        assert ours
    other.kill()
    other.wait()
    other.stdout.close()
    with claimed(tmp_path, ["a", "b"]) as ours:
        assert ours
