"""MMEB's sets from parquet to table: what is embedded once, what survives a kill, what is refused, what is written."""

import dataclasses
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cocoa_jax import cli, embedder
from cocoa_jax.checkpoints.convert import hf_to_orbax
from cocoa_jax.config import SettingsError, to_dict
from cocoa_jax.data.processor_settings import ProcessorConfig
from cocoa_jax.data.readers.ranked import open_ranked
from cocoa_jax.embedder import Embedder, default_settings
from cocoa_jax.evaluation import sets as sets_module
from cocoa_jax.evaluation.distinct import content_digest, distinct
from cocoa_jax.evaluation.prompts_used import trained_prompts
from cocoa_jax.evaluation.row_store import RowStore
from cocoa_jax.evaluation.scorer import EmbeddingError
from cocoa_jax.evaluation.sets import MMEB, evaluate_sets, named_sets

WANTED = ["VOC2007", "MSCOCO_t2i", "GQA"]


@pytest.fixture
def sets(mmeb_eval_root):
    return named_sets(MMEB, str(mmeb_eval_root), WANTED)


@pytest.fixture
def embedded(monkeypatch) -> list[str]:
    """Embeddings by content alone, without a model; gives the digests of all that was embedded, in order."""
    seen: list[str] = []

    def embed(self, contents, progress=False, tick=None):
        digests = [content_digest(contents[i]) for i in range(len(contents))]
        seen.extend(digests)
        rows = np.stack([np.random.default_rng(int(d, 16) % 2**32).normal(size=32) for d in digests])
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)

    monkeypatch.setattr(embedder.Embedder, "embed_contents", embed)
    return seen


def numpy_scores(one, embed) -> dict[str, float]:
    """One query and one stored candidate at a time, by the rules as the paper and the issue of ties state them."""
    first, published, five, places = [], [], [], []
    for q, listed in enumerate(one.lists):
        query = embed(one.queries[q])
        shown = {}
        for candidate in listed:  # a dict keeps one of equal contents
            content = one.candidates[candidate]
            shown.setdefault(content_digest(content), float(embed(content) @ query))
        scores = list(shown.values())
        ahead = sum(score >= scores[0] - 1e-7 for score in scores[1:])
        first.append(ahead == 0)
        five.append(ahead < 5)
        places.append(1 / (1 + ahead))
        published.append(int(np.argmax(np.float32([float(embed(one.candidates[c]) @ query) for c in listed]))) == 0)
    return {"p_at_1": np.mean(first), "argmax_p_at_1": np.mean(published), "hit_at_5": np.mean(five),
            "mrr": np.mean(places)}  # fmt: skip


def test_scores_are_those_of_a_loop_over_stored_candidates(trained, sets, tmp_path):
    results = evaluate_sets(trained, tmp_path, sets)
    opened = {name: open_ranked(name, config, root) for name, (config, root) in sets.items()}
    known = {content_digest(c): c for one in opened.values() for side in (one.queries, one.candidates) for c in side}
    rows = dict(zip(known, Embedder.load(trained).embed_contents(list(known.values())), strict=True))
    for name, one in opened.items():
        expected = numpy_scores(one, lambda content: rows[content_digest(content)].astype(float))
        for key, value in expected.items():
            assert results["sets"][name][key] == pytest.approx(value, abs=1e-12), (name, key)


def test_each_distinct_content_is_embedded_once_over_all_sets(trained, sets, embedded, tmp_path):
    results = evaluate_sets(trained, tmp_path, sets)
    assert len(embedded) == len(set(embedded))
    # 6 pictures to classify and 4 names; 4 captions and 4 pictures under another instruction; 3 questions.
    assert len(embedded) == 6 + 4 + 4 + 4 + 3
    scene = results["sets"]["MSCOCO_t2i"]
    assert scene["candidates"] == 4 and scene["candidates_of_a_query"] == [3, 3]
    assert (scene["repeated_candidates"], scene["repeated_right_candidates"]) == (4, 4)
    assert results["sets"]["VOC2007"]["repeated_right_candidates"] == 1


