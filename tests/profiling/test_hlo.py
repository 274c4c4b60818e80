"""FLOPs, bytes and runs from a small HLO text."""

import pytest

from cocoa_jax.profiling.hlo import Module

TEXT = """HloModule small, is_scheduled=true

%fused (p0: bf16[4,8,16], p1: s32[], p2: bf16[16,32]) -> bf16[8,32] {
  %p0 = bf16[4,8,16]{2,1,0} parameter(0)
  %p1 = s32[]{:T(128)} parameter(1)
  %zero = s32[] constant(0)
  %row = bf16[1,8,16]{2,1,0} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,8,16}
  %flat = bf16[8,16]{1,0} bitcast(%row)
  %p2 = bf16[16,32]{1,0} parameter(2)
  ROOT %conv = bf16[8,32]{1,0:T(8,128)(2,1)} convolution(%flat, %p2), dim_labels=bf_io->bf
}

%body (carry: (s32[], bf16[4,8,16], bf16[16,32])) -> (s32[], bf16[4,8,16], bf16[16,32]) {
  %carry = (s32[], bf16[4,8,16]{2,1,0}, bf16[16,32]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  %x = bf16[4,8,16]{2,1,0} get-tuple-element(%carry), index=1
  %w = bf16[16,32]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%carry), index=2
  %y = bf16[8,32]{1,0:T(8,128)(2,1)} fusion(%x, %i, %w), kind=kOutput, calls=%fused
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  ROOT %out = (s32[], bf16[4,8,16]{2,1,0}, bf16[16,32]{1,0}) tuple(%next, %x, %w)
}

%condition (carry.1: (s32[], bf16[4,8,16], bf16[16,32])) -> pred[] {
  %limit = s32[]{:T(128)} constant(14)
  %carry.1 = (s32[], bf16[4,8,16]{2,1,0}, bf16[16,32]{1,0}) parameter(0)
  %at = s32[] get-tuple-element(%carry.1), index=0
  ROOT %less = pred[] compare(%at, %limit), direction=LT
}

ENTRY %main (a: bf16[4,8,16], b: bf16[16,32]) -> bf16[4,8,16] {
  %a = bf16[4,8,16]{2,1,0} parameter(0)
  %b = bf16[16,32]{1,0} parameter(1)
  %start = s32[] constant(0)
  %all = (s32[], bf16[4,8,16]{2,1,0}, bf16[16,32]{1,0}) tuple(%start, %a, %b)
  %loop = (s32[], bf16[4,8,16]{2,1,0}, bf16[16,32]{1,0}) while(%all), condition=%condition, body=%body
  ROOT %end = bf16[4,8,16]{2,1,0} get-tuple-element(%loop), index=1
}
"""


def one(module: Module, where: str, name: str):
    return next(op for op in module.computations[where] if op.name == name)


def test_a_loop_runs_its_bound_divided_by_its_step():
    module = Module(TEXT)
    assert module.runs["body"] == 7
    assert Module(TEXT.replace("direction=LT", "direction=GT")).runs["body"] == 1
    known = TEXT.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"5"}}')
    assert Module(known).runs["body"] == 5


def test_an_update_in_place_writes_its_part_beside_another_output():
    stack = "bf16[4,8,16]{2,1,0}"
    parts = TEXT.replace("ROOT %conv = ", "%conv = ").replace(
        "dim_labels=bf_io->bf\n}",
        """dim_labels=bf_io->bf
  %kept = bf16[1,8,16]{2,1,0} bitcast(%flat)
  %stack = STACK dynamic-update-slice(%p0, %kept, %p1, %zero, %zero)
  %same = STACK bitcast(%stack)
  ROOT %both = (STACK, bf16[8,32]{1,0:T(8,128)(2,1)}) tuple(%same, %conv)
}""".replace("STACK", stack),
    )
    text = parts.replace(
        "%y = bf16[8,32]{1,0:T(8,128)(2,1)} fusion", f"%y = ({stack}, bf16[8,32]{{1,0:T(8,128)(2,1)}}) fusion"
    )
    module = Module(text)
    fusion = one(module, "body", "y")
    # One slice of the stack is read and one written, beside the product and the index.
    assert module.hbm_bytes("body", fusion) == 2 * (8 * 16 + 8 * 16 + 8 * 32) + 4
    whole = Module(text.replace("tuple(%same, %conv)", "tuple(%p0, %conv)"))
    assert whole.hbm_bytes("body", one(whole, "body", "y")) > 2 * 4 * 8 * 16


