"""The profile of attention: masks, the work of a span kernel, a real cell, and what the figures are called."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cocoa_jax import cli
from cocoa_jax.attention import flash_tpu, flash_tpu_blocks, flash_tpu_tiles
from cocoa_jax.attention.spans import Spans
from cocoa_jax.attention.tiles import Blocks
from cocoa_jax.chips import CHIPS
from cocoa_jax.profiling import cells as cells_module
from cocoa_jax.profiling.attention import ProfileError, Row, profile_attention
from cocoa_jax.profiling.attention_model import ANY, cell_mask
from cocoa_jax.profiling.cells import Cells, MeasurementError
from cocoa_jax.profiling.hlo import Module
from cocoa_jax.profiling.kernels import (
    Problem,
    SpanCall,
    mean_work,
    reference_candidates,
    span_calls,
    windowed_candidates,
    with_gradient,
)
from cocoa_jax.profiling.masks import MASKS, mask_spans, segment_ids
from cocoa_jax.profiling.model import ModelError, program_cost
from cocoa_jax.profiling.report import attention_markdown, write_attention

KERNEL = """HloModule x

ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %my_kernel.1 = f32[8]{0} custom-call(%p), custom_call_target="tpu_custom_call", metadata={op_name="text/k"}
}
"""


def test_a_kernel_without_counts_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"my_kernel\.1: its time depends on the data; give the number"):
        program_cost(Module(KERNEL), tmp_path, CHIPS["v5e"], {"vision/my_kernel": None, "other": None})


@pytest.mark.parametrize("name", MASKS)
def test_masks_see_what_their_names_say(name):
    total, rows = 64, 2
    spans = mask_spans(name, total, rows)
    mask = np.asarray(spans.as_mask(total))
    assert mask.shape == (rows, total, total)
    ids = segment_ids(name, total)
    same = ids[:, None] == ids[None, :]
    assert not (mask[0] & ~same).any()  # nobody sees another document
    assert len(np.unique(ids)) == (4 if name.startswith("packed") else 1)
    if name in ("full", "packed"):
        assert (mask[0] == same).all()
    if name == "causal":
        assert (mask[0] == np.tri(total, dtype=bool)).all()
    if "bridge" in name:  # the last token of a document sees the bridge and nothing before it
        ends = np.flatnonzero(np.diff(np.append(ids, -1)))
        starts = np.append(0, ends[:-1] + 1)
        at = starts + (ends + 1 - starts) * 3 // 4
        assert (spans.start[0, ends] == at).all()
        assert (spans.end[0, starts] == at + 1).all()


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("backward", [False, True])
def test_the_work_of_a_span_kernel_is_that_of_its_active_tiles(name, backward):
    T, heads, groups, size = 96, 6, 2, 16
    spans = mask_spans(name, T, rows=2)
    work = SpanCall(spans, T, heads, 128, Blocks(size, size), groups, backward, 1).work()
    mask = np.asarray(spans.as_mask(T)).reshape(2, T // size, size, T // size, size).swapaxes(2, 3)
    some, every = mask.any((3, 4)), mask.all((3, 4))
    plain, hidden = work.counts.compute
    assert plain == groups * every.sum()
    # These masks make each query block's active tiles one run, so the list is exactly what somebody sees.
    assert plain + hidden == groups * some.sum()
    assert work.counts.steps == groups * np.maximum(some.sum(-1), 1).sum()
    assert work.flops == (10 if backward else 4) * some.sum() * heads * size * size * 128


def test_a_row_that_sees_nothing_is_written_all_the_same():
    nothing = Spans(np.zeros((1, 64), np.int32), np.zeros((1, 64), np.int32))
    work = SpanCall(nothing, 64, 4, 128, Blocks(32, 32), 2, False, 1).work()
    assert (work.counts.steps, work.counts.compute, work.flops) == (4, (0, 0), 0)


def test_a_pass_in_several_calls_does_the_work_of_one(monkeypatch):
    """A row with more keys than stay in vector memory takes several calls, each charged with their mean."""
    T, kind, size = 1024, "TPU v5 lite", Blocks(128, 128)
    asked = mask_spans("packed-bridge", T), 4, 2, 128, kind, 1
    for module in (flash_tpu, flash_tpu_blocks):
        monkeypatch.setattr(module, "tuning", lambda *_: flash_tpu_blocks.Tuning(size, size, 2))
    (whole,) = span_calls(*asked)["span_attention_backward"]
    monkeypatch.setitem(flash_tpu_blocks.DEVICES, kind, flash_tpu_blocks.Device(2**20, 256))
    monkeypatch.setattr(flash_tpu_tiles, "WORDS", 32)
    calls = span_calls(*asked)
    assert [len(some) for some in calls.values()] == [2, 4]
    q, k = (jax.ShapeDtypeStruct((1, T, heads, 128), jnp.bfloat16) for heads in (4, 2))
    monkeypatch.setattr(flash_tpu, "_device_kind", lambda: kind)
    bound = jax.ShapeDtypeStruct((1, T), jnp.int32)
    program = with_gradient(lambda q, k, v, s: flash_tpu.attend(q, k, v, s, 1.0), True)
    made = []
    for name in ("forward", "backward"):
        kernel = getattr(flash_tpu, name)
        monkeypatch.setattr(flash_tpu, name, lambda *args, of=name, kernel=kernel: made.append(of) or kernel(*args))
    jax.eval_shape(program, q, k, k, bound, bound, q)
    assert made == ["forward"] * 2 + ["backward"] * 4
    mean = mean_work(calls["span_attention_backward"])
    assert mean.flops * 4 == whole.work().flops
    assert np.allclose(np.multiply(mean.counts.compute, 4), whole.work().counts.compute)
    assert mean.counts.steps * 4 >= whole.work().counts.steps  # a block of queries is written in every call
    monkeypatch.setitem(flash_tpu_blocks.DEVICES, kind, flash_tpu_blocks.Device(2**20, 384))
    with pytest.raises(ModelError, match=r"1024 tokens is done in 3 calls.*choose a length that is a multiple of 384"):
        mean_work(span_calls(*asked)["span_attention_backward"])


def test_windows_as_rows_are_the_attention_of_windows():
    problem = Problem("windows", 192, False, 1, 2, 2, 16)
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((1, 192, 2, 16)), jnp.float32) for _ in range(3))
    (windowed,), (dense,) = windowed_candidates(problem, None), reference_candidates(problem, None)
    arrays = q, k, v, problem.spans.start, problem.spans.end, q
    np.testing.assert_allclose(windowed.function(*arrays), dense.function(*arrays), atol=2e-6)  # sums of 64 terms
    for mask, length in (("full", 192), ("windows", 200)):
        with pytest.raises(ValueError, match="ask for mask windows and a multiple of 64"):
            windowed_candidates(Problem(mask, length, False), None)


@pytest.fixture(scope="module")
def modelled(tmp_path_factory):
    """Dense attention at 256 tokens compiled for a v5e, in a process of its own."""
    folder = tmp_path_factory.mktemp("cells")
    return folder, profile_attention("v5e:1x1", [256], ["full"], ["reference"], False, cells=folder)


def test_a_cell_of_the_static_model(modelled):
    _, (row,) = modelled
    assert row.flops == 2 * 2 * 256 * 256 * 128 * 12  # two products, as if there were no mask
    assert 0 < row.issue < 1e-3
    assert row.seconds >= max(row.issue, row.flops / CHIPS["v5e"].peak_flops)
    assert row.kind == "static model"


def test_a_series_is_continued_without_compiling_again(modelled, monkeypatch):
    folder, rows = modelled
    monkeypatch.setattr(cells_module, "_measure", lambda spec: pytest.fail("measured again"))
    asked = "v5e:1x1", [256], ["full"], ["reference"], False
    assert profile_attention(*asked, cells=folder) == rows
    (kept,) = folder.glob("*.json")
    changed = json.loads(kept.read_text())
    changed["versions"]["code"] = "older"
    kept.write_text(json.dumps(changed))
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        profile_attention(*asked, cells=folder)


def test_a_measurement_that_fails_says_why():
    spec = {"program": "attention", "topology": "v5e:1x1", "implementation": "reference"}
    with pytest.raises(MeasurementError, match=r"attention_v5e-1x1_reference: KeyError"):
        Cells(None).get(spec)


def row(kind: str, implementation: str, seconds: float) -> Row:
    figures = {"flops": 1e9, "bytes": 1e6, "temporary": 1e6, "issue": 1e-4, "seconds": seconds, "around": 0.0}
    named = {"kind": kind, "device": "v5e:1x1", "implementation": implementation, "mask": "full", "length": 1024}
    asked = {"backward": False, "rows": 1, "heads": 12, "kv_heads": 2, "width": 128}
    tiles = {"blocks": "", "visited": 1, "total": 4, "masked": 1}
    return Row(**named, **asked, **tiles, **figures, to_splash=seconds / 1e-3, bundles={})


def test_a_model_is_never_called_a_measurement(tmp_path):
    rows = [row("static model", "splash", 1e-3), row("static model", "flash_tpu", 5e-4)]
    text = attention_markdown(rows)
    assert "static model ms" in text and "measured" not in text.lower() and "faster" not in text
    measured = attention_markdown([row("measured", "splash", 1e-3)])
    assert "measured ms" in measured and "static model" not in measured
    paths = write_attention(rows, tmp_path)
    assert [path.suffix for path in paths] == [".md", ".json", ".svg"]
    assert "not measured" in paths[2].read_text().replace("<!-- ", "")
    assert json.loads(paths[1].read_text())[1]["to_splash"] == 0.5


def test_what_is_here_is_measured():
    (found,) = profile_attention(None, [64], ["packed-bridge"], ["reference"], True)
    assert (found.kind, found.device.split()[0]) == ("measured", jax.default_backend())
    assert found.seconds > 0 and found.issue == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology", "v5e:3x3"], "topology 'v5e:3x3' is unknown: choose one of"),
        (["--topology", "v5e:1x1", "--masks", "diagonal"], "mask 'diagonal' is unknown here: choose from full"),
        (["--topology", "v5e:1x1", "--implementations", "blockwise"], "implementation 'blockwise' is unknown here"),
        (["--device", "--implementations", "splash"], "'splash' runs on TPUs, this is a cpu"),
        ([], "give either --topology, such as v5e:1x1, or --device"),
        (["--device", "--topology", "v5e:1x1"], "give either --topology"),
        (["--device", "--lengths", "many"], "--lengths is 'many': give numbers"),
        (["--device", "--heads", "12"], "--heads is '12': give query heads and key heads, such as 12,2"),
        (["--device", "--heads", "12,5"], "heads 12,5: give query heads, and key heads that divide them"),
        (["--topology", "v5e:1x1", "--implementations", "windowed"], "'windowed' is for mask 'windows' alone"),
    ],
)
def test_the_command_refuses_in_one_line(arguments, message, capsys):
    given = arguments if "--implementations" in arguments else [*arguments, "--implementations", "reference"]
    with pytest.raises(SystemExit) as stopped:
        cli.main(["profile", "attention", *given])
    said = capsys.readouterr().err.strip()
    assert stopped.value.code == 1
    assert message in said and "\n" not in said


def test_the_command_prints_the_table(capsys):
    cli.main(
        ["profile", "attention", "--device", "--lengths", "32", "--masks", "full", "--implementations", "reference"]
    )
    assert "| full | 32 | reference |" in capsys.readouterr().out


def test_an_unknown_mask_is_refused():
    with pytest.raises(ValueError, match="mask 'x' is unknown: choose from full, causal"):
        mask_spans("x", 8)
    with pytest.raises(ProfileError, match="give positive numbers"):
        profile_attention(None, [0], ["full"], ["reference"], False)
    assert jnp.asarray(mask_spans("full", 8).end).tolist() == [[8] * 8]


def test_which_masks_share_a_compilation():
    cells = {mask: cell_mask("splash", mask) for mask in ("full", "causal", "bridge", "packed-bridge")}
    assert cells == {"full": "full", "causal": "causal", "bridge": "full", "packed-bridge": "full"}
    assert {cell_mask("flash_tpu", mask) for mask in cells} == {ANY}
