"""The page of rows shows what the arrays hold; the check lists what is bad and the run then skips it."""

import json
import re

import numpy as np
import pytest

from cocoa_jax.attention.spans import Spans
from cocoa_jax.checkpoints.backbone import open_backbone
from cocoa_jax.config import SettingsError, TrainConfig, load_mixture, parse
from cocoa_jax.data.bad import BadConfig
from cocoa_jax.data.naming import open_named
from cocoa_jax.data.pipeline import stage_dataset
from cocoa_jax.data.prepare import BuildConfig, build
from cocoa_jax.data.processor import Processor
from cocoa_jax.data.sources import load_pictures
from cocoa_jax.evaluation.data_reports import check_data, inspect_data
from cocoa_jax.evaluation.inspection import read_rows
from cocoa_jax.training.inputs import known_bad, open_sources


@pytest.mark.parametrize("stage", ["warmup", "bridge", "contrastive"])
def test_pieces_are_the_tokens_of_the_rows(backbone, stage_settings, tmp_path, stage):
    config = parse(TrainConfig, stage_settings(stage, backbone, tmp_path / "page.html"))
    opened, origin = open_sources(config), open_backbone(config.checkpoint)
    processor = Processor.load(origin.side_files, origin.config, config.data.processor)
    batch = stage_dataset(config.batches(), opened.sources, opened.weights, processor, seed=config.seed, steps=1)[0]
    rows = read_rows(batch, processor, 100, bridge=stage == "bridge")
    used = np.flatnonzero((batch["token_end"] > 0).any(axis=1))
    assert len(rows) == len(used)
    asked = 0
    for place, row in zip(used, rows, strict=True):
        assert sum(d.tokens for d in row.documents) == (batch["token_end"][place] > 0).sum()
        assert sum(d.patches for d in row.documents) == (batch["patch_end"][place] > 0).sum()
        pieces = [piece for document in row.documents for piece in document.pieces]
        hidden = [piece for piece in pieces if piece.hidden]
        asked += len(hidden)
        true = batch["predict_id"][place] if "predict_id" in batch else np.zeros(0)
        assert [piece.text for piece in hidden] == [processor.text.decode([int(n)]) for n in true if n >= 0]
        assert stage != "bridge" or {piece.kind for piece in hidden} <= {"b"}
        assert sum(piece.kind == "eos" for piece in pieces) == (0 if stage == "warmup" else len(row.documents))
        units = batch["hidden_unit"][place].sum() if stage == "warmup" else 0
        assert sum(d.hidden_units for d in row.documents) == units
        assert sum(d.units for d in row.documents) == (batch["unit"][place] >= 0).sum()
        assert row.mask.any() and row.mask.shape == (len(row.kinds),) * 2
    assert (asked > 0) == (stage != "contrastive")
    whole = Spans(batch["token_start"], batch["token_end"]).as_mask(batch["tokens"].shape[1])
    assert rows[0].mask.sum() <= whole[used[0]].sum()
    inspect_data(config, step=0, rows=3)
    page = (tmp_path / "page.html").read_text()
    assert ("hidden part of a picture" in page) == (stage == "warmup")
    assert ("block B" in page) == (stage == "bridge") and ("where it is embedded" in page) == (stage == "contrastive")
    parts = re.findall(r'class="part (a|a new|b|eos)" style="flex-grow:(\d+)" title="\d+ tokens"', page)
    drawn = [document for row in read_rows(batch, processor, 3, bridge=stage == "bridge") for document in row.documents]
    assert sum(int(size) for _, size in parts) == sum(document.tokens for document in drawn)
    bridges = sum(int(size) for kind, size in parts if kind == "eos")
    assert bridges == (len(drawn) if stage == "bridge" else 0), "strips have the colours of the legend"
    assert page.count("<section") == 4 and page.count('class="matrix"') == 3
    assert not re.search(r"(?:src|href)=[\"'](?!data:)", page), "it loads nothing"


def test_a_picture_is_drawn_as_it_was(backbone, stage_settings, tmp_path):
    settings = stage_settings("bridge", backbone, tmp_path / "page.html")
    settings["data"]["mirror"] = False
    config = parse(TrainConfig, settings)
    opened, origin = open_sources(config), open_backbone(config.checkpoint)
    processor = Processor.load(origin.side_files, origin.config, config.data.processor)
    batch = stage_dataset(config.batches(), opened.sources, opened.weights, processor, seed=1, steps=1)[0]
    shown = [p for row in read_rows(batch, processor, 9, bridge=True) for d in row.documents for p in d.pictures]
    from cocoa_jax.data.pixels import decode

    pictures = [decode(picture.image) for picture in load_pictures("validation")]
    for picture in shown:
        same = (np.asarray(p.resize(picture.shape[1::-1], 3)) for p in pictures)
        # Bytes to normalised floats and back: at most one step of rounding.
        assert any(np.abs(picture.astype(int) - other).max() <= 1 for other in same)


