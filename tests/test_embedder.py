"""The object that users came for: every form of an item, and what a row may depend on."""

import dataclasses
import io
import json

import numpy as np
import PIL.ExifTags
import PIL.Image
import pytest
import yaml
from flax.traverse_util import flatten_dict

import cocoa_jax
from cocoa_jax import embedder as embedding
from cocoa_jax.checkpoints.convert import hf_to_orbax, orbax_to_hf
from cocoa_jax.checkpoints.errors import CheckpointError
from cocoa_jax.checkpoints.merging import merge_checkpoint
from cocoa_jax.config import EvaluateConfig, load_config, parse, to_dict
from cocoa_jax.data.pixels import decode
from cocoa_jax.embedder import Embedder, ItemError, default_settings, embed_file, read_item

TOLERANCE = 1e-5  # float32, summed in another order


@pytest.fixture(scope="module")
def embedder(trained):
    return Embedder.load(trained)


@pytest.fixture(scope="module")
def picture():
    """picture(seed): random pixels, 4 visual tokens."""

    def make(seed: int = 0) -> PIL.Image.Image:
        return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (56, 56, 3), dtype=np.uint8))

    return make


def png(picture: PIL.Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def items(picture):
    texts = [{"text": text} for text in ("a kiwi", "two small boats", "x", "the red car on a green hill")]
    pictures = [{"image": picture(seed)} for seed in range(4)]
    return [*texts, *pictures, {"text": "a kiwi", "image": picture(0)}, {"text": "a boat", "image": picture(0)}]


def test_it_is_what_the_package_exports():
    assert cocoa_jax.Embedder is Embedder
    with pytest.raises(AttributeError, match="cocoa_jax has no attribute 'Embedding'"):
        _ = cocoa_jax.Embedding


def test_rows_are_of_unit_length_and_differ(embedder, items):
    rows = embedder.embed(items)
    assert rows.shape == (10, 32) and rows.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=TOLERANCE)
    assert (rows @ rows.T)[~np.eye(10, dtype=bool)].max() < 1 - 1e-4


def test_a_picture_may_be_a_path_bytes_or_pil(embedder, picture, tmp_path):
    image = picture(1)
    (tmp_path / "noise.png").write_bytes(png(image))
    forms = [image, png(image), tmp_path / "noise.png", str(tmp_path / "noise.png"), image.convert("RGBA")]
    rows = embedder.embed([{"image": form} for form in forms])
    np.testing.assert_allclose(rows, np.broadcast_to(rows[0], rows.shape), atol=TOLERANCE)


@pytest.mark.parametrize(
    ("form", "mode", "orientation"),
    [("JPEG", "RGB", 6), ("PNG", "RGB", 5), ("TIFF", "L", 3), ("JPEG", "CMYK", 1), ("JPEG", "CMYK", 3),
     ("TIFF", "LAB", 1), ("GIF", "P", 1)],
)  # fmt: skip
def test_a_picture_of_pillow_is_read_as_its_file(picture, form, mode, orientation):
    exif, file = PIL.Image.Exif(), io.BytesIO()
    exif[PIL.ExifTags.Base.Orientation] = orientation
    picture(5).resize((56, 28)).convert(mode).save(file, form, exif=exif)
    opened = PIL.Image.open(io.BytesIO(file.getvalue()))
    assert opened.mode == mode
    by_bytes, by_pillow = (read_item({"image": one}, "it").images[0] for one in (file.getvalue(), opened))
    assert (by_pillow.width, by_pillow.height) == ((28, 56) if orientation >= 5 else (56, 28))
    np.testing.assert_array_equal(decode(by_pillow), decode(by_bytes))


@pytest.mark.parametrize("mode", ["I", "F", "I;16"])
def test_a_picture_of_pillow_with_more_than_8_bits_is_refused(mode):
    with pytest.raises(ItemError, match=r"it: the image Image cannot be read .*: give a picture file"):
        read_item({"image": PIL.Image.new(mode, (56, 56))}, "it")


def test_a_closed_picture_is_named(picture):
    opened = PIL.Image.open(io.BytesIO(png(picture())))
    opened.close()
    with pytest.raises(ItemError, match=r"it: the image PngImageFile cannot be read .*closed"):
        read_item({"image": opened}, "it")


