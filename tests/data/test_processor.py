"""Pixels bit-equal to transformers, text that cannot forge special tokens, and the layout of examples."""

import dataclasses
import io
import json
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import PIL.features
import PIL.Image
import pytest
import tokenizers
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from cocoa_jax.data.pixels import ImageError, decode, open_image
from cocoa_jax.data.processor import ExampleError, Processor
from cocoa_jax.data.processor_settings import ProcessorConfig, ProcessorError, without_added_tokens
from cocoa_jax.data.sources import Content, Image
from cocoa_jax.data.vision_plan import plan_image

SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|image_pad|>",
    "<|mask|>",
    "<tool_call>",
]
SETTINGS = ProcessorConfig(min_pixels=784, max_pixels=16 * 784, max_text_tokens=24)


@pytest.fixture(scope="module")
def reference(folder):
    return Qwen2VLImageProcessorPil.from_pretrained(folder, min_pixels=784, max_pixels=16 * 784)


def as_reference(reference, image: Image) -> tuple[np.ndarray, list[int]]:
    out = reference(images=[PIL.Image.open(io.BytesIO(image.data))], return_tensors="np")
    return out["pixel_values"], out["image_grid_thw"][0].tolist()


@settings(max_examples=60, deadline=None)
@given(width=st.integers(1, 300), height=st.integers(1, 300), seed=st.integers(0, 99))
@example(width=112, height=112, seed=0)  # no resizing
@example(width=70, height=42, seed=0)  # halves round to even
@example(width=1, height=1, seed=0)
@example(width=600, height=3, seed=0)  # the most elongated
def test_patches_are_bit_equal(processors, reference, noise, width, height, seed):
    if max(width, height) > 200 * min(width, height):
        return
    image = noise(width, height, seed)
    expected, grid = as_reference(reference, image)
    pixels = processors["2"].pixels
    assert list(pixels.grid(image)) == grid
    np.testing.assert_array_equal(pixels.patches(image), expected)


@settings(max_examples=300, deadline=None)
@given(width=st.integers(1, 5000), height=st.integers(1, 5000), least=st.integers(1, 40), more=st.integers(0, 2000))
def test_grid_is_the_reference_s_smart_resize(processors, width, height, least, more):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    if max(width, height) > 200 * min(width, height):
        return
    low, high = least * 784, (least + more) * 784
    pixels = dataclasses.replace(processors["2"].pixels, min_pixels=low, max_pixels=high)
    rows, columns = smart_resize(height, width, 28, low, high)
    assert pixels.grid(Image(b"", width, height, "x")) == (1, rows // 14, columns // 14)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "L", "1", "P", "PA", "CMYK", "I;16"])
def test_every_colour_mode_equals_the_reference(processors, reference, encoded, mode):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 4), dtype=np.uint8)
    if mode == "I;16":
        picture = PIL.Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    else:
        picture = (
            PIL.Image.fromarray(pixels, "RGBA").convert("RGB" if mode in ("P", "CMYK", "1") else "RGBA").convert(mode)
        )
    image = encoded(picture, form="TIFF" if mode in ("CMYK", "PA") else "PNG")
    np.testing.assert_array_equal(processors["2"].pixels.patches(image), as_reference(reference, image)[0])


def test_transparency_is_white(encoded):
    clear = PIL.Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert decode(encoded(clear)).getpixel((3, 3)) == (255, 255, 255)
    palette = PIL.Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    assert decode(encoded(palette, transparency=1)).getpixel((3, 3)) == (255, 255, 255)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize(("orientation", "turn"), [(5, "TRANSPOSE"), (6, "ROTATE_270"), (3, "ROTATE_180")])
