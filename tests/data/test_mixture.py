"""Mixtures: every format opens, stages share sources, caps, weights, instructions, and what the fingerprint sees."""

import dataclasses
import json
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from cocoa_jax.config import SettingsError, load_mixture
from cocoa_jax.data.masking import Purpose, example_rng
from cocoa_jax.data.mixture import DatasetConfig, MixtureConfig, open_mixture
from cocoa_jax.data.naming import open_named
from cocoa_jax.data.pairs import KINDS, picture_source
from cocoa_jax.data.pipeline import STATS, BatchConfig, RowsConfig, stage_dataset, step_records
from cocoa_jax.data.prepared import parse, serialize
from cocoa_jax.data.readers.records import Columns, instructed
from cocoa_jax.data.readers.stages import for_stage
from cocoa_jax.data.sources import (
    Content,
    Image,
    Record,
    RecordError,
    SourceError,
    content_key,
    image_key,
    load_pictures,
)

RNG = np.random.default_rng(0)


@pytest.fixture
def written(tmp_path, to_lines, to_parquet, picture):
    """A folder of four kinds of lists about the same pictures."""
    for i in range(6):
        (tmp_path / f"{i}.jpg").write_bytes(picture(i))
    to_lines(tmp_path / "captions.jsonl", [{"image_path": f"{i}.jpg", "caption": f"caption {i}"} for i in range(6)])
    pairs = [{"qry": f"what {i}", "pos_text": f"that {i % 2}", "qry_image_path": f"{i}.jpg"} for i in range(4)]
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    inside = [{"words": f"picture {i}", "photo": {"bytes": picture(i), "path": None}} for i in range(5)]
    to_parquet(tmp_path / "inside.parquet", inside)
    return tmp_path


def mixture(written, **more) -> MixtureConfig:
    datasets = {
        "captions": DatasetConfig("cocoa-captions", "captions.jsonl"),
        "pairs": DatasetConfig("cocoa-pairs", "pairs.json", instruction="Asked: {text}?"),
        "inside": DatasetConfig("table", "*.parquet", columns=Columns(query_text="words", target_image="photo"), cap=3),
        "emoji": DatasetConfig("pictures", kind="caption", split="validation", cap=10),
    }
    return MixtureConfig(datasets | more, str(written))


def test_every_format_gives_records_to_every_stage(written, picture, processors):
    for stage, method in (("warmup", "warmup"), ("bridge", "bridge"), ("contrastive", "embedding")):
        opened = open_mixture(mixture(written), stage)
        assert {name: len(source) for name, source in opened.sources.items()} == {
            "captions": 6, "pairs": 4, "inside": 3, "emoji": 10,
        }  # fmt: skip
        assert opened.weights == {name: len(source) for name, source in opened.sources.items()}
        for name, source in opened.sources.items():
            record = source.record(1, RNG)
            assert record.dataset == source.name == name
            contents = (record.query, record.target) if stage == "bridge" else (record.query,)
            example = getattr(processors["2"], method)(*contents)
            assert example.patches or (stage == "contrastive" and name in ("inside", "emoji")), (stage, name)
    asked = opened.sources["pairs"].record(3, RNG)
    assert asked.query.text == "Asked: what 3?" and asked.target.text == "that 1"
    assert asked.query.images[0].data == picture(3)


def test_what_stages_make_of_a_pair(written, picture):
    warm, bridge = (open_mixture(mixture(written), stage).sources for stage in ("warmup", "bridge"))
    assert warm["captions"].record(2, RNG).query.text == "caption 2"
    assert warm["pairs"].record(2, RNG).query.text == "what 2 that 0", "no instruction is rebuilt"
    pair = Record("0", "same", Content("a kiwi"), Content("a kiwi"), "")
    assert for_stage(pair, "warmup").query.text == "a kiwi", "equal words stand there once"
    turned = bridge["inside"].record(0, RNG)  # text to image: the words belong to the picture
    assert turned.query.images and turned.target.text.startswith("picture ") and not turned.target.images
    both = DatasetConfig(
        "table", "captions.jsonl", columns=Columns(query_image="image_path", target_image="image_path")
    )
    source = open_mixture(mixture(written, both=both), "bridge").sources["both"]
    with pytest.raises(RecordError, match="both 0: query and target have pictures"):
        source.record(0, RNG)