def test_a_killed_evaluation_goes_on_with_the_set_it_was_at(trained, mmeb_eval_root, sets, tmp_path, monkeypatch):
    command = [sys.executable, str(Path(__file__).with_name("killed_evaluation.py"))]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    ended = subprocess.run(
        [*command, str(trained), str(mmeb_eval_root), str(tmp_path / "killed"), "GQA"],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert sorted(path.name for path in (tmp_path / "killed" / "sets").glob("*.json")) == ["VOC2007.json"]
    whole = evaluate_sets(trained, tmp_path / "whole", sets)
    calls: list[int] = []
    embed = embedder.Embedder.embed_contents
    monkeypatch.setattr(
        embedder.Embedder, "embed_contents",
        lambda self, contents, **more: calls.append(len(contents)) or embed(self, contents, **more),
    )  # fmt: skip
    continued = evaluate_sets(trained, tmp_path / "killed", sets)
    assert calls == [8]  # captions and pictures of the third set; the second was embedded before the kill
    for name in WANTED:
        mine, other = ({k: v for k, v in r["sets"][name].items() if k not in ("seconds", "gallery")}
                       for r in (continued, whole))  # fmt: skip
        assert mine == other
    calls.clear()
    assert evaluate_sets(trained, tmp_path / "killed", sets)["sets"] == continued["sets"] and not calls


def test_other_settings_are_another_evaluation_and_are_said(trained, sets, embedded, tmp_path):
    evaluate_sets(trained, tmp_path, sets)
    count = len(embedded)
    settings = default_settings(trained)
    smaller = dataclasses.replace(settings, processor=ProcessorConfig(784, 784, 16))
    results = evaluate_sets(trained, tmp_path, sets, smaller)
    assert len(embedded) == 2 * count
    assert results["config"]["read_otherwise"] == ["processor.max_pixels: 784, 6272"]
    assert "read otherwise than trained (processor.max_pixels: 784, 6272)" in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("config.json", lambda values: values.update(rope_theta=500.0)),
        ("preprocessor_config.json", lambda values: values.update(image_mean=[0.5, 0.5, 0.5])),
        ("tokenizer.json", lambda values: values["model"]["merges"].pop()),
    ],
)
def test_another_file_beside_the_same_weights_is_another_model(backbone, sets, embedded, tmp_path, file, change):
    folder = Path(shutil.copytree(backbone, tmp_path / "model"))
    evaluate_sets(folder, tmp_path / "out", sets)
    count = len(embedded)
    again = evaluate_sets(shutil.copytree(backbone, tmp_path / "moved"), tmp_path / "out", sets)
    assert len(embedded) == count  # the same files in another place
    values = json.loads((folder / file).read_text())
    change(values)
    (folder / file).write_text(json.dumps(values))
    other = evaluate_sets(folder, tmp_path / "out", sets)
    assert len(embedded) == 2 * count
    assert all(other["config"][key] == again["config"][key] for key in ("weights", "settings"))


def test_embeddings_that_are_not_finite_are_refused_and_not_kept(trained, sets, monkeypatch, tmp_path):
    def broken(self, contents, progress=False, tick=None):
        return np.full((len(contents), 32), np.nan, np.float32)

    monkeypatch.setattr(embedder.Embedder, "embed_contents", broken)
    with pytest.raises(EmbeddingError, match="VOC2007: 10 of 10 embeddings are not finite"):
        evaluate_sets(trained, tmp_path, sets)
    assert not list(tmp_path.rglob("*.npz")) and not list(tmp_path.rglob("*.json"))