def test_room_that_is_set_aside_is_not_written():
    text = TEXT.replace(
        "  %start = s32[]",
        '  %room = bf16[4,8,16]{2,1,0} custom-call(), custom_call_target="AllocateBuffer"\n  %start = s32[]',
    )
    module = Module(text)
    assert module.hbm_bytes("main", one(module, "main", "room")) == 0
    other = Module(text.replace("AllocateBuffer", "Sort"))
    assert other.hbm_bytes("main", one(other, "main", "room")) == 2 * 4 * 8 * 16


def test_a_fusion_has_the_products_and_the_bytes_of_its_parts():
    module = Module(TEXT)
    fusion = one(module, "body", "y")
    assert module.flops("body", fusion) == 2 * 8 * 16 * 32
    # It reads one slice of x, nothing of w, which lies in VMEM, and writes y; the index is four bytes.
    assert module.hbm_bytes("body", fusion) == 2 * (8 * 16 + 8 * 32) + 4


def test_a_slice_in_a_fusion_inside_of_a_fusion_is_all_that_it_reads():
    taken = TEXT[TEXT.index("  %zero") : TEXT.index("  %p2")]
    head, _, rest = TEXT.partition("%fused")
    inner = f"""%inner (p0: bf16[4,8,16], p1: s32[]) -> bf16[8,16] {{
  %p0 = bf16[4,8,16]{{2,1,0}} parameter(0)
  %p1 = s32[]{{:T(128)}} parameter(1)
{taken.replace("%flat", "ROOT %flat")}}}

"""
    call = "  %flat = bf16[8,16]{1,0} fusion(%p0, %p1), kind=kLoop, calls=%inner\n"
    text = head + inner + "%fused" + rest.replace(taken, call)
    module = Module(text)
    assert module.hbm_bytes("body", one(module, "body", "y")) == 2 * (8 * 16 + 8 * 32) + 4
    whole = Module(text.replace("dynamic-slice(%p0, %p1, %zero, %zero)", "negate(%p0)"))
    assert whole.hbm_bytes("body", one(whole, "body", "y")) >= 2 * 4 * 8 * 16


DILATED = "window={size=6 stride=5 lhs_dilate=6}, dim_labels=0bf_0io->0bf"
REVERSED = "window={size=6 stride=6 pad=5_5 lhs_dilate=5 rhs_reversal=1}, dim_labels=0bf_0io->0bf"
PLAIN = "lhs_batch_dims={0}, rhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_contracting_dims={1}"


@pytest.mark.parametrize(("kind", "how"), [("convolution", DILATED), ("convolution", REVERSED), ("dot", PLAIN)])
def test_padding_is_no_work(kind, how):
    # Six products [5, 7] x [7, 3]; XLA writes the batch as a convolution that slides over it with much padding.
    text = f"""HloModule x

ENTRY %main (l: f32[6,5,7], r: f32[6,7,3]) -> f32[6,5,3] {{
  %l = f32[6,5,7]{{2,1,0}} parameter(0)
  %r = f32[6,7,3]{{2,1,0}} parameter(1)
  ROOT %o = f32[6,5,3]{{2,1,0}} {kind}(%l, %r), {how}
}}
"""
    module = Module(text)
    assert module.flops("main", one(module, "main", "o")) == 2 * 6 * 5 * 7 * 3


@pytest.mark.parametrize(
    ("line", "moved"),
    [
        ("(bf16[64]{0}, bf16[64]{0}, u32[]{:S(2)}) collective-permute-start(%p)", 2 * 128),
        ("(bf16[64]{0}, bf16[64]{0:S(1)}, u32[]{:S(2)}) collective-permute-start(%p)", 128),
        ("(bf16[64]{0}, u32[]{:S(2)}, token[]) send(%p, %t)", 128),
        ("(bf16[64]{0}, u32[]{:S(2)}, token[]) recv(%t)", 128),
        ("bf16[64]{0} all-reduce-start(%p)", 2 * 128),
        ("(bf16[64]{0}, bf16[256]{0}) all-gather-start(%p)", 128 + 512),
    ],
)
def test_what_starts_moves_its_data_once(line, moved):
    head = "HloModule x\n\nENTRY %main (p: bf16[64]) -> bf16[64] {\n  %p = bf16[64]{0} parameter(0)\n"
    module = Module(f"{head}  ROOT %s = {line}\n}}\n")
    op = one(module, "main", "s")
    assert op.starts and module.hbm_bytes("main", op) == moved


def test_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        Module("HloModule nothing")
