"""The page of an evaluation on sets: everything is there, of one run and of two; nothing is fetched."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from cocoa_jax import cli, embedder
from cocoa_jax.evaluation.distinct import content_digest
from cocoa_jax.evaluation.set_page import read_runs, write_set_report
from cocoa_jax.evaluation.sets import MMEB, evaluate_sets, named_sets

VOID = {"meta", "img", "br"}


class Tags(HTMLParser):
    """Every tag with its attributes; fails on one that is closed in another's place."""

    def __init__(self, text: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def of(self, kind: str) -> list[dict[str, str]]:
        return [found for _, found in self.found if kind in found.get("class", "").split()]


@pytest.fixture(scope="module")
def runs(trained, mmeb_eval_root, tmp_path_factory):
    """Two evaluations with random embeddings by content, of different seeds; the second of two sets alone."""
    folder = tmp_path_factory.mktemp("runs")
    for seed, names in ((0, ["VOC2007", "MSCOCO_t2i", "GQA"]), (1, ["VOC2007", "GQA"])):

        def embed(self, contents, progress=False, tick=None, seed=seed):
            keys = [int(content_digest(contents[i]), 16) % 2**31 for i in range(len(contents))]
            rows = np.stack([np.random.default_rng((seed, key)).normal(size=8) for key in keys])
            return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(embedder.Embedder, "embed_contents", embed)
            evaluate_sets(trained, folder / f"run{seed}", named_sets(MMEB, str(mmeb_eval_root), names))
    return folder


def test_the_page_of_one_run(runs, tmp_path):
    found = read_runs([runs / "run0"])
    text = write_set_report(tmp_path / "page.html", found).read_text()
    tags, results = Tags(text), found["run0"]["sets"]
    assert {attributes["id"] for tag, attributes in tags.found if tag == "section"} == {
        "scores", "published", "cosines", "retrievals", "made",
    }  # fmt: skip
    widths = [bar["style"] for bar in tags.of("swatch") if "style" in bar]
    order = ["VOC2007", "GQA", "MSCOCO_t2i"]  # by meta-task
    assert widths == [f"width:{100 * results[name]['p_at_1']:.2f}%" for name in order]
    assert len(tags.of("histogram")) == 3 and len(tags.of("set")) == 3
    entries = sum(len(result["gallery"]) for result in results.values())
    assert len(tags.of("query")) == entries > 5
    right = sum(hit["right"] for result in results.values() for entry in result["gallery"] for hit in entry["hits"])
    assert len([1 for item in tags.of("right") if not item["class"].startswith("bin")]) - 3 == right  # 3 histograms
    assert "64.9" in text and "CoCoA 7B is below MoCa 7B" in text


def test_the_page_loads_nothing(runs, tmp_path):
    text = write_set_report(tmp_path / "page.html", read_runs([runs / "run0"])).read_text()
    tags = Tags(text)
    assert not any(tag in {"script", "link", "iframe", "object"} for tag, _ in tags.found)
    assert all(found["src"].startswith("data:image/") for _, found in tags.found if "src" in found)
    assert not re.search(r"@import|url\(|https?://", text)


def test_runs_stand_side_by_side_by_the_command(runs, tmp_path, capsys):
    page = tmp_path / "both.html"
    cli.main(["report", "--evaluations", f"{runs / 'run0'},{runs / 'run1'}", "--output", str(page)])
    assert str(page) in capsys.readouterr().out
    tags = Tags(page.read_text())
    assert len([bar for bar in tags.of("swatch") if "style" in bar]) == 5  # the second run has no MSCOCO_t2i
    assert len(tags.of("histogram")) == 5
    names = [found for found in tags.of("ours")]
    assert len(names) == 2


@pytest.mark.parametrize("arguments", [[], ["--run", "a", "--evaluations", "b"]])
def test_a_report_is_of_one_kind(arguments, capsys):
    with pytest.raises(SystemExit):
        cli.main(["report", *arguments])
    assert "either --run or --evaluations" in capsys.readouterr().err


def test_a_folder_without_results_is_named(tmp_path, runs):
    with pytest.raises(ValueError, match="nowhere holds no results of sets"):
        read_runs([tmp_path / "nowhere"])
    (tmp_path / "results.json").write_text(json.dumps({"tasks": {}}))
    with pytest.raises(ValueError, match="holds no results of sets"):
        read_runs([tmp_path])