def test_the_documented_pairs_are_what_is_said_of_them(tmp_path, picture):
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text().split("### Pairs of one's own", 1)[1]
    for kind, name in (("yaml", "mixture.yaml"), ("json", "mine.jsonl")):
        (tmp_path / name).write_text(re.search(rf"```{kind}\n(.*?)```", text, re.S)[1])
    (tmp_path / "photos").mkdir()
    for i in (1, 2):
        (tmp_path / "photos" / f"{i}.jpg").write_bytes(picture(i))
    config = load_mixture(tmp_path / "mixture.yaml")
    sources = {stage: open_mixture(config, stage).sources["mine"] for stage in ("warmup", "bridge", "contrastive")}
    record = sources["contrastive"].record(0, RNG)
    assert record.id == "a" and record.query.images[0].data == picture(1) and record.target.text == "kiwis"
    assert [wrong.text for wrong in record.negatives] == ["apples", "grapes"]
    assert sources["warmup"].record(1, RNG).query.text == "Who swims there? a duck"
    assert sources["bridge"].record(1, RNG).target.text == "a duck"
    keys = re.search(r"The keys of `columns`, .*?: (.*?)\. A", text, re.S)[1]
    assert re.findall(r"`(\w+)`", keys) == [field.name for field in dataclasses.fields(Columns)]


def test_the_documented_formats_are_read_as_shown(tmp_path, picture):
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    lines = dict(re.findall(r"^\| `(cocoa-\w+)` \|.*\| `(\{.*\})` \|$", text, re.M))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "1.jpg").write_bytes(picture(1))
    seen = {}
    for name, line in lines.items():
        (tmp_path / f"{name}.jsonl").write_text(line + "\n")
        config = MixtureConfig({name: DatasetConfig(name, f"{name}.jsonl")}, str(tmp_path))
        record = open_mixture(config, "contrastive").sources[name].record(0, RNG)
        assert record.query.images[0].data == picture(1)
        seen[name] = record.query.text, record.target.text
    assert seen == {"cocoa-captions": ("", "a kiwi"), "cocoa-pairs": ("What grows here?", "kiwis")}
    rows = re.search(r"^\| field \| of a data set \|\n(.*?)\n\n", text, re.M | re.S)[1]
    named = re.findall(r"`(\w+)`", "\n".join(row.split("|")[1] for row in rows.splitlines()))
    assert sorted(named) == sorted(field.name for field in dataclasses.fields(DatasetConfig))


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_in_a_mixture_is_the_task_that_it_is_alone(kind):
    stage = KINDS[kind].made_for
    mixture = {"x": DatasetConfig("pictures", kind=kind, split="validation", stages=[stage or "contrastive"])}
    source = open_mixture(MixtureConfig(mixture), stage or "contrastive").sources["x"]
    alone = picture_source(kind, load_pictures("validation"), mirror=True)
    (named,) = open_named(f"pictures:{kind}:validation", None)
    assert named.made_for == stage and len(source) == len(alone) == len(named.source)
    for index in (0, len(alone) - 1):
        shown, wanted = source.record(index, np.random.default_rng(3)), alone.record(index, np.random.default_rng(3))
        assert (shown.query, shown.target) == (wanted.query, wanted.target)
    if stage:
        assert kind.startswith(stage)
        with pytest.raises(SourceError, match=rf"made for its stage alone: set stages to \[{stage}\]"):
            open_mixture(MixtureConfig({"x": dataclasses.replace(mixture["x"], stages=["contrastive"])}), "contrastive")


def test_files_of_several_folders_do_not_share_the_first_one_s_pictures(tmp_path, to_lines, to_parquet, picture):
    for i, name in enumerate("ab"):
        to_lines(tmp_path / name / "rows.jsonl", [{"image_path": "0.jpg", "caption": name}])
        (tmp_path / name / "0.jpg").write_bytes(picture(i))
        to_parquet(
            tmp_path / name / "in.parquet", [{"image_path": {"bytes": picture(i), "path": "0"}, "caption": name}]
        )

    def opened(path, **more):
        return open_mixture(
            MixtureConfig({"x": DatasetConfig("cocoa-captions", path, **more)}, str(tmp_path)), "warmup"
        )

    with pytest.raises(SourceError, match=r"data set x: its files lie in 2 folders, .* '0\.jpg' may be in any: set"):
        opened("*/rows.jsonl")
    assert opened("b/rows.jsonl").sources["x"].record(0, RNG).query.images[0].data == picture(1)
    inside = opened("*/in.parquet").sources["x"]
    assert [inside.record(i, RNG).query.images[0].data for i in range(2)] == [picture(0), picture(1)]
    assert opened("*/rows.jsonl", images=["a"]).sources["x"].record(1, RNG).query.images[0].data == picture(0)


