"""Bundles of a small made-up kernel: loops, regions, and how often each part runs."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cocoa_jax.profiling.llo import GridCounts, LloError, Program, dumped, read_program


def bundles(first: int, instructions: list[str], depth: int, tag: str = "") -> list[str]:
    """Lines as libtpu prints them; a mark in angle brackets becomes a comment behind the bundle."""
    lines = []
    for place, text in enumerate(instructions):
        body, _, mark = text.partition("<")
        comment = f" /* {mark.rstrip('>')} */" if mark else ""
        head = f"{hex(first + place):>6} {tag if place == 0 else '':>2}: {'> ' * depth}"
        lines.append(f"{head}{{ {body} }}{comment}" if body.strip() else f"{head.replace('>', '')}{{}}{comment}")
    return lines


def region(first: int, name: int, size: int, instruction: str) -> list[str]:
    """A predicated region of ``size`` bundles with the branch over it, and where the branch lands."""
    body = [f"%{i} = {instruction}" for i in range(size)]
    body[0] = f"%9 = sbr.rel (%p1) target = $region{name + 1} <Start region {name}>"
    body[-1] += f" <End region {name}>"
    landing = bundles(first + size, [f"%1 = sadd.s32 1, %2 <Start/End empty region {name + 1}>"], 1, "PF")
    return bundles(first, body, 1) + landing


SIZES = {"begin": 10, "plain": 20, "hidden": 24, "finish": 12}


def kernel(trips: str) -> str:
    """A grid loop with four predicated regions: begin, compute, compute with comparisons, finish."""
    lines = bundles(0, ["%1 = smov 0", "%2 = smov 0", "%3 = smov 0"], 0)
    lines += bundles(3, ["%1 = sadd.s32 1, %2", ""], 1, "LB")  # an empty bundle is printed without its depth
    parts = [
        (10, "begin", "vst [vmem:[%s1]]"),
        (20, "plain", "vmatmul.mubr.bf16 %v1"),
        (30, "hidden", ""),
        (40, "finish", "vst %v2"),
    ]
    for name, part, instruction in parts:
        if part == "hidden":
            made = region(len(lines), name, SIZES[part], "vmatmul.mubr.bf16 %v1")
            made[3] = made[3].replace("vmatmul.mubr.bf16", "vcmp.lt.s32")
        else:
            made = region(len(lines), name, SIZES[part], instruction)
        lines += made
    lines += bundles(len(lines), [f"%5 = scmp.ge.s32.totalorder %s1, {trips} /* loop exit test */", "%6 = sbr.rel"], 1)
    lines += bundles(len(lines), ["%7 = sfence", "%8 = sfence"], 0)
    return "\n".join(lines) + "\n"


STEP = 2 + 4 + 2  # in the loop and outside of its regions: two at the head, four landings, two at the exit
ONCE = 3 + 2


def test_a_kernel_is_cut_by_how_often_its_parts_run():
    parts = Program(kernel("8")).parts
    assert (parts.once, parts.step, parts.trips) == (ONCE, STEP, 8)
    assert (parts.begin, parts.finish) == ((10.0,), (12.0,))
    # The one with comparisons comes last, whatever its place in the kernel.
    assert [(part.cycles, part.compares) for part in parts.compute] == [(20.0, 0), (24.0, 1)]


@given(*[st.integers(0, 50)] * 3, st.integers(1, 9))
def test_cycles_are_runs_times_bundles(plain, hidden, empty, blocks):
    steps = plain + hidden + empty
    counts = GridCounts(steps, (blocks,), (plain, hidden), (blocks,))
    expected = ONCE + (steps + 2) * STEP + 20 * plain + 24 * hidden + blocks * (10 + 12)
    assert Program(kernel("%s4")).kernel_cycles(counts) == expected  # the bound is a register: the data decide


def test_two_cores_share_a_grid_that_the_compiler_has_halved():
    counts = GridCounts(12, (2,), (6, 6), (2,))
    one, two = (Program(kernel(trips)).kernel_cycles(counts) for trips in ("14", "8"))
    assert one - two == 6 * STEP + (6 * 20 + 6 * 24 + 2 * 22) / 2


def test_figures_are_refused_without_counts_that_fit():
    with pytest.raises(LloError, match="no fixed length"):
        Program(kernel("%s4")).issue_cycles()
    with pytest.raises(LloError, match="2 regions of kind 'compute', counts are given for 3"):
        Program(kernel("%s4")).kernel_cycles(GridCounts(1, (1,), (1, 1, 1), (1,)))
    with pytest.raises(LloError, match="the counts say 5 steps"):
        Program(kernel("9")).kernel_cycles(GridCounts(5, (1,), (1, 4), (1,)))


def test_every_loop_of_an_op_is_counted():
    text = bundles(0, ["%1 = smov 0"], 0)
    text += bundles(1, ["%1 = vld"], 1, "LB") + bundles(
        2, ["%1 = vld", "%2 = scmp.ge.s32.totalorder %s1, 5 /* loop exit test"], 2, "LB"
    )
    text += bundles(4, ["%2 = scmp.ge.s32.totalorder %s1, 3 /* loop exit test"], 1)
    assert Program("\n".join(text)).issue_cycles() == 1 + 3 * (2 + 5 * 2)


def test_dumps_are_found_by_the_names_of_their_ops(tmp_path: Path):
    (tmp_path / "17954-fusion.22-03-final_bundles.txt").write_text(kernel("8"))
    (tmp_path / "17954-fusion.22-02-schedule-analysis_final_bundles.txt").write_text("")
    assert list(dumped(tmp_path)) == ["fusion.22"]
    bad = tmp_path / "1-copy-03-final_bundles.txt"
    bad.write_text("nothing")
    with pytest.raises(LloError, match=r"1-copy-03.*no bundles"):
        read_program(bad)