def test_exif_orientation_is_applied(noise, encoded, form, orientation, turn):
    if form == "AVIF" and not PIL.features.check("avif"):
        pytest.skip("this Pillow writes no AVIF")
    picture = PIL.Image.open(io.BytesIO(noise(20, 30).data))
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation  # how far the stored picture has to be turned
    quality = {"quality": 95} if form in ("JPEG", "WEBP", "AVIF") else {}
    stored = encoded(picture, form=form, exif=exif, **quality)
    plain = decode(encoded(picture, form=form, **quality))
    upright = plain.transpose(PIL.Image.Transpose[turn])
    opened = open_image(stored.data, "turned")
    assert (opened.width, opened.height) == upright.size
    np.testing.assert_array_equal(decode(opened), upright)
    width, height = opened.height, opened.width
    with pytest.raises(ImageError, match=f"announced were {width}x{height}"):
        decode(dataclasses.replace(stored, width=width, height=height))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_there_is_not_turns_nothing(noise, encoded, form, orientation):
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    stored = encoded(PIL.Image.open(io.BytesIO(noise(20, 30).data)), form=form, exif=exif)
    opened = open_image(stored.data, "odd")
    assert (opened.width, opened.height) == (20, 30)
    with PIL.Image.open(io.BytesIO(stored.data)) as plain:
        np.testing.assert_array_equal(decode(opened), plain.convert("RGB"))


def test_mirrored_flips_columns(noise):
    image = noise(30, 20)
    np.testing.assert_array_equal(decode(dataclasses.replace(image, mirrored=True)), np.asarray(decode(image))[:, ::-1])


@pytest.mark.parametrize(
    "damage", [b"", b"<html>not found</html>", "half", "header"], ids=["empty", "html", "truncated", "garbled"]
)
def test_an_unreadable_picture_is_named(noise, processors, damage):
    good = noise(56, 56)
    data = {"half": good.data[: len(good.data) // 2], "header": good.data[:40] + b"\0" * 500}.get(damage, damage)
    with pytest.raises(ImageError, match="noise-56x56-0: cannot be decoded"):
        processors["2"].pixels.patches(dataclasses.replace(good, data=data))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=300))
def test_random_bytes_never_escape_as_another_error(noise, data):
    for head in (b"", noise(8, 8).data[:60], noise(8, 8, form="JPEG").data[:200], b"RIFF\x24\0\0\0WEBPVP8 "):
        with pytest.raises(ImageError):
            decode(Image(head + data, 9, 9, "bad"))


@pytest.mark.parametrize("size", [(0, 5), (5, -1), (100_000, 100_000), (201, 1)])
def test_impossible_sizes_are_refused_before_decoding(processors, size):
    with pytest.raises(ImageError, match=r"^bomb: .*: (leave it out|crop it)"):
        processors["2"].pixels.grid(Image(b"", *size, "bomb"))


texts = st.lists(st.one_of(st.text(max_size=12), st.sampled_from(SPECIAL)), max_size=6).map("".join)


@settings(max_examples=150, deadline=None)
@given(text=texts)
def test_special_tokens_typed_in_a_text_stay_text(folder, processors, text):
    tokenizer = tokenizer_of(folder)
    ids = processors["2"].token_ids(text)
    assert not set(ids) & set(tokenizer.added_tokens_decoder)
    if "<tool_call>" not in text:  # transformers never splits this one
        assert ids == tokenizer(text, split_special_tokens=True)["input_ids"]
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == tokenizer.backend_tokenizer.decode(ids)


_tokenizers: dict = {}


def tokenizer_of(folder):
    return _tokenizers.setdefault(folder, AutoTokenizer.from_pretrained(folder))


def test_a_tokenizer_whose_plain_words_hold_a_special_token_is_refused():
    words = {"<|mask|>": 0, "a": 1, "?": 2}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<|mask|>"])
    with pytest.raises(ProcessorError, match=r"typing '<\|mask\|>' gives token 0 even as plain text"):
        without_added_tokens(tokenizer)


def test_a_caption_with_special_tokens_decodes_to_itself(folder, processors):
    text = "".join(SPECIAL) + " kiwi"
    assert tokenizer_of(folder).decode(processors["2"].token_ids(text)) == text


def test_tokens_of_the_method(processors):
    assert processors["2"].mask_id == 8 and processors["2"].bridge_ids == (2,)


def test_tokens_that_the_tokenizer_lacks_get_rows_that_it_leaves_unused(folder, model_config):
    more = dataclasses.replace(SETTINGS, mask_token="<|gone|>", bridge_tokens=("<|im_end|>", "<|b|>", "<|c|>"))
    used = len(tokenizer_of(folder))
    processor = Processor.load(folder, model_config("2"), more)
    assert (processor.mask_id, processor.bridge_ids) == (used, (2, used + 1, used + 2))
    assert processor.added == {"<|gone|>": used, "<|b|>": used + 1, "<|c|>": used + 2} and processor.used_rows == used
    assert not set(processor.token_ids("a <|gone|> kiwi <|b|>")) & set(processor.added.values())
    assert not Processor.load(folder, model_config("2"), SETTINGS).added
    config = model_config("2")
    taken = dataclasses.replace(config, image_token=used)  # a row that config.json gives a meaning is no unused one
    assert Processor.load(folder, taken, more).mask_id == used + 1
    full = dataclasses.replace(config, text=dataclasses.replace(config.text, vocab_size=used + 2))
    with pytest.raises(ProcessorError, match=rf"'<\|c\|>' is not in the tokenizer, and no row of the {used + 2}"):
        Processor.load(folder, full, more)


