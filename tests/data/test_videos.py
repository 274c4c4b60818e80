"""Videos: slices of frames, tokens of their own, a time axis, and what is wrong with them."""

import dataclasses

import numpy as np
import PIL.Image
import pytest
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from cocoa_jax.data.inference import embedding_rows
from cocoa_jax.data.packing import RowsConfig
from cocoa_jax.data.pixels import ImageError
from cocoa_jax.data.processor import ExampleError
from cocoa_jax.data.rows import VisibilityConfig
from cocoa_jax.data.sources import Content, Video
from cocoa_jax.data.vision_plan import plan_image

ROWS = RowsConfig(batch_size=2, shapes=((1, 64, 160),), examples_per_row=2, masked_per_row=2)


def video(frames: int, height: int, width: int, fps: float = 1.0) -> Video:
    pixels = np.random.default_rng(frames).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)
    return Video(pixels, fps, f"video of {frames}")


@pytest.mark.parametrize(("height", "width"), [(56, 84), (70, 45)])
def test_a_slice_holds_two_frames_each_as_the_reference_makes_a_picture(processors, folder, height, width):
    """The reference repeats a picture over the time axis of its patches: frame t of a slice is row t of its own."""
    reference = Qwen2VLImageProcessorPil.from_pretrained(folder, min_pixels=784, max_pixels=16 * 784)
    made, pixels = video(3, height, width), processors["2"].pixels
    times, rows, columns = pixels.video_grid(made)
    out = np.empty((times * rows * columns, pixels.patch_values), np.float32)
    pixels.video_into(made, out)
    slices = out.reshape(times, rows * columns, 3, 2, 14 * 14)
    assert times == 2
    for step, frame in enumerate((0, 1, 2, 2)):  # the last frame fills the last slice
        still = reference(images=[PIL.Image.fromarray(made.frames[frame])], return_tensors="np")
        assert still["image_grid_thw"][0].tolist() == [1, rows, columns]
        want = still["pixel_values"].reshape(rows * columns, 3, 2, -1)[:, :, step % 2]
        np.testing.assert_array_equal(slices[step // 2, :, :, step % 2], want)


@pytest.mark.parametrize("family", ["2", "2.5"])
def test_the_layout_of_a_video_behind_a_picture(processors, noise, family):
    processor = processors[family]
    made = processor.embedding(Content("a kiwi", (noise(84, 56),), (video(5, 56, 56, fps=0.8),)))
    words = processor.token_ids("a kiwi")
    assert made.grids == ((1, 4, 6), (3, 4, 4)) and made.patches == 24 + 48
    assert made.tokens.tolist() == [3, *[6] * 6, 4, 3, *[7] * 12, 4, *words, 2]
    assert not made.ordinary[:22].any() and made.ordinary[22:-1].all()
    units = [plan_image(grid, processor.config.vision).unit_of_token for grid in made.grids]
    assert made.unit[9:21].tolist() == (units[1] + 6).tolist()
    # 1 start, 3 wide, end, start; slices last 2 / 0.8 = 2.5 seconds, Qwen2.5-VL counts 2 positions a second.
    times = made.positions[9:21, 0].reshape(3, 4)
    assert times.tolist() == [[6] * 4, *([[11] * 4, [16] * 4] if family == "2.5" else [[7] * 4, [8] * 4])]
    assert made.positions[21].tolist() == [8] * 3  # behind the longer side, not behind the time


@pytest.mark.parametrize("family", ["2", "2.5"])
def test_rows_see_one_slice_at_a_time(processors, noise, family):
    processor, shown = processors[family], Content("x", (noise(28, 28),), (video(4, 56, 56),))
    ((batch, _),) = embedding_rows([shown], processor, ROWS, VisibilityConfig())
    assert batch["patch_start"][0, :36].tolist() == [0] * 4 + [4] * 16 + [20] * 16
    assert batch["patch_end"][0, :37].tolist() == [4] * 4 + [20] * 16 + [36] * 16 + [0]
    grid = processor.embedding(shown).grids[1]
    out = np.empty((32, 1176), np.float32)
    processor.pixels.video_into(shown.videos[0], out)
    np.testing.assert_array_equal(batch["patches"][0, 4:36], out[plan_image(grid, processor.config.vision).order])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames": np.zeros((0, 28, 28, 3), np.uint8)}, r"uint8 \(0, 28, 28, 3\), expected .* at least one frame"),
        ({"frames": np.zeros((2, 28, 28, 4), np.uint8)}, r"\(2, 28, 28, 4\), expected uint8 \[F, H, W, 3\]"),
        ({"frames": np.zeros((2, 28, 28, 3), np.float32)}, r"float32 .*: decode it to RGB"),
        ({"frames": np.zeros((2, 0, 28, 3), np.uint8)}, r"28x0 pixels, allowed are 1 to .*: leave it out"),
        ({"fps": 0.0}, r"0.0 frames a second: give the rate"),
        ({"fps": float("nan")}, r"nan frames a second: give the rate"),
    ],
)
def test_bad_videos_are_named(processors, change, message):
    with pytest.raises(ImageError, match=rf"^video of 2: .*{message}"):
        processors["2"].embedding(Content(videos=(dataclasses.replace(video(2, 28, 28), **change),)))


def test_block_b_holds_no_video(processors):
    with pytest.raises(ExampleError, match="video of 2: block B holds 1 pictures"):
        processors["2"].bridge(Content("a"), Content("b", videos=(video(2, 28, 28),)))
