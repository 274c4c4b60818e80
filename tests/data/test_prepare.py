"""Prepared data: the same records, smaller pictures, and whatever ends a build half-way loses nothing."""

import dataclasses
import io
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tensorflow_datasets.core.example_serializer import ExampleSerializer

from cocoa_jax import cli
from cocoa_jax.data.bad import BadConfig, TooManyBad
from cocoa_jax.data.example import BLOCK_B
from cocoa_jax.data.mixture import CappedSource, DatasetConfig, MixtureConfig, open_mixture
from cocoa_jax.data.naming import open_named
from cocoa_jax.data.pixels import decode
from cocoa_jax.data.prepare import BuildConfig, PrepareError, build, drawn_once, summary
from cocoa_jax.data.prepare_shard import working_picture
from cocoa_jax.data.prepared import LENGTHS, STATISTICS, open_prepared
from cocoa_jax.data.processor import ExampleError, Processor
from cocoa_jax.data.processor_settings import ProcessorConfig, ProcessorError
from cocoa_jax.data.readers.tfds import open_tfds
from cocoa_jax.data.sources import Content, Image, RecordError, SourceError

WORDS = st.text("abc kiwi", max_size=40)


@pytest.fixture(scope="module")
def mixed(noise, mixed_pairs):
    sizes = [(28, 28), (200, 90), (56, 300), (112, 112), (640, 480)]
    return mixed_pairs(tuple(noise(w, h, i) for i, (w, h) in enumerate(sizes)))


def made(source, processor, output, **options):
    return build(source.name, source, "contents", processor, str(output), BuildConfig(workers=0, **options))


def test_records_come_back_with_smaller_pictures(mixed, processors, tmp_path):
    processor = processors["2"]
    prepared = made(mixed, processor, tmp_path, shard_records=3, quality=0)
    assert len(prepared) == len(mixed) and Path(prepared.folder) == tmp_path / "mixed_1" / "1.0.0"
    for index in range(len(mixed)):
        before, after = mixed.record(index, None), prepared.record(index)
        for field in ("id", "dataset", "target_key", "image_key"):
            assert getattr(before, field) == getattr(after, field)
        assert before.wrong_keys() == after.wrong_keys() == after.negative_keys
        pairs = zip(
            (before.query, before.target, *before.negatives), (after.query, after.target, *after.negatives), strict=True
        )
        for old, new in pairs:
            assert (old.text, old.instruction, len(old.images)) == (new.text, new.instruction, len(new.images))
            for one, other in zip(old.images, new.images, strict=True):
                assert other.width * other.height <= one.width * one.height
                # PNG loses nothing: the model sees the very same pixels.
                np.testing.assert_array_equal(processor.pixels.patches(one), processor.pixels.patches(other))