def test_the_checkpoint_s_own_pixel_limits(folder, model_config):
    own = dataclasses.replace(SETTINGS, min_pixels=None, max_pixels=None)
    pixels = Processor.load(folder, model_config("2"), own).pixels
    assert (pixels.min_pixels, pixels.max_pixels) == (784, 50176)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bridge_tokens": ("<|gone|>", "<|gone|>")}, "already the token"),
        ({"bridge_tokens": ()}, "name at least one"),
        ({"bridge_tokens": ("<|endoftext|>",)}, "already the padding token"),
        ({"bridge_tokens": ("<|mask|>",)}, "already the token"),
        ({"bridge_tokens": ("<|im_end|>", "<|im_end|>")}, "already the token"),
        ({"bridge_tokens": ("<|image_pad|>",)}, "already the image token"),
        ({"min_pixels": 5000, "max_pixels": 4000}, "min_pixels 5000 and max_pixels 4000"),
        ({"max_text_tokens": 0}, "max_text_tokens is 0"),
    ],
)
def test_settings_that_contradict_are_refused(folder, model_config, change, message):
    with pytest.raises(ProcessorError, match=message):
        Processor.load(folder, model_config("2"), dataclasses.replace(SETTINGS, **change))


def test_a_folder_without_tokenizer_or_with_other_patches_is_refused(folder, model_config, tmp_path):
    with pytest.raises(ProcessorError, match="is not a folder"):
        Processor.load(tmp_path / "none", model_config("2"), SETTINGS)
    with pytest.raises(ProcessorError, match="no usable tokenizer"):
        Processor.load(tmp_path, model_config("2"), SETTINGS)
    other = Path(shutil.copytree(folder, tmp_path / "copy"))
    values = json.loads((other / "preprocessor_config.json").read_text())
    (other / "preprocessor_config.json").write_text(json.dumps(values | {"patch_size": 16}))
    with pytest.raises(ProcessorError, match=r"patch_size 16, config.json 14"):
        Processor.load(other, model_config("2"), SETTINGS)


def test_a_processor_survives_pickling_without_transformers(processors):
    copy = pickle.loads(pickle.dumps(processors["2"]))
    assert copy.token_ids("a kiwi") == processors["2"].token_ids("a kiwi")
    assert sys.getsizeof(pickle.dumps(processors["2"])) < 200_000


@pytest.mark.parametrize("family", ["2", "2.5"])
def test_the_layout_of_a_bridge_example(processors, noise, family):
    processor = processors[family]
    a = Content("a kiwi", (noise(84, 56), noise(28, 112)))
    made = processor.bridge(a, Content("two small boats"))
    head, tail = processor.token_ids("a kiwi"), processor.token_ids("two small boats")
    assert made.tokens.tolist() == [3, *[6] * 6, 4, 3, *[6] * 4, 4, *head, 2, *tail]
    seen = 14 + len(head)
    assert made.block.tolist() == [1] * seen + [2] + [3] * len(tail)
    assert made.ordinary.tolist() == [False] * 14 + [True] * len(head) + [False] + [True] * len(tail)
    assert made.grids == ((1, 4, 6), (1, 8, 2)) and made.patches == 40
    units = [plan_image(grid, processor.config.vision).unit_of_token for grid in made.grids]
    assert made.unit[1:7].tolist() == units[0].tolist()
    assert made.unit[9:13].tolist() == (units[1] + 6).tolist()
    assert (made.unit >= 0).sum() == 10 and sorted(made.unit[made.unit >= 0]) == list(range(10))
    # 1 start + a picture 3 wide + end + start + a picture 4 high + end, then text
    assert made.positions[14].tolist() == [1 + 3 + 1 + 1 + 4 + 1] * 3