def test_what_the_check_lists_is_skipped_by_the_run(backbone, stage_settings, tmp_path, encoded_pictures):
    settings = stage_settings("bridge", backbone, tmp_path / "bad.json")
    del settings["data"]["kinds"]
    settings["data"] |= {"mixture": str(encoded_pictures), "bad": {"action": "skip", "ceiling": 0.5}}
    config = parse(TrainConfig, settings)
    assert check_data(config) == (8, 2)
    listed = json.loads((tmp_path / "bad.json").read_text())
    assert listed["bad"]["mine"].keys() == {"2", "5"} and "2.png" in listed["bad"]["mine"]["2"]
    settings["data"]["bad"]["known"] = str(tmp_path / "bad.json")
    config = parse(TrainConfig, settings)
    assert known_bad(config, open_sources(config)).reasons["mine"].keys() == {2, 5}
    with pytest.raises(SettingsError, match=r"give --output=NAME\.html"):
        inspect_data(config, 0, 1)


def test_a_check_of_fewer_negatives_is_no_check(backbone, stage_settings, tmp_path, encoded_pictures):
    """The data are the same, but nobody has looked at the wrong targets that the stage asks for."""
    columns = {"query_image": "image_path", "target_text": "caption", "negative_text": "wrong"}
    path = encoded_pictures.parent / "pairs.yaml"
    path.write_text(json.dumps({"datasets": {"mine": {"format": "table", "path": "rows.jsonl", "columns": columns}}}))
    settings = stage_settings("contrastive", backbone, tmp_path / "bad.json")
    del settings["data"]["kinds"]
    settings["data"] |= {"mixture": str(path), "negatives": 1}
    assert check_data(parse(TrainConfig, settings)) == (8, 2)
    settings["data"]["bad"] = {"ceiling": 0.5, "known": str(tmp_path / "bad.json")}
    for negatives in (0, 1, 2):
        settings["data"]["negatives"] = negatives
        config = parse(TrainConfig, settings)
        if negatives < 2:
            assert known_bad(config, open_sources(config)).negatives == 1
            continue
        with pytest.raises(
            ValueError, match=r"bad\.json is of a check of 1 negatives, this reads 2: check the data again"
        ):
            known_bad(config, open_sources(config))


def test_what_a_window_left_out_is_told_at_each_of_its_steps(backbone, stage_settings, tmp_path, encoded_pictures):
    """The stats of its first batch alone count it, for all of them."""
    settings = stage_settings("bridge", backbone, tmp_path / "page.html")
    del settings["data"]["kinds"]
    settings["data"]["rows"] |= {"masked_per_row": 1, "window": 3}
    settings["data"]["mixture"] = str(encoded_pictures)
    config = parse(TrainConfig, settings)
    origin = open_backbone(config.checkpoint)
    processor = Processor.load(origin.side_files, origin.config, config.data.processor)
    (named,) = open_named("mixture", load_mixture(encoded_pictures))
    options = BuildConfig(workers=0, bad=BadConfig("skip", 1.0))
    made = build("mine", named.source, named.contents, processor, str(tmp_path / "built"), options)
    encoded_pictures.write_text(json.dumps({"datasets": {"mine": {"format": "prepared", "path": made.folder}}}))
    told = []
    for step in (3, 4, 5):
        inspect_data(config, step, 1)
        page = (tmp_path / "page.html").read_text()
        told.append(re.search(r"In its window of 3 steps others stand in for 0 bad records; (\d+) tokens", page)[1])
    assert int(told[0]) > 0 and len(set(told)) == 1


@pytest.fixture
def encoded_pictures(tmp_path):
    """A mixture of eight captions, one of whose pictures is cut and one of which is missing."""
    for number, picture in enumerate(load_pictures("validation")[:8]):
        data = picture.image.data
        if number != 5:
            (tmp_path / f"{number}.png").write_bytes(data[: len(data) // 2] if number == 2 else data)
    rows = [{"image_path": f"{number}.png", "caption": f"caption {number}"} for number in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "mixture.yaml"
    path.write_text("datasets: {mine: {format: cocoa-captions, path: rows.jsonl}}")
    return path