def test_tensorflow_datasets_opens_it_without_tensorflow(mixed, processors, tmp_path):
    prepared = made(mixed, processors["2"], tmp_path, shard_records=4)
    code = (
        "import sys, tensorflow_datasets as tfds\n"
        f"rows = tfds.builder_from_directory({prepared.folder!r}).as_data_source(split='train')\n"
        "assert len(rows) == 10 and rows[7]['id'] == b'7' and list(rows[7]['pictures']) == [1, 0, 0], rows[7]\n"
        "assert 'tensorflow' not in sys.modules and 'jax' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_stored_lengths_are_those_of_the_examples(mixed, processors, tmp_path):
    processor = processors["2.5"]
    lengths = made(mixed, processor, tmp_path, shard_records=4).lengths
    for index in range(len(mixed)):
        record = mixed.record(index, None)
        contents = (record.query, record.target, *record.negatives)
        found = lengths.examples(index, "contrastive", 2)
        examples = [processor.embedding(content) for content in contents]
        assert found[:, :2].tolist() == [[len(example.tokens), example.patches] for example in examples]
        assert (lengths.bridge[index, 0] < 0) == bool(record.target.images)  # pictures on both sides


def test_what_is_made_for_a_stage_is_prepared_for_it_alone(processors, tmp_path):
    def made_of(kind):
        (named,) = open_named(f"pictures:{kind}:validation", None)
        few, config = CappedSource(named.source, np.arange(3)), BuildConfig(workers=0)
        return build(kind, few, "", processors["2"], str(tmp_path), config, made_for=named.made_for)

    prepared = made_of("warmup-long")
    lengths = [processors["2"].measure(prepared.record(i).query, with_bridge=False)[:2] for i in range(3)]
    assert prepared.lengths.warmup[:, :2].tolist() == [list(length) for length in lengths]
    mixture = MixtureConfig({"long": DatasetConfig("prepared", path=prepared.folder, stages=["warmup"])})
    (again,) = open_named("mixture", mixture)
    assert again.made_for == prepared.made_for == "warmup", "prepared data may be prepared again"
    # Rows of these cannot be planned from lengths: refused, where a training would find that none is of use.
    for kind in ("bridge-picture", "bridge-from-words"):
        with pytest.raises(PrepareError, match=r"none of 3 records can be used, the first: .*block B is text alone"):
            made_of(kind)


contents = st.tuples(WORDS, st.lists(st.tuples(st.integers(1, 400), st.integers(1, 400)), max_size=2))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(a=contents, b=WORDS)
def test_a_measured_content_is_as_long_as_its_example(processors, a, b):
    processor = processors["2"]
    shown = Content(a[0], tuple(Image(b"", w, h, "x") for w, h in a[1] if max(w, h) <= 200 * min(w, h)))
    for build_, measure in (
        (lambda: processor.warmup(shown), lambda: processor.measure(shown, with_bridge=False)),
        (lambda: processor.embedding(shown), lambda: processor.measure(shown)),
        (lambda: processor.bridge(shown, Content(b)), lambda: processor.measure(shown, Content(b))),
    ):
        try:
            example = build_()
        except ExampleError:
            with pytest.raises(ExampleError):
                measure()
            continue
        tokens, patches, first, count = measure()
        assert (tokens, patches) == (len(example.tokens), example.patches)
        stage_2 = (example.block == BLOCK_B).any()
        able = example.ordinary & (example.block == BLOCK_B) if stage_2 else example.ordinary
        if count:
            assert np.flatnonzero(able).tolist() == list(range(first, first + count))


def test_a_picture_is_stored_as_large_as_the_model_sees_it(processors, noise):
    pixels = processors["2"].pixels  # at most 16 visual tokens
    small = noise(56, 80)
    assert working_picture(small, pixels, 90) is small
    mirrored = dataclasses.replace(small, mirrored=True)
    stored = working_picture(mirrored, pixels, 90)
    assert not stored.mirrored
    np.testing.assert_array_equal(np.asarray(decode(stored)), np.asarray(decode(mirrored)))
    large = working_picture(noise(300, 200), pixels, 90)
    assert (large.width, large.height) == (112, 84) and PIL.Image.open(io.BytesIO(large.data)).format == "JPEG"
    assert pixels.grid(large) == pixels.grid(noise(300, 200))


# ------------------------------------------------------------------------------------------------- resolutions


@pytest.mark.parametrize(
    ("resolution", "size", "grid"),
    [
        ("square:112", (300, 40), (1, 8, 8)),
        ("square:112", (28, 28), (1, 8, 8)),
        ("dynamic:4..16", (400, 400), (1, 8, 8)),
        ("dynamic:4..16", (400, 100), (1, 4, 16)),
        ("dynamic:4..16", (28, 28), (1, 4, 4)),
        ("dynamic:16..16", (300, 200), (1, 6, 8)),  # at 112x84 it would be seen as 8x10 patches
        ("dynamic:4..16", (4000, 21), (1, 2, 110)),  # at 1540x28 as 2x54
    ],
)
def test_a_resolution_is_squares_or_a_range_of_tokens(folder, model_config, noise, resolution, size, grid):
    settings_ = ProcessorConfig(max_text_tokens=8, resolution=resolution)
    processor = Processor.load(folder, model_config("2"), settings_)
    picture = noise(*size)
    assert processor.pixels.grid(picture) == grid
    assert processor.pixels.patches(picture).shape == (grid[1] * grid[2], 1176)
    stored = working_picture(picture, processor.pixels, 0)
    np.testing.assert_array_equal(processor.pixels.patches(stored), processor.pixels.patches(picture))
    stored = working_picture(picture, processor.pixels, 90)
    assert processor.pixels.grid(stored) == grid
    thin = size[1] < 28
    assert thin or stored.width * stored.height <= 2.1 * processor.pixels.max_pixels


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resolution": "round:4"}, "give 'square:448' or 'dynamic:4..256'"),
        ({"resolution": "square:450"}, "a side is a multiple of 28"),
        ({"resolution": "square:448", "max_pixels": 784}, "leave these out"),
        ({"resolution": "dynamic:9..4"}, "must rise"),
    ],
    ids=str,
)
def test_resolutions_that_are_none_are_refused(folder, model_config, change, message):
    with pytest.raises(ProcessorError, match=message):
        Processor.load(folder, model_config("2"), ProcessorConfig(**{"max_text_tokens": 8} | change))