@pytest.mark.parametrize("family", ["2", "2.5"])
@pytest.mark.parametrize("text", ["", "two small boats"])
def test_the_layout_of_a_bridge_example_whose_block_b_has_a_picture(processors, noise, family, text):
    processor = processors[family]
    a, b = Content("a kiwi", (noise(84, 56),)), Content(text, (noise(28, 112),))
    made = processor.bridge(a, b, pictures=True)
    head, tail = processor.token_ids("a kiwi"), processor.token_ids(text)
    assert made.tokens.tolist() == [3, *[6] * 6, 4, *head, 2, 3, *[6] * 4, 4, *tail]
    n = 8 + len(head)
    assert made.block.tolist() == [1] * n + [2] + [3] * (6 + len(tail))
    ordinary = [False] * 8 + [True] * len(head) + [False] * 7 + [True] * len(tail)
    assert made.ordinary.tolist() == ordinary and made.images == a.images + b.images and made.patches == 40
    units = [plan_image(grid, processor.config.vision).unit_of_token for grid in made.grids]
    assert made.unit[1:7].tolist() == units[0].tolist()
    assert made.unit[n + 2 : n + 6].tolist() == (units[1] + 6).tolist() and (made.unit >= 0).sum() == 10
    # Start, a picture 3 wide, end, text, bridge, start: then the rows of a picture 4 high, and what follows them.
    first = 1 + 3 + 1 + len(head) + 1 + 1
    assert made.positions[n + 2 : n + 6].tolist() == [[first, first + row, first] for row in range(4)]
    assert made.positions[n + 6].tolist() == [first + 4] * 3


def test_stage_layouts_differ_only_in_the_bridge(processors, noise):
    content = Content("a kiwi", (noise(56, 56),))
    warm, embedded = processors["2"].warmup(content), processors["2"].embedding(content)
    assert (warm.block == 1).all() and embedded.tokens.tolist() == [*warm.tokens, 2]
    assert embedded.block[-1] == 2 and not embedded.ordinary[-1]


@pytest.mark.parametrize("family", ["2", "2.5"])
def test_patches_of_an_example_are_stored_in_plan_order(processors, noise, family):
    processor, images = processors[family], (noise(112, 84), noise(60, 60))
    made = processor.embedding(Content(images=images))
    out = np.empty((made.patches, 1176), np.float32)
    processor.fill_patches(made, out)
    expected = []
    for image, grid in zip(images, made.grids, strict=True):
        expected.append(processor.pixels.patches(image)[plan_image(grid, processor.config.vision).order])
    np.testing.assert_array_equal(out, np.concatenate(expected))


@settings(max_examples=60, deadline=None)
@given(a=st.integers(0, 60), b=st.integers(1, 60), room=st.integers(6, 60), pictures=st.integers(0, 1))
def test_text_is_shortened_never_pictures_or_the_bridge(processors, noise, a, b, room, pictures):
    images = (noise(28, 28),) * pictures
    made = processors["2"].bridge(Content("x" * a, images), Content("y" * b), room=room)
    assert len(made.tokens) <= room
    assert (made.unit >= 0).sum() == pictures and (made.block == 2).sum() == 1
    kept_a, kept_b = int((made.ordinary & (made.block == 1)).sum()), int((made.block == 3).sum())
    whole_a, whole_b = min(a, 24), min(b, 24)
    assert kept_b >= 1 and kept_a <= whole_a and kept_b <= whole_b
    if len(made.tokens) < room:  # cut only for want of room
        assert (kept_a, kept_b) == (whole_a, whole_b)


def test_what_cannot_be_an_example_is_refused(processors, noise):
    processor, picture = processors["2"], noise(112, 112)
    with pytest.raises(ExampleError, match="noise-112x112-0: block B has no text"):
        processor.bridge(Content(images=(picture,)), Content(""))
    with pytest.raises(ExampleError, match=r"block B holds 1 pictures .* set masking\.image_ratio"):
        processor.bridge(Content("a"), Content("b", (picture,)))
    with pytest.raises(ExampleError, match="neither text nor pictures"):
        processor.embedding(Content())
    with pytest.raises(ExampleError, match="need 19 tokens, a row holds 18"):
        processor.embedding(Content(images=(picture,)), room=18)
    assert len(processor.embedding(Content(images=(picture,)), room=19).tokens) == 19