@pytest.mark.parametrize(
    ("instruction", "text"),
    [
        ("Find: {text}. Answer with a picture.", "Find: two boats. Answer with a picture."),
        ("{text}, in a picture?", "two boats, in a picture?"),
        ("Name it: {text}", "Name it: two boats"),
        ("Name it:", "Name it: two boats"),
        ("Find: {text}. {text}", "Find: two boats. {text}"),
        ("", "two boats"),
    ],
)
def test_no_end_of_an_instruction_is_rebuilt(instruction, text):
    image = Image(b"", 2, 2, "a")
    asked, shown = (instructed(instruction, words, (image,) if not words else ()) for words in ("two boats", ""))
    assert asked.text == text and asked.words == "two boats" and shown.words == ""
    find = Record("0", "x", asked, Content("", (image,)), "")
    assert for_stage(find, "bridge").target == Content("two boats")
    assert for_stage(find, "warmup").query == Content("two boats", (image,))
    name = Record("0", "x", shown, Content("cat"), "")
    assert for_stage(name, "warmup").query == Content("cat", (image,))
    assert parse(serialize(find)).query.words == "two boats", "prepared data keep both ends"


def test_a_cap_is_the_same_random_choice_every_time(written):
    def chosen(seed):
        sources = open_mixture(mixture(written), "contrastive").sources
        return [sources["emoji"].record(i, np.random.default_rng(seed)).id for i in range(10)]

    assert chosen(0) == chosen(1) and len(set(chosen(0))) == 10


def test_the_fingerprint_sees_contents_and_settings_but_no_place(written, tmp_path_factory):
    def of(config):
        return open_mixture(config, "contrastive").fingerprint

    base = of(mixture(written))
    moved = tmp_path_factory.mktemp("moved") / "there"
    shutil.copytree(written, moved)
    assert of(mixture(moved)) == base
    weighted = {n: dataclasses.replace(d, weight=1.0) for n, d in mixture(written).datasets.items()}
    capped = dataclasses.replace(mixture(written).datasets["emoji"], cap=9)
    assert len({base, of(mixture(written, **weighted)), of(mixture(written, emoji=capped))}) == 3
    with (moved / "captions.jsonl").open("a") as file:
        file.write('{"image_path": "1.jpg", "caption": "one more"}\n')
    assert of(mixture(moved)) != base