def test_order_and_company_do_not_matter(embedder, items):
    want = embedder.embed(items)
    np.testing.assert_allclose(embedder.embed(items[::-1])[::-1], want, atol=TOLERANCE)
    alone = np.concatenate([embedder.embed([item]) for item in items])
    np.testing.assert_allclose(alone, want, atol=TOLERANCE)
    many = embedder.embed(items * 5, progress=True)
    np.testing.assert_allclose(many, np.tile(want, (5, 1)), atol=TOLERANCE)


def test_nothing_to_embed(embedder):
    assert embedder.embed([]).shape == (0, 32)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"words": "a kiwi"}, r"item 1: has the keys \['words'\], expected text, image or both"),
        ({"text": "a", "label": "b"}, r"item 1: has the keys \['label', 'text'\]"),
        ({}, r"item 1: has the keys \[\]"),
        ({"text": ""}, r"item 1: its text is empty and it has no image"),
        ({"text": 7}, r"item 1: text is a int, expected text"),
        ({"text": "a \ud800"}, r"item 1: text is no UTF-8 \(surrogates not allowed at character 2\)"),
        ({"image": "nowhere.png"}, r"item 1: the image 'nowhere.png' cannot be read .*: give a picture file"),
        ({"image": b"no picture"}, r"item 1: the image bytes cannot be read"),
        ({"image": 7}, r"item 1: the image int cannot be read"),
    ],
    ids=str,
)
def test_a_bad_item_is_named(embedder, item, message):
    with pytest.raises(ItemError, match=message) as caught:
        embedder.embed([{"text": "fine"}, item])
    assert "\n" not in str(caught.value)


def test_a_picture_that_is_cut_short_is_named(embedder, picture):
    with pytest.raises(ItemError, match="item 0: the image bytes cannot be read"):
        embedder.embed([{"image": png(picture())[:2000]}])


def test_settings_are_those_of_training(trained, embedder):
    settings = default_settings(trained)
    assert embedder.settings == settings
    assert (settings.processor.max_pixels, settings.processor.max_text_tokens) == (6272, 16)
    assert settings.rows.shapes == ((16, 48, 32),)


def test_a_hugging_face_folder_with_settings_of_ones_own(backbone, trained, embedder, items):
    rows = {"batch_size": 4, "shapes": [[2, 64, 40]], "examples_per_row": 2, "masked_per_row": 2}
    processor = {"min_pixels": 784, "max_pixels": 8 * 784, "max_text_tokens": 16}
    settings = parse(EvaluateConfig, {"processor": processor, "rows": rows})
    # The stage holds the same weights.
    got = Embedder.load(backbone, settings).embed(items)
    np.testing.assert_allclose(got, embedder.embed(items), atol=TOLERANCE)


def test_what_is_exported_is_read_as_the_stage_was_trained(backbone, stage_settings, leave_stage, items, tmp_path):
    given = stage_settings("contrastive", backbone, tmp_path / "stage", contrastive={"pooling": "mean"})
    given["data"]["visibility"] = {"attention": "causal"}
    stage = leave_stage(given)
    orbax_to_hf(stage, tmp_path / "hub")
    merge_checkpoint(stage, tmp_path / "merged")
    hf_to_orbax(tmp_path / "hub", tmp_path / "back")
    want = default_settings(stage)
    assert (want.visibility.attention, want.pooling) == ("causal", "mean")
    for name in ("hub", "merged", "back"):
        assert default_settings(tmp_path / name) == want
    assert load_config(EvaluateConfig, tmp_path / "hub" / "cocoa.json") == want  # a file for --settings too
    rows = Embedder.load(tmp_path / "hub").embed(items)
    np.testing.assert_array_equal(rows, Embedder.load(stage).embed(items))
    (tmp_path / "hub" / "cocoa.json").unlink()
    assert default_settings(tmp_path / "hub") == default_settings(backbone) != want


