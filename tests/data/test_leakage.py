"""Nothing of a test split is trained on, masked, or used to build the tokenizer; what is hidden is in no input."""

import dataclasses
import io
from pathlib import Path

import jax
import numpy as np
import PIL.Image
import pytest
import yaml

from cocoa_jax import recipe
from cocoa_jax.checkpoints.scratch import ScratchConfig
from cocoa_jax.config import SettingsError, TrainConfig, load_config, parse, to_dict
from cocoa_jax.data.masking import MaskingConfig, Purpose, example_rng
from cocoa_jax.data.packing import RowsConfig
from cocoa_jax.data.pairs import KINDS, picture_source
from cocoa_jax.data.pipeline import BatchConfig, stage_dataset
from cocoa_jax.data.sources import Content, Image, Record, load_pictures
from cocoa_jax.data.vision_plan import plan_image
from cocoa_jax.objectives import warmup
from cocoa_jax.training import inputs

CONFIGS = sorted((Path(__file__).parents[2] / "configs").rglob("*.yaml"))
SETTINGS = {path: yaml.safe_load(path.read_text()) for path in CONFIGS}
# Those for pods name a mixture that the user brings.
STAGES = [path for path, values in SETTINGS.items() if "stage" in values and "mixture" not in values["data"]]


@pytest.fixture
def read(monkeypatch):
    """Which splits are read, wherever the trainer or the tokenizer reads them."""
    asked = []

    def spy(split):
        asked.append(split)
        return load_pictures(split)

    monkeypatch.setattr(recipe, "load_pictures", spy)
    monkeypatch.setattr(inputs, "load_pictures", spy)
    return asked


def words_of(split: str) -> set[str]:
    fields = (text for p in load_pictures(split) for text in (p.caption, p.description, p.label, *p.keywords))
    return {text.lower() for text in fields if text}


def test_the_tokenizer_is_built_from_the_training_pictures_alone(read, monkeypatch, tmp_path):
    given = {}
    monkeypatch.setattr(
        recipe, "make_backbone", lambda folder, settings, texts, shapes: given.update(texts=list(texts))
    )
    recipe.make_picture_backbone(tmp_path / "backbone", ScratchConfig())
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
    monkeypatch.setattr(inputs, "stage_dataset", lambda batches, sources, *more, **named: made.update(sources))
    inputs.open_dataset(config, processor=None, mixture=inputs.open_sources(config))
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


# ------------------------------------------------------------------- what is hidden in stage 1 is no input of the model

CAPTIONS = ("0123456789", "9753186420", "5555")  # a digit is a token
ROWS = RowsConfig(batch_size=3, shapes=((3, 40, 64),), examples_per_row=1, masked_per_row=16)
WARMUP = BatchConfig("warmup", ROWS, masking=MaskingConfig(0.5, 0.5))


@dataclasses.dataclass(frozen=True)
class Fixed:
    contents: tuple[Content, ...]

    def __len__(self) -> int:
        return len(self.contents)

    def record(self, index: int, rng: np.random.Generator) -> Record:
        return Record(str(index), "fixed", self.contents[index], Content(), "")


def content(caption: str, pixels: np.ndarray) -> Content:
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, "PNG")
    return Content(caption, (Image(buffer.getvalue(), pixels.shape[1], pixels.shape[0], "noise"),))


def batch_of(contents, processor) -> dict[str, np.ndarray]:
    return stage_dataset(WARMUP, {"fixed": Fixed(tuple(contents))}, {"fixed": 1.0}, processor, seed=3, steps=1)[0]


class Recorder:
    """A model that keeps what it is given."""

    def __call__(self, inputs):
        self.inputs = inputs
        return np.zeros((*inputs.tokens.shape, 8), np.float32)

    def head_kernel(self):
        return np.zeros((8, 9), np.float32)

    def logits(self, hidden, kernel):
        return np.zeros((*hidden.shape[:-1], 9), np.float32)


def given_to_the_model(batch) -> list[np.ndarray]:
    model, values = Recorder(), batch["patches"].shape[2] * 4
    draw = lambda hidden, positions, spans, columns: np.zeros((*columns.shape, values), np.float32)  # noqa: E731
    warmup.warmup_loss(model, draw, batch, warmup.WarmupConfig())
    return [np.asarray(leaf) for leaf in jax.tree.leaves(model.inputs)]


def with_other_secrets(contents, pixels, batch, processor):
    """The same contents with other digits where tokens are hidden, and other pixels where units are."""
    changed = []
    for index, (old, picture) in enumerate(zip(contents, pixels, strict=True)):
        example = processor.warmup(old)
        row = next(r for r in range(3) if (batch["patch_end"][r] > 0).sum() == example.patches)
        first = len(example.tokens) - len(CAPTIONS[index])
        hidden = [int(at) + 1 - first for at in batch["predict_at"][row] if at >= 0]
        text = "".join(str((int(c) + 1) % 10) if i in hidden else c for i, c in enumerate(CAPTIONS[index]))
        plan, across = plan_image(example.grids[0], processor.config.vision), example.grids[0][2] // 2
        picture = picture.copy()
        for token, unit in enumerate(plan.unit_of_token):
            if batch["hidden_unit"][row, unit]:
                y, x = 28 * (token // across), 28 * (token % across)
                picture[y : y + 28, x : x + 28] = 255 - picture[y : y + 28, x : x + 28]
        changed.append(content(text, picture))
    return changed


@pytest.mark.parametrize("family", ["2", "2.5"])
def test_true_ids_and_pixels_of_what_is_hidden_are_in_no_input(processors, family, monkeypatch):
    rng = np.random.default_rng(0)
    pixels = [rng.integers(0, 256, (28 * h, 28 * w, 3), dtype=np.uint8) for h, w in ((2, 3), (3, 3), (2, 6))]
    contents = [content(*both) for both in zip(CAPTIONS, pixels, strict=True)]
    base = batch_of(contents, processors[family])
    other = batch_of(with_other_secrets(contents, pixels, base, processors[family]), processors[family])
    used = base["predict_id"] >= 0
    assert used.sum() > 4 and (base["predict_id"] != other["predict_id"])[used].all()
    units = (base["patches"] != other["patches"]).reshape(*base["hidden_unit"].shape, -1).any(-1)
    np.testing.assert_array_equal(units, base["hidden_unit"])  # every hidden unit differs, and no other
    assert units.sum() > 4
    for left, right in zip(given_to_the_model(base), given_to_the_model(other), strict=True):
        np.testing.assert_array_equal(left, right)
    # Were they not hidden, it would show.
    monkeypatch.setattr(warmup, "hide_units", lambda patches, hidden, seeds: patches)
    pairs = zip(given_to_the_model(base), given_to_the_model(other), strict=True)
    assert sum((left != right).any() for left, right in pairs) == 1