def test_the_results_name_everything_that_they_depend_on(trained, sets, embedded, tmp_path):
    results = evaluate_sets(trained, tmp_path, sets)
    written = json.loads((tmp_path / "sets" / "GQA.json").read_text())
    assert written == json.loads(json.dumps(results["sets"]["GQA"]))
    assert set(written["made_with"]) == {"weights", "reading", "instructions", "settings", "data"}
    assert len(written["code"]) == 12 and len(written["contents"]) == 16
    low, high = written["p_at_1_interval"]
    assert low <= written["p_at_1"] <= high
    assert sum(written["histograms"]["right"]) == written["queries"] == 3
    assert results["means"]["vqa"] == (written["p_at_1"], 1, 10) and results["means"]["grounding"] is None


def test_the_table_has_the_papers_layout_and_its_remarks(trained, sets, embedded, tmp_path):
    evaluate_sets(trained, tmp_path, sets)
    text = (tmp_path / "table.md").read_text()
    assert "| Model | Classification | VQA | Retrieval | Grounding | IND | OOD | All |" in text
    assert "| CoCoA Qwen2-VL 2B | 63.0 | 57.4 | 69.6 | 85.8 | 70.2 | 60.7 | 66.0 |" in text
    assert "(1 of 10) |" in text and "CoCoA 7B is below MoCa 7B" in text
    rows = [line for line in text.splitlines() if line.startswith("| GQA ")]
    assert len(rows) == 1 and rows[0].endswith("| 48.1 | 54.4 | 65.4 | 75.3 | 76.8 | 38.3 |")
    widths = {line.count("|") for line in text.split("## By data set")[1].splitlines() if line.startswith("|")}
    assert len(widths) == 1


def test_changed_data_are_scored_again(trained, own_sets, embedded, tmp_path):
    shutil.copytree(own_sets.parent, tmp_path / "own")
    file = tmp_path / "own" / "sets.yaml"
    first = evaluate_sets(trained, tmp_path / "out", named_sets(str(file), None))
    with (file.parent / "fruit" / "corpus.jsonl").open("a") as lines:
        lines.write('{"_id": "d4", "text": "a hill"}\n')
    count = len(embedded)
    again = evaluate_sets(trained, tmp_path / "out", named_sets(str(file), None))
    assert len(embedded) == count + 1  # the new document alone
    assert again["sets"]["fruit"]["candidates"] == first["sets"]["fruit"]["candidates"] + 1
    assert again["sets"]["things"] == first["sets"]["things"]


def test_a_replaced_picture_is_scored_again(trained, own_sets, make_picture, embedded, tmp_path):
    file = shutil.copytree(own_sets.parent, tmp_path / "own") / "sets.yaml"
    evaluate_sets(trained, tmp_path / "out", named_sets(str(file), None))
    count = len(embedded)
    (file.parent / "things" / "hill" / "0.png").write_bytes(make_picture(99))
    evaluate_sets(trained, tmp_path / "out", named_sets(str(file), None))
    assert len(embedded) == count + 1


def test_the_bar_moves_while_contents_are_read(trained, own_sets, monkeypatch, tmp_path):
    """Every stored content moves it once when it is read, every new one once more when it is embedded."""
    bars = []

    class Bar(sets_module.tqdm):
        def __init__(self, **options):
            super().__init__(**{**options, "disable": False, "file": io.StringIO()})
            bars.append(self)

    monkeypatch.setattr(sets_module, "tqdm", Bar)
    evaluate_sets(trained, tmp_path, named_sets(str(own_sets), None))
    fruit, things = 2 + 4, 4 + 2
    assert bars[0].n == bars[0].total == fruit + things + (fruit - 1) + things  # one document is stored twice