def test_a_batch_has_no_more_pixels_than_devices_have_room_for(trained, embedder, items, monkeypatch):
    settings, row = default_settings(trained), 4 * 32 * 1176
    monkeypatch.setattr(embedding, "_PIXELS", 3 * row + 1)
    few = Embedder(trained, settings)
    assert embedder._rows.shapes == ((16, 48, 32),) and few._rows.shapes == ((3, 48, 32),)
    np.testing.assert_allclose(few.embed(items), embedder.embed(items), atol=TOLERANCE)
    monkeypatch.setattr(embedding, "_PIXELS", 1)
    two = dataclasses.replace(settings, compute=dataclasses.replace(settings.compute, chunk_rows=2))
    assert Embedder(trained, two)._rows.shapes == ((2, 48, 32),)


# ----------------------------------------------------------------------------------------------------- files


def write(path, *lines) -> None:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))


def test_a_file_of_items(trained, embedder, picture, tmp_path):
    (tmp_path / "noise.png").write_bytes(png(picture(2)))
    write(tmp_path / "items.jsonl", {"text": "a kiwi"}, "", {"image": "noise.png"}, {"text": "x", "image": "noise.png"})
    embed_file(trained, tmp_path / "items.jsonl", tmp_path / "made" / "out.npz")
    with np.load(tmp_path / "made" / "out.npz") as made:
        assert made.files == ["embeddings"]
        rows = made["embeddings"]
    want = embedder.embed([{"text": "a kiwi"}, {"image": picture(2)}, {"text": "x", "image": picture(2)}])
    np.testing.assert_allclose(rows, want, atol=TOLERANCE)
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["out.npz"]


def test_the_command_reads_with_the_settings_of_a_file(trained, embedder, call, tmp_path):
    settings = to_dict(default_settings(trained))
    settings["width"] = 8
    (tmp_path / "read.yaml").write_text(yaml.safe_dump(settings))
    write(tmp_path / "items.jsonl", {"text": "a kiwi"})
    command = ["embed", "--checkpoint", trained, "--input", tmp_path / "items.jsonl", "--output", tmp_path / "out.npz"]
    assert call(*command, "--settings", tmp_path / "read.yaml")[0] == 0
    want = embedder.embed([{"text": "a kiwi"}])[:, :8]
    with np.load(tmp_path / "out.npz") as made:
        np.testing.assert_allclose(made["embeddings"], want / np.linalg.norm(want, axis=1), atol=TOLERANCE)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_end_with_a_newline_alone(trained, embedder, tmp_path, end):
    texts = ["a\u2028kiwi", "a\u2029boat", "a\x85car", "h\u00fcgel"]
    lines = end.join(json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    (tmp_path / "items.jsonl").write_bytes((lines + end).encode())
    embed_file(trained, tmp_path / "items.jsonl", tmp_path / "out.npz")
    with np.load(tmp_path / "out.npz") as made:
        np.testing.assert_allclose(
            made["embeddings"], embedder.embed([{"text": text} for text in texts]), atol=TOLERANCE
        )


def test_a_line_that_is_no_utf8_is_named(trained, tmp_path):
    (tmp_path / "items.jsonl").write_bytes(b'{"text": "fine"}\n{"text": "\xff"}\n')
    with pytest.raises(ItemError, match=r"items.jsonl line 2: no JSON \('utf-8' codec can't decode"):
        embed_file(trained, tmp_path / "items.jsonl", tmp_path / "out.npz")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 3: no JSON"),
        ("[1]", "line 3: a list, expected an object"),
        ({"image": "nowhere.png"}, r"line 3: the image .*nowhere.png.* cannot be read"),
        ({"image": "words.png"}, r"line 3: the image .*words.png.* cannot be read"),
        ({"title": "x"}, r"line 3: has the keys \['title'\]"),
        ({"text": "\ud83d kiwi"}, r"line 3: text is no UTF-8 \(surrogates not allowed at character 0\)"),
    ],
    ids=str,
)
def test_a_bad_line_is_named_and_nothing_is_written(trained, tmp_path, line, message):
    (tmp_path / "words.png").write_text("not a picture")
    write(tmp_path / "items.jsonl", {"text": "fine"}, "", line)
    with pytest.raises(ItemError, match=message) as caught:
        embed_file(trained, tmp_path / "items.jsonl", tmp_path / "out.npz")
    assert "\n" not in str(caught.value) and not (tmp_path / "out.npz").exists()