# ---------------------------------------------------------------------------------------------- whole or not at all


def files(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.is_file()}


def test_a_killed_build_goes_on_where_it_was_and_workers_change_nothing(backbone, tmp_path, monkeypatch):
    root, script = Path(__file__).parents[2], Path(__file__).with_name("killed_build.py")
    run = runpy.run_path(str(script))["run"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *sys.path])}
    killed = tmp_path / "killed"
    command = [sys.executable, str(script), str(backbone), str(killed)]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    parts = killed / "caption" / "1.0.0" / "parts"
    while not (parts / "00001.npz").exists():
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (parts.parent / STATISTICS).exists()
    with pytest.raises(SourceError, match="finish it, by `cocoa data build`"):
        open_prepared(str(parts.parent))
    kept = {path: path.stat().st_mtime_ns for path in parts.parent.glob("*array_record-0000[01]*")}
    assert len(kept) == 2
    again = run(str(backbone), str(killed), 0)
    assert kept == {path: path.stat().st_mtime_ns for path in kept}
    assert files(again) == files(run(str(backbone), str(tmp_path / "whole"), 0))
    assert not parts.exists()
    assert run(str(backbone), str(killed), 0) == again  # nothing left to do


def test_a_folder_belongs_to_one_build(mixed, mixed_pairs, processors, tmp_path):
    made(mixed, processors["2"], tmp_path)
    with pytest.raises(PrepareError, match=r"quality: 95, 80\): give another output or remove it"):
        made(mixed, processors["2"], tmp_path, quality=80)
    with pytest.raises(PrepareError, match="processor: "):
        made(mixed, processors["2.5"], tmp_path)
    with pytest.raises(PrepareError, match="has no records"):
        made(mixed_pairs(()), processors["2"], tmp_path / "none")


def test_folders_of_the_former_format_are_refused_and_built_anew(mixed, processors, tmp_path):
    """They lack keys of wrong targets, without which some would be false negatives."""
    folder = Path(made(mixed, processors["2"], tmp_path).folder)
    whole = files(str(folder))
    for name in ("plan.json", STATISTICS):
        stored = json.loads((folder / name).read_text())
        assert stored["format"] == 2
        (folder / name).write_text(json.dumps(stored | {"format": 1}))
    with pytest.raises(SourceError, match=r"has format 1, this reads 2: remove it, or give another output, and build"):
        open_prepared(str(folder))
    with pytest.raises(PrepareError, match=r"\(format: 1, 2\): give another output or remove it"):
        made(mixed, processors["2"], tmp_path)
    (folder / STATISTICS).unlink()  # one that was not finished
    with pytest.raises(PrepareError, match=r"\(format: 1, 2\): give another output or remove it"):
        made(mixed, processors["2"], tmp_path)
    shutil.rmtree(folder)
    assert files(made(mixed, processors["2"], tmp_path).folder) == whole


def test_another_kind_or_instruction_does_not_get_the_former_records(processors, noise, tmp_path):
    """Both change the records, and neither the pictures nor their number."""
    columns = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(names=["rose", "sun_flower"])}
    rows = [{"image": io.BytesIO(noise(30, 40, i).data), "label": i} for i in range(2)]
    write_tfds(tmp_path / "flowers", tfds.features.FeaturesDict(columns), rows)

    def again(output, dataset):
        (named,) = open_named("mixture", MixtureConfig({"mine": dataset}, str(tmp_path)))
        few, config = CappedSource(named.source, np.arange(2)), BuildConfig(workers=0)
        return build("mine", few, named.contents, processors["2"], str(tmp_path / output), config).record(0).query.text

    kinds = [DatasetConfig("pictures", kind=kind, split="validation") for kind in ("caption", "picture-caption")]
    asked = [DatasetConfig("tfds", "flowers", instruction=text) for text in ("", "Name the flower:", "Which flower?")]
    for output, datasets in (("pictures", kinds), ("flowers", asked)):
        first = again(output, datasets[0])
        for other in datasets[1:]:
            with pytest.raises(PrepareError, match=r"was begun with other data or settings \(contents: "):
                again(output, other)
        assert again(output, datasets[0]) == first
    assert again("named", asked[1]) == "Name the flower:"