def test_interleaved_parts_come_from_one_data_set_each(written, processors):
    opened = open_mixture(mixture(written), "contrastive")
    for size, parts in ((8, 1), (8, 4), (8, 8), (1, 1)):
        rows = RowsConfig(batch_size=size, shapes=((16, 48, 64),), examples_per_row=2, masked_per_row=2)
        config = BatchConfig("contrastive", rows, interleave=parts)
        seen = []

        @dataclasses.dataclass(frozen=True)
        class Spy:
            source: object
            name: str
            seen: list

            def __len__(self):
                return len(self.source)

            def record(self, index, rng):
                self.seen.append(self.name)
                return self.source.record(index, rng)

        spies = {name: Spy(source, name, seen) for name, source in opened.sources.items()}
        made = stage_dataset(config, spies, opened.weights, processors["2"], seed=0, steps=12)
        kinds = [int(made[step]["stats"][STATS.index("kind")]) for step in range(12)]
        names = np.array(seen).reshape(12 * parts, size // parts)
        assert (names == names[:, :1]).all() and len(set(names[:, 0])) == 4
        assert (len(set(kinds)) > 1) == (parts == 1) and (parts == 1 or set(kinds) == {-1})
    with pytest.raises(ValueError, match="choose a divisor"):
        BatchConfig("contrastive", dataclasses.replace(rows, batch_size=8), interleave=3)


def test_equal_pictures_and_targets_have_equal_keys(written, processors):
    """Two captions of one picture, and two pictures of one answer."""
    opened = open_mixture(MixtureConfig({"p": mixture(written).datasets["pairs"]}, str(written)), "contrastive")
    rows = RowsConfig(batch_size=8, shapes=((16, 48, 64),), examples_per_row=2, masked_per_row=2)
    batch = stage_dataset(
        BatchConfig("contrastive", rows), opened.sources, opened.weights, processors["2"], seed=0, steps=1
    )[0]
    # Eight draws of four records: every picture twice, two answers.
    assert sorted(np.bincount(batch["image_key"])) == [2, 2, 2, 2] and (np.bincount(batch["target_key"]) == 4).all()


def test_a_hard_negative_that_is_somebody_s_target_has_its_key(mmeb, processors):
    """In the list each record's wrong picture is the right one of the next."""
    dataset = DatasetConfig("mmeb-train", subset="MSCOCO_t2i")
    opened = open_mixture(MixtureConfig({"t2i": dataset}, str(mmeb)), "contrastive")
    rows = RowsConfig(batch_size=4, shapes=((12, 96, 64),), examples_per_row=2, masked_per_row=2)
    config = BatchConfig("contrastive", rows, negatives=1)
    batch = stage_dataset(config, opened.sources, opened.weights, processors["2"], seed=0, steps=1)[0]
    named = step_records(config, opened.sources, opened.weights, processors["2"], seed=0, step=0)
    place = {int(name.rsplit(" ", 1)[1]): i for i, name in enumerate(named)}
    assert len(set(batch["target_key"].tolist())) == 4
    for number, i in place.items():
        assert batch["negative_key"][i] == batch["target_key"][place[(number + 1) % 4]]


def test_contents_that_show_the_same_have_one_key():
    image = Image(b"bytes", 2, 2, "a")
    assert content_key(Content("Say: a kiwi", instruction="Say:")) == content_key(Content("a kiwi"))
    assert content_key(Content("a kiwi")) != content_key(Content("a boat"))
    named = Content("a kiwi", (dataclasses.replace(image, name="b"),))
    assert content_key(named) == content_key(Content("", (image,))) != content_key(Content("a kiwi"))
    assert image_key([image]) != image_key([dataclasses.replace(image, mirrored=True)]) and image_key([]) == ""


def test_queries_without_pictures_show_no_common_picture(written, processors):
    """Else all of their targets would be no negatives of each other, and nothing would be learned."""
    opened = open_mixture(MixtureConfig({"i": mixture(written).datasets["inside"]}, str(written)), "contrastive")
    rows = RowsConfig(batch_size=3, shapes=((6, 48, 64),), examples_per_row=2, masked_per_row=2)
    batch = stage_dataset(
        BatchConfig("contrastive", rows), opened.sources, opened.weights, processors["2"], seed=0, steps=1
    )[0]
    assert batch["image_key"].tolist() == [-1, -1, -1] and len(set(batch["target_key"].tolist())) == 3


def test_a_mixture_is_a_file(written, tmp_path):
    values = {"datasets": {"captions": {"format": "cocoa-captions", "path": "captions.jsonl", "stages": ["warmup"]}}}
    (written / "mixture.yaml").write_text(yaml.safe_dump(values))
    config = load_mixture(written / "mixture.yaml")
    opened = open_mixture(config, "warmup")
    record = opened.sources["captions"].record(0, example_rng(0, 0, 0, Purpose.RECORD))
    assert record.query.text == "caption 0"
    assert len(pickle.loads(pickle.dumps(opened.sources["captions"]))) == 6
    with pytest.raises(SourceError, match="no data set for stage 'bridge'"):
        open_mixture(config, "bridge")
    (written / "mixture.yaml").write_text("datasets: {a: {format: novel}}")
    with pytest.raises(SettingsError, match="novel"):
        load_mixture(written / "mixture.yaml")
    (written / "mixture.yaml").write_text(yaml.safe_dump({**values, "root": "gs://bucket/data"}))
    with pytest.raises(SettingsError, match=r"root is gs://bucket/data: .* only prepared data"):
        load_mixture(written / "mixture.yaml")


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        ({"format": "cocoa-pairs", "path": "nothing.json"}, "no file is called"),
        ({"format": "pictures", "kind": "caption", "split": "test_seen"}, "not for training"),
        ({"format": "pictures", "kind": "warmup"}, "made for its stage alone"),
        ({"format": "cocoa-pairs", "path": "pairs.json", "images": ["gone.zip"]}, "neither a folder nor a zip"),
        ({"format": "mmeb-train", "path": "."}, "no original-"),
    ],
)
def test_a_data_set_that_cannot_be_opened_is_named(written, dataset, words):
    with pytest.raises(SourceError, match=f"data set wrong: .*{words}"):
        open_mixture(MixtureConfig({"wrong": DatasetConfig(**dataset)}, str(written)), "warmup")


@pytest.mark.parametrize(
    "given",
    [
        {"format": "cocoa-pairs", "path": "gs://bucket/pairs.json"},
        {"format": "mmeb-train", "path": "gs://bucket/mmeb"},
        {"format": "cocoa-captions", "path": "captions.jsonl", "images": ["images", "gs://bucket/images.zip"]},
    ],
)
def test_what_cannot_be_read_from_a_bucket_is_refused(given):
    with pytest.raises(ValueError, match=rf"gs://bucket/.* is in a bucket, .* '{given['format']}' .*cocoa data build"):
        DatasetConfig(**given)
    DatasetConfig(format="prepared", path="gs://bucket/data/1.0.0")


def test_weights_for_some_data_sets_alone_are_refused(written):
    some = dataclasses.replace(mixture(written).datasets["pairs"], weight=2.0)
    with pytest.raises(ValueError, match=r"\['pairs'\] have a weight"):
        open_mixture(mixture(written, pairs=some), "contrastive")
    shares = {"captions": 1.0, "pairs": 2.5, "inside": 0.0, "emoji": 4.0}
    whole = {name: dataclasses.replace(d, weight=shares[name]) for name, d in mixture(written).datasets.items()}
    assert open_mixture(mixture(written, **whole), "contrastive").weights == shares
    with pytest.raises(ValueError, match="belong to format 'table'"):
        DatasetConfig("table", "x.parquet")
    with pytest.raises(ValueError, match="cap is 0"):
        DatasetConfig("cocoa-pairs", cap=0)