def test_a_checkpoint_that_is_not_there_is_refused_before_pictures_are_read(picture, tmp_path, monkeypatch):
    (tmp_path / "noise.png").write_bytes(png(picture()))
    write(tmp_path / "items.jsonl", {"image": "noise.png"})
    monkeypatch.setattr(embedding, "open_image", lambda *given: pytest.fail("a picture is read"))
    with pytest.raises(CheckpointError, match=r"nowhere is not a folder"):
        embed_file(tmp_path / "nowhere", tmp_path / "items.jsonl", tmp_path / "out.npz")


def test_weights_are_held_as_products_take_them(trained, items, monkeypatch):
    settings = default_settings(trained)
    settings = dataclasses.replace(settings, compute=dataclasses.replace(settings.compute, dtype="bfloat16"))
    held = Embedder(trained, settings)
    kinds = {path[-1]: leaf.dtype for path, leaf in flatten_dict(held._params).items()}
    assert {str(kinds.pop(name)) for name in ("kernel", "table")} == {"bfloat16"}
    assert {str(kind) for kind in kinds.values()} == {"float32"}
    monkeypatch.setattr(embedding, "_held", lambda keys, leaf, dtype: leaf.dtype)
    np.testing.assert_array_equal(held.embed(items), Embedder(trained, settings).embed(items))


def test_devices_never_wait_for_the_host(trained, monkeypatch):
    """The next batch runs before the rows of the one before are asked for, and those after it are being built."""
    one, log = Embedder(trained, default_settings(trained)), []
    run, build = one._embed, embedding.embedding_rows

    class Rows:
        def __init__(self, number, rows):
            self.number, self.rows = number, rows

        def __array__(self, dtype=None, copy=None):
            log.append(f"fetch {self.number}")
            return np.asarray(self.rows)

    def start(params, batch):
        log.append(f"run {sum(word.startswith('run') for word in log)}")
        return Rows(int(log[-1][4:]), run(params, batch))

    asked = []
    monkeypatch.setattr(embedding, "embedding_rows", lambda *given: asked.append(given) or build(*given))
    monkeypatch.setattr(one, "_embed", start)
    one.embed([{"text": f"word {i} " * 5} for i in range(200)])
    last = sum(word.startswith("run") for word in log) - 1
    between = [word for n in range(last) for word in (f"run {n + 1}", f"fetch {n}")]
    assert last >= 2 and log == ["run 0", *between, f"fetch {last}"]
    assert asked[0][-1] == embedding._THREADS


def test_a_shorter_width_is_the_beginning_of_the_embedding(trained, embedder, items):
    short = Embedder(trained, dataclasses.replace(default_settings(trained), width=8)).embed(items[:3])
    whole = embedder.embed(items[:3])[:, :8]
    np.testing.assert_allclose(short, whole / np.linalg.norm(whole, axis=1, keepdims=True), atol=TOLERANCE)


def test_processes_that_share_the_rows_make_the_batches_of_one(trained):
    from cocoa_jax.checkpoints.backbone import open_backbone
    from cocoa_jax.data.inference import embedding_rows
    from cocoa_jax.data.packing import RowShare
    from cocoa_jax.data.processor import Processor
    from cocoa_jax.data.sources import Content

    backbone, settings = open_backbone(trained), default_settings(trained)
    processor = Processor.load(backbone.side_files, backbone.config, settings.processor)
    contents = [Content(f"word {i} " * (i % 5 + 1)) for i in range(40)]
    make = [contents, processor, settings.rows, settings.visibility]
    whole, left, right = (list(embedding_rows(*make, RowShare(*share))) for share in (((0,), 1), ((0,), 2), ((1,), 2)))
    assert len(whole) == len(left) == len(right) > 1
    for (batch, held), (first, held_first), (second, held_second) in zip(whole, left, right, strict=True):
        np.testing.assert_array_equal(held, held_first)
        np.testing.assert_array_equal(held, held_second)
        for name, array in batch.items():
            np.testing.assert_array_equal(array, np.concatenate([first[name], second[name]]), err_msg=name)