def test_rejected_records_are_named_and_counted_by_reason(mixed, processors, tmp_path):
    broken = dataclasses.replace(mixed, broken=(2, 3, 8))
    prepared = made(broken, processors["2"], tmp_path, shard_records=2)
    assert len(prepared) == 7 and [prepared.record(i).id for i in range(7)] == list("0145679")
    assert sum(prepared.statistics["rejected"].values()) == 3 and len(prepared.statistics["rejected"]) == 1
    lines = [json.loads(line) for line in (Path(prepared.folder) / "rejected.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines] == [2, 3, 8] and "cannot be decoded" in lines[0]["reason"]
    assert "7 of 10 records" in summary(prepared) and "3 rejected: " in summary(prepared)
    with pytest.raises(TooManyBad, match="3 of 10 records cannot be used, the first: Mixed-1 2: "):
        made(broken, processors["2"], tmp_path / "stop", bad=BadConfig("stop"))
    with pytest.raises(TooManyBad, match=r"raise bad\.ceiling"):
        made(broken, processors["2"], tmp_path / "ceiling", bad=BadConfig("skip", ceiling=0.002))


@pytest.fixture
def lying_beside(tmp_path, to_lines, picture):
    """A table of six pictures in a folder, two of them broken, opened anew each time."""
    for i in range(6):
        (tmp_path / f"{i}.jpg").write_bytes(b"<html>" if i in (1, 4) else picture(i))
    to_lines(tmp_path / "rows.jsonl", [{"image_path": f"{i}.jpg", "caption": f"caption {i}"} for i in range(6)])
    mixture = MixtureConfig({"mine": DatasetConfig("cocoa-captions", "rows.jsonl")}, str(tmp_path))
    return lambda: next(open_named("mixture", mixture))


def test_what_was_repaired_or_changed_is_built_again_and_nothing_else(
    lying_beside, processors, tmp_path, monkeypatch, picture
):
    def again(**options):
        opened = lying_beside()
        config = BuildConfig(workers=0, shard_records=2, **options)
        return build("mine", opened.source, opened.contents, processors["2"], str(tmp_path / "out"), config)

    def stopped(folder, work, shards, parts, plan):
        raise KeyboardInterrupt

    folder = tmp_path / "out" / "mine" / "1.0.0"
    with pytest.raises(TooManyBad, match="1 of 2 records cannot be used, the first: mine 1"):
        again(bad=BadConfig("stop"))
    (tmp_path / "1.jpg").write_bytes(picture(1))
    with pytest.raises(TooManyBad, match="1 of 6 records cannot be used, the first: mine 4"):
        again(bad=BadConfig("stop"))
    # Before it is finished a changed picture is read again; shards with neither stay.
    with monkeypatch.context() as cut, pytest.raises(KeyboardInterrupt):
        cut.setattr("cocoa_jax.data.prepare._finish", stopped)
        again()
    shards = sorted(folder.glob("*.array_record-*"))
    before = [shard.stat().st_mtime_ns for shard in shards]
    (tmp_path / "2.jpg").write_bytes(picture(22))
    (tmp_path / "0.jpg").unlink()  # what it gave is there
    prepared = again()
    assert [old == shard.stat().st_mtime_ns for old, shard in zip(before, shards, strict=True)] == [True, False, True]
    assert [prepared.record(i).query.images[0].data for i in range(5)] == [picture(i) for i in (0, 1, 22, 3, 5)]
    assert again().fingerprint() == prepared.fingerprint()
    # Finished data are what somebody may train on: they are never changed, and never silently old.
    (tmp_path / "4.jpg").write_bytes(picture(4))
    with pytest.raises(PrepareError, match=r"without records that can be used now \(1, the first is number 4\): give"):
        again()
    (tmp_path / "3.jpg").write_bytes(picture(33))
    with pytest.raises(PrepareError, match=r"other pictures \(1 of 5 have changed since, the first: '3.jpg'\): give"):
        again()


def test_statistics_that_a_kill_cut_short_are_written_again(mixed, processors, tmp_path, monkeypatch):
    whole = made(mixed, processors["2"], tmp_path / "whole")
    folder = Path(made(mixed, processors["2"], tmp_path / "cut").folder)
    statistics = (folder / STATISTICS).read_text()
    for left in ("", statistics[:40]):  # as earlier versions could leave them
        (folder / STATISTICS).write_text(left)
        made(mixed, processors["2"], tmp_path / "cut")
        assert files(str(folder)) == files(whole.folder)
    (folder / STATISTICS).unlink()
    written = epath.Path.write_text

    def cut_short(path, text, *more, **options):
        written(path, text[:40] if path.name.startswith(STATISTICS) else text, *more, **options)
        if path.name.startswith(STATISTICS):
            raise KeyboardInterrupt

    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr(type(epath.Path(folder)), "write_text", cut_short)
        made(mixed, processors["2"], tmp_path / "cut")
    assert not (folder / STATISTICS).exists()


def test_a_bucket_is_written_like_a_folder(mixed, processors, tmp_path, monkeypatch):
    """A local folder stands in for the bucket: every file must reach it through the path library."""
    from etils.epath import backend, gpath

    class Bucket(backend._OsPathBackend):
        """Paths under gs:// lie in a folder."""

    calls = []

    def local(self, path):
        calls.append(str(path))
        return str(path).replace("gs://", f"{tmp_path}/bucket/")

    for name in ("exists", "isdir", "listdir", "glob", "makedirs", "mkdir", "rmtree", "remove", "replace", "stat"):
        plain = getattr(backend._OsPathBackend, name)
        monkeypatch.setattr(Bucket, name, lambda s, p, *a, _f=plain, **k: _f(s, local(s, p), *a, **k), raising=False)
    plain_open, plain_copy = backend._OsPathBackend.open, backend._OsPathBackend.copy
    monkeypatch.setattr(Bucket, "open", lambda s, p, mode: plain_open(s, local(s, p), mode), raising=False)
    monkeypatch.setattr(
        Bucket, "copy", lambda s, a, b, overwrite: plain_copy(s, local(s, a), local(s, b), overwrite), raising=False
    )
    (tmp_path / "bucket").mkdir()
    monkeypatch.setattr(gpath._GPath, "_backend", property(lambda self: Bucket()))
    prepared = made(mixed, processors["2"], "gs://data", shard_records=4)
    assert prepared.folder == "gs://data/mixed_1/1.0.0" and any(call.startswith("gs://") for call in calls)
    monkeypatch.undo()
    here = made(mixed, processors["2"], tmp_path / "local", shard_records=4)
    assert files(str(tmp_path / "bucket" / "data" / "mixed_1" / "1.0.0")) == files(here.folder)


# ------------------------------------------------------------------------------- from TensorFlow Datasets, mixtures


def write_tfds(
    folder: Path, features: tfds.features.FeaturesDict, rows: list[dict], form: str = "array_record"
) -> Path:
    folder.mkdir(parents=True)
    columns, encode = features.get_serialized_info(), features.encode_example
    example = ExampleSerializer(columns)
    data = [example.get_tf_example(encode(row)).SerializeToString() for row in rows]
    writer = ArrayRecordWriter(str(folder / "flowers-train.array_record-00000-of-00001"), "group_size:1")
    for line in data:
        writer.write(line)
    writer.close()
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder, dataset_name="flowers", split="train", filetype_suffix="array_record"
    )
    split = tfds.core.SplitInfo("train", [len(rows)], sum(map(len, data)), template)
    tfds.folder_dataset.write_metadata(
        data_dir=folder, features=features, split_infos=[split], version="1.0.0", check_data=False
    )
    info = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps({**info, "fileFormat": form}))
    return folder