def test_the_table_says_how_it_was_read_and_prompted(trained, backbone, sets, embedded, tmp_path):
    """A folder that was not trained here has limits that are no checkpoint's own; a stage knows its instructions."""
    stage = shutil.copytree(trained, tmp_path / "stage")
    mixture = {name: {"settings": {"subset": "", "format": "mmeb-train", "split": "", "instruction": own}}
               for name, own in (("VOC2007", ""), ("MSCOCO_t2i", "Find:"))}  # fmt: skip
    (stage / "mixture.json").write_text(json.dumps({"stage": "contrastive", "datasets": mixture}))
    evaluate_sets(stage, tmp_path / "a", sets)
    told = (tmp_path / "a" / "table.md").read_text()
    assert "; read as in training." in told
    limits = "at least 784 and at most 6,272 pixels, texts of up to 16 tokens, bidirectional attention, pooling bridge."
    assert f": pictures of {limits}" in told
    assert (
        "instructions of MMEB-eval: those of training in 1 sets, others in 1 (MSCOCO_t2i: 'Find me an everyday image "
        "that matches the given caption:', trained 'Find:'); training tells none for 1."
    ) in told
    hf_to_orbax(backbone, tmp_path / "converted")
    evaluate_sets(tmp_path / "converted", tmp_path / "c", sets)
    assert "; not trained here." in (tmp_path / "c" / "table.md").read_text()
    evaluate_sets(backbone, tmp_path / "b", sets)
    told = (tmp_path / "b" / "table.md").read_text()
    assert "; not trained here." in told
    limits = "at least as many as the checkpoint says and at most 200,704 pixels, texts of up to 248 tokens"
    assert f": pictures of {limits}, bidirectional attention" in told
    assert "those of training in 0 sets, others in 0; training tells none for 3." in told


def test_a_stage_of_the_embedded_pictures_tells_no_instructions(tmp_path):
    pictures = {"stage": "contrastive", "pictures": {"version": "1.0.0", "split": "train", "kinds": {"caption": 1.0}}}
    (tmp_path / "mixture.json").write_text(json.dumps(pictures))
    assert trained_prompts(tmp_path) == {}


@pytest.mark.parametrize("name", ["a/b", "/a", "a/"])
def test_a_set_whose_name_is_no_file_name_is_refused(tmp_path, name):
    (tmp_path / "sets.yaml").write_text(json.dumps({"sets": {name: {"format": "classes", "path": "x"}}}))
    with pytest.raises(SettingsError, match="names become names of files"):
        named_sets(str(tmp_path / "sets.yaml"), None)


@pytest.mark.parametrize("option", [("--splits", "validation"), ("--untrained", "x")])
def test_options_of_the_pictures_are_refused_for_other_sets(call, own_sets, tmp_path, option):
    status, _, told = call("evaluate", "--checkpoint", "x", "--output", tmp_path, "--tasks", own_sets, *option)
    assert status == 1 and "--splits and --untrained are for the embedded pictures alone" in told


def test_sets_of_ones_own_by_the_command(trained, own_sets, embedded, tmp_path, capsys):
    command = ["evaluate", "--checkpoint", trained, "--output", tmp_path / "out", "--tasks", own_sets]
    cli.main([str(part) for part in command])
    said = capsys.readouterr().out
    assert "| things | Classification | IND |" in said and "report: " in said
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<html" in page and "fruit" in page and 'id="published"' not in page


def test_a_duplicate_of_a_document_is_right_where_the_document_is(own_sets):
    config, root = named_sets(str(own_sets), None)["fruit"]
    found = distinct(open_ranked("fruit", config, root))
    assert len(found.candidates) == 3 and found.repeated == 1 and found.right[0] == frozenset({0})


@pytest.mark.parametrize("copied", [False, True])
def test_queries_that_are_documents_do_not_find_themselves(trained, embedded, tmp_path, copied):
    """As in ArguAna; a copy of the document under another id stays, and is what is found."""
    (tmp_path / "own" / "qrels").mkdir(parents=True)
    documents = [{"_id": f"d{i}", "text": text} for i, text in enumerate(["a hill", "a boat"])]
    queries = [dict(document) for document in documents]
    documents += [{"_id": "d2", "text": "a hill"}] * copied
    for name, lines in (("corpus", documents), ("queries", queries)):
        (tmp_path / "own" / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "own" / "qrels" / "test.tsv").write_text("d0\td1\t1\nd1\td0\t1\n")
    (tmp_path / "sets.yaml").write_text("sets: {own: {format: beir, path: own}}")
    result = evaluate_sets(trained, tmp_path / "out", named_sets(str(tmp_path / "sets.yaml"), None))["sets"]["own"]
    assert result["p_at_1"] == (0.5 if copied else 1.0)
    assert result["candidates"] == 2 and result["candidates_of_a_query"] == [1, 2 if copied else 1]
    assert sorted(len(entry["hits"]) for entry in result["gallery"]) == [1, 2 if copied else 1]


