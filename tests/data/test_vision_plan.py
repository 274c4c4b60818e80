"""Order, positions, spans and M-RoPE against golden files and against transformers itself."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl
from transformers.models.qwen2_vl import modeling_qwen2_vl
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids, get_vision_window_index

from cocoa_jax.data.vision_plan import GridError, VisionRun, plan_image, token_positions
from cocoa_jax.models.config import VisionConfig, parse_config

GOLDEN = Path(__file__).parents[1] / "golden"
FAMILIES = ["qwen2", "qwen2_5"]
IMAGE = 150


def vision_config(window: int, family: str = "2.5") -> VisionConfig:
    return VisionConfig(family, 32, 48, 2, 2, 64, 14, 2, 2, 3, window, (), 2.0)


grids = st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)).map(lambda g: (g[0], 2 * g[1], 2 * g[2]))


@settings(max_examples=60, deadline=None)
@given(grid=grids, side=st.integers(1, 5))
def test_plan_equals_the_reference(grid, side):
    window = side * 28
    thw = torch.tensor([grid])
    index, bounds = get_vision_window_index(thw, 2, window, 14)
    order = (index[:, None] * 4 + torch.arange(4)).reshape(-1)
    plan = plan_image(grid, vision_config(window))
    np.testing.assert_array_equal(plan.order, order)
    np.testing.assert_array_equal(plan.positions, get_vision_position_ids(thw, 2)[order])
    np.testing.assert_array_equal(plan.windows, np.diff(bounds))
    np.testing.assert_array_equal(plan.slices, np.diff(get_vision_cu_seqlens(thw)))
    np.testing.assert_array_equal(plan.unit_of_token, torch.argsort(index))


@given(grid=grids)
def test_family_2_keeps_reading_order(grid):
    plan = plan_image(grid, vision_config(0, "2"))
    np.testing.assert_array_equal(plan.order, np.arange(np.prod(grid)))
    np.testing.assert_array_equal(plan.positions, get_vision_position_ids(torch.tensor([grid]), 2))
    assert plan.windows == () and sum(plan.slices) == np.prod(grid)


@given(grid=grids, side=st.integers(1, 5))
def test_every_unit_is_shown_once_and_windows_stay_small(grid, side):
    plan = plan_image(grid, vision_config(side * 28))
    assert sorted(plan.order) == list(range(np.prod(grid)))
    assert sorted(plan.unit_of_token) == list(range(np.prod(grid) // 4))
    assert max(plan.windows) <= 4 * side**2 and sum(plan.windows) == np.prod(grid)
    start = 0
    for length in plan.windows:
        assert (np.ptp(plan.positions[start : start + length], axis=0) < 2 * side).all()
        start += length


@pytest.mark.parametrize("grid", [(1, 3, 4), (0, 2, 2), (1, 2, 0)])
def test_impossible_grids_are_refused(grid):
    with pytest.raises(GridError, match="multiples of 2"):
        plan_image(grid, vision_config(56))


def test_cached_plans_cannot_be_changed():
    with pytest.raises(ValueError):
        plan_image((1, 4, 4), vision_config(56)).order[0] = 3


def runs_of(ids: np.ndarray, grids: list) -> list:
    runs, remaining, i = [], list(grids), 0
    while i < len(ids):
        j = i
        while j < len(ids) and (ids[j] == IMAGE) == (ids[i] == IMAGE):
            j += 1
        runs.append(VisionRun(tuple(remaining.pop(0))) if ids[i] == IMAGE else j - i)
        i = j
    return runs


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_golden_positions(kind, side):
    golden = np.load(GOLDEN / f"{kind}.{side}.npz")
    vision = read_config_of(kind)
    grids = iter(golden["image_grid_thw"].tolist())
    for row in range(3):
        valid = golden["attention_mask"][row] > 0
        ids = golden["input_ids"][row][valid]
        images = int(np.sum(np.diff(np.r_[0, ids == IMAGE]) == 1))
        mine = token_positions(runs_of(ids, [next(grids) for _ in range(images)]), vision)
        np.testing.assert_array_equal(mine.T, golden["position_ids"][:, row][:, valid])


def read_config_of(kind: str) -> VisionConfig:
    return parse_config(json.loads((GOLDEN / f"{kind}.config.json").read_text())).vision


@pytest.fixture(scope="module")
def reference():
    """The method get_rope_index of both families on a bare object: it reads nothing but the config."""
    classes = {
        "qwen2": (transformers.Qwen2VLConfig, modeling_qwen2_vl.Qwen2VLModel),
        "qwen2_5": (transformers.Qwen2_5_VLConfig, modeling_qwen2_5_vl.Qwen2_5_VLModel),
    }
    bare = {}
    for kind, (config, model) in classes.items():
        bare[kind] = model.__new__(model)
        torch.nn.Module.__init__(bare[kind])
        bare[kind].config = config.from_json_file(str(GOLDEN / f"{kind}.config.json"))
    return bare


runs = st.lists(
    st.tuples(st.integers(1, 5), st.none() | st.tuples(grids, st.none() | st.floats(0.01, 20))),
    min_size=1,
    max_size=4,
)


@pytest.mark.parametrize("kind", FAMILIES)
@settings(max_examples=150, deadline=None)
@given(runs=runs, rate=st.sampled_from([2, 25, 3]))
@example(runs=[(1, ((3, 2, 2), 0.36)), (2, ((1, 4, 6), None))], rate=25)  # 0.36 x 25 in float32 is 9, not 8.99
def test_positions_equal_the_reference(reference, kind, runs, rate):
    """Text before every picture (adjacent pictures are one group to the reference); seconds mean a video."""
    mine, types, stills, videos, seconds = [], [], [], [], []
    vision = read_config_of(kind)
    if kind == "qwen2_5":
        vision = dataclasses.replace(vision, tokens_per_second=float(rate))
        reference[kind].config.vision_config.tokens_per_second = rate
    for text, seen in runs:
        mine.append(text)
        types += [0] * text
        if seen is not None:
            grid, per_slice = seen
            mine.append(VisionRun(grid, per_slice))
            types += [1 if per_slice is None else 2] * (int(np.prod(grid)) // 4)
            (stills if per_slice is None else videos).append(grid)
            seconds += [] if per_slice is None else [per_slice]
    more = {"second_per_grid_ts": torch.tensor(seconds)} if kind == "qwen2_5" and seconds else {}
    expected, _ = reference[kind].get_rope_index(
        torch.zeros(1, len(types), dtype=torch.long),
        torch.tensor([types]),
        image_grid_thw=torch.tensor(stills) if stills else None,
        video_grid_thw=torch.tensor(videos) if videos else None,
        **more,
    )
    np.testing.assert_array_equal(token_positions(mine, vision).T, expected[:, 0])


def test_text_1d_counts_every_token():
    mine = token_positions([2, VisionRun((1, 4, 6)), 3], vision_config(0, "2"), "text_1d")
    np.testing.assert_array_equal(mine, np.repeat(np.arange(11)[:, None], 3, axis=1))


def test_no_tokens_have_no_positions():
    assert token_positions([], vision_config(56)).shape == (0, 3)