def test_a_classification_set_of_tensorflow_datasets(processors, noise, tmp_path):
    columns = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(names=["rose", "sun_flower"])}
    rows = [{"image": io.BytesIO(noise(30 + i, 40, i).data), "label": i % 2} for i in range(4)]
    folder = write_tfds(tmp_path / "flowers" / "1.0.0", tfds.features.FeaturesDict(columns), rows)
    (named,) = open_named(str(folder), None)
    prepared = build(
        named.name, named.source, named.contents, processors["2"], str(tmp_path / "out"), BuildConfig(workers=0)
    )
    assert [prepared.record(i).target.text for i in range(4)] == ["rose", "sun flower"] * 2 and not drawn_once(
        named.source
    )
    assert prepared.record(1).query.images[0].width == 31
    assert prepared.record(0).target_key == prepared.record(2).target_key != prepared.record(1).target_key
    mixture = {"flowers": DatasetConfig("tfds", path="flowers/1.0.0", instruction="Name the flower:")}
    source = open_mixture(MixtureConfig(mixture, str(tmp_path)), "contrastive").sources["flowers"]
    assert source.record(2, np.random.default_rng(0)).query.text == "Name the flower:"
    mixture = {"flowers": DatasetConfig("prepared", path="out/flowers/1.0.0", cap=3)}
    assert len(open_mixture(MixtureConfig(mixture, str(tmp_path)), "bridge").sources["flowers"]) == 3