@pytest.mark.parametrize(
    ("tasks", "data", "wanted", "words"),
    [
        (MMEB, None, [], "give --data"),
        (MMEB, "root", ["GQA", "QGA"], r"\['QGA'\] are not in mmeb-v1"),
        (MMEB, "root", [], r"33 of 36 sets are not in"),
        ("nowhere.yaml", None, [], "nowhere.yaml cannot be read"),
    ],
)
def test_what_cannot_be_scored_is_named(mmeb_eval_root, tasks, data, wanted, words):
    with pytest.raises(SettingsError, match=words):
        named_sets(tasks, str(mmeb_eval_root) if data else None, wanted)


def test_rows_are_kept_by_content_and_for_the_same_weights_only(tmp_path):
    rows = np.arange(12, dtype=np.float32).reshape(3, 4)
    store = RowStore(tmp_path, {"weights": "a"}, "v1")
    digests = [f"{i:032x}" for i in range(3)]
    store.save(store.path_of("one", digests[:2]), digests[:2], rows[:2])
    store.save(store.path_of("two", digests[2:]), digests[2:], rows[2:])
    again = RowStore(tmp_path, {"weights": "a"}, "v2")
    assert again.missing([*digests, "f" * 32]) == [3]
    np.testing.assert_array_equal(again.known([digests[2], digests[0], digests[2], digests[1]]), rows[[2, 0, 2, 1]])
    assert RowStore(tmp_path, {"weights": "b"}, "v1").missing(digests) == [0, 1, 2]
    torn = next(tmp_path.glob("two*"))
    torn.write_bytes(torn.read_bytes()[:100])
    assert RowStore(tmp_path, {"weights": "a"}, "v1").missing(digests) == [2]


def test_a_set_says_which_code_embedded_it(trained, sets, embedded, monkeypatch, tmp_path):
    """What is embedded before an upgrade is not embedded again after it."""
    monkeypatch.setattr(sets_module, "code_version", lambda: "before")
    evaluate_sets(trained, tmp_path, {"GQA": sets["GQA"]})
    older = next((tmp_path / "embeddings").glob("*.npz"))
    with np.load(older) as file:
        np.savez(older.with_name("older.npz"), **{name: file[name] for name in file.files if name != "code"})
    shutil.rmtree(tmp_path / "sets")
    monkeypatch.setattr(sets_module, "code_version", lambda: "after")
    found = evaluate_sets(trained, tmp_path, sets)["sets"]
    told = {name: (one["code"], one["embedded_by"]) for name, one in found.items()}
    assert told["GQA"] == ("after", ["before"]) and told["MSCOCO_t2i"] == ("after", ["after"])
    assert "code after, before; read as in training" in (tmp_path / "table.md").read_text()
    older.unlink()
    shutil.rmtree(tmp_path / "sets")
    assert evaluate_sets(trained, tmp_path, {"GQA": sets["GQA"]})["sets"]["GQA"]["embedded_by"] == ["unknown"]


def test_settings_come_from_a_file(trained, own_sets, embedded, tmp_path):
    import yaml

    settings = to_dict(default_settings(trained))
    settings["processor"]["max_text_tokens"] = 5
    (tmp_path / "read.yaml").write_text(yaml.safe_dump(settings))
    command = ["evaluate", "--checkpoint", trained, "--output", tmp_path / "out", "--tasks", own_sets]
    cli.main([str(part) for part in [*command, "--sets", "fruit", "--settings", tmp_path / "read.yaml"]])
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results["sets"]) == ["fruit"]
    assert results["config"]["read_otherwise"] == ["processor.max_text_tokens: 5, 16"]
