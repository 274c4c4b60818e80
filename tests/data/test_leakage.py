"""Nothing of a test split is trained on, masked, or used to build the tokenizer."""

from pathlib import Path

import pytest
import yaml

from cocoa_jax import demo
from cocoa_jax.checkpoints.scratch import ScratchConfig
from cocoa_jax.config import SettingsError, TrainConfig, load_config, parse, to_dict
from cocoa_jax.data.masking import Purpose, example_rng
from cocoa_jax.data.pairs import KINDS, picture_source
from cocoa_jax.data.sources import load_pictures
from cocoa_jax.training import inputs, loop

CONFIGS = sorted((Path(__file__).parents[2] / "configs").rglob("*.yaml"))
STAGES = [path for path in CONFIGS if "stage" in yaml.safe_load(path.read_text())]


@pytest.fixture
def read(monkeypatch):
    """Which splits are read, wherever the trainer or the tokenizer reads them."""
    asked = []

    def spy(split):
        asked.append(split)
        return load_pictures(split)

    monkeypatch.setattr(demo, "load_pictures", spy)
    monkeypatch.setattr(inputs, "load_pictures", spy)
    return asked


def words_of(split: str) -> set[str]:
    fields = (text for p in load_pictures(split) for text in (p.caption, p.description, p.label, *p.keywords))
    return {text.lower() for text in fields if text}


def test_the_tokenizer_is_built_from_the_training_pictures_alone(read, monkeypatch, tmp_path):
    given = {}
    monkeypatch.setattr(demo, "make_backbone", lambda folder, settings, texts, shapes: given.update(texts=list(texts)))
    demo.make_picture_backbone(tmp_path / "backbone", ScratchConfig())
    assert read == ["train"] and len(given["texts"]) > 10_000
    seen = {text.lower() for text in given["texts"]}
    # Captions that no training picture has: none of them was given to the tokenizer.
    for split in ("validation", "test_unseen"):  # test_seen shows known things in unknown pictures
        fresh = {p.caption.lower() for p in load_pictures(split)} - words_of("train")
        assert len(fresh) > 100 and not fresh & seen, split


@pytest.mark.parametrize("path", STAGES, ids=lambda path: path.stem)
def test_a_stage_reads_the_training_pictures_alone(read, monkeypatch, path):
    config = load_config(TrainConfig, path)
    made = {}
    monkeypatch.setattr(loop, "stage_batches", lambda batches, sources, *more, **named: made.update(sources))
    loop._batches(config, processor=None)
    assert read == ["train"] and made.keys() == config.data.kinds.keys()
    for source in made.values():
        assert {picture.split for picture in source.pictures} == {"train"}


@pytest.mark.parametrize("split", ["test_seen", "test_unseen"])
def test_a_test_split_cannot_be_asked_for(split):
    values = to_dict(load_config(TrainConfig, STAGES[0]))
    values["data"]["split"] = split
    with pytest.raises(SettingsError, match=split):
        parse(TrainConfig, values)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_records_show_training_pictures_alone(kind):
    train = load_pictures("train")
    names, bytes_of = {picture.id for picture in train}, {picture.image.data for picture in train}
    source = picture_source(kind, train)
    for index in range(0, len(source), max(1, len(source) // 20)):
        record = source.record(index, example_rng(0, 0, index, Purpose.RECORD))
        assert set(record.id.split("/")[1:]) <= names or record.id.split("/", 1)[1] in names, record.id
        for image in (*record.query.images, *record.target.images):
            assert image.data in bytes_of or " of " in image.name  # collages name the picture that they show
            assert image.name.split(" of ")[-1] in names


# Upstream draws these alike: two flags, and "cat face" as "grinning cat".
DRAWN_ALIKE = {
    "validation": {"noto-emoji-02395", "noto-emoji-02288"},
    "test_seen": set(),
    "test_unseen": {"fluent-emoji-00878"},
}


@pytest.mark.parametrize("split", DRAWN_ALIKE)
def test_no_picture_of_another_split_is_a_training_picture(split):
    train = {picture.image.data for picture in load_pictures("train")}
    same = {picture.id for picture in load_pictures(split) if picture.image.data in train}
    assert same == DRAWN_ALIKE[split]