def test_what_has_no_class_or_is_no_picture_is_bad(noise, tmp_path):
    """Test splits are published with -1 for a class, which must not be the last one."""
    columns = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(names=["rose", "sun_flower"])}
    rows = [{"image": io.BytesIO(noise(30, 40, i).data), "label": i - 1} for i in range(2)]
    source = open_tfds(str(write_tfds(tmp_path / "flowers", tfds.features.FeaturesDict(columns), rows)), "flowers")
    assert source.record(1, np.random.default_rng(0)).target.text == "rose"
    with pytest.raises(RecordError, match="flowers train/0: 1 pictures and 0 texts"):
        source.record(0, np.random.default_rng(0))
    rows = [{"image": io.BytesIO(b"<html>"), "label": 0}]
    folder = write_tfds(tmp_path / "pages", tfds.features.FeaturesDict(columns), rows)
    with pytest.raises(RecordError, match=r"pages train/0: .* are no picture"):
        open_tfds(str(folder), "pages").record(0, np.random.default_rng(0))


def test_an_image_caption_set_of_tensorflow_datasets(noise, tmp_path):
    columns = {"image": tfds.features.Image(), "captions": tfds.features.Sequence({"text": tfds.features.Text()})}
    rows = [{"image": io.BytesIO(noise(40, 40, i).data), "captions": [{"text": "a"}, {"text": "b"}]} for i in range(2)]
    folder = write_tfds(tmp_path / "captions", tfds.features.FeaturesDict(columns), rows)
    (named,) = open_named(f"{folder}:train", None)
    drawn = {named.source.record(0, np.random.default_rng(seed)).target.text for seed in range(9)}
    assert drawn == {"a", "b"} and named.name == "captions"
    assert drawn_once(named.source) == (
        "captions: of several captions one is drawn and kept, a training on the data set itself sees all"
    )


def test_what_cannot_be_read_is_refused_with_the_remedy(tmp_path):
    columns = tfds.features.FeaturesDict({"label": tfds.features.ClassLabel(names=["a"])})
    other = write_tfds(tmp_path / "other", columns, [{"label": 0}], form="tfrecord")
    with pytest.raises(SourceError, match=r"stored as 'tfrecord'.*--file_format=array_record"):
        list(open_named(str(other), None))
    blind = write_tfds(tmp_path / "blind", columns, [{"label": 0}])
    with pytest.raises(SourceError, match="has the columns label: needed are one picture"):
        list(open_named(str(blind), None))
    with pytest.raises(SourceError, match="has no split 'test': choose one of train"):
        list(open_named(f"{blind}:test", None))
    with pytest.raises(SourceError, match="is no source: name a mixture file"):
        list(open_named("nowhere", None))
    with pytest.raises(SourceError, match="kind 'x' does not exist"):
        list(open_named("pictures:x", None))
    assert LENGTHS == "lengths.npz"


def test_the_command(backbone, tmp_path, capsys):
    options = ["--output", str(tmp_path), "--checkpoint", str(backbone), "--build.workers=0"]
    cli.main(["data", "build", "pictures:skin-tone:validation", *options, "--processor.resolution=dynamic:1..4"])
    told = capsys.readouterr().out
    first, rest = told.split("\n", 1)
    assert first.startswith("skin-tone: words and flips are drawn once here")
    assert rest.startswith(f"{tmp_path}/skin_tone/1.0.0: ") and "fingerprint" in rest
    assert len(open_prepared(f"{tmp_path}/skin_tone/1.0.0")) > 10
    with pytest.raises(SystemExit):
        cli.main(["data", "build", "nowhere", *options])
    assert capsys.readouterr().err.count("\n") == 1


def test_a_network_that_fails_is_not_a_folder_without_data(monkeypatch):
    def gone(self, *given, **more):
        raise ConnectionResetError("reset by peer")

    monkeypatch.setattr(type(epath.Path("gs://bucket/data")), "read_text", gone)
    with pytest.raises(ConnectionResetError):
        open_prepared("gs://bucket/data")
