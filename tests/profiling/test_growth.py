"""No collective of a step grows with the number of chips but those of the embeddings of the batch."""

import pytest
from growth import PAIRS, ROWS, SLOTS, Sent, _lengths, _share, sent, small_backbone, table


def test_arrays_of_examples_are_told_from_others():
    lengths = _lengths(64)
    assert _share("all-gather", "bf16[2,512,1024]{2,1,0:T(8,128)(2,1)S(1)}", lengths) == 0
    assert _share("all-gather", f"(f32[{ROWS * SLOTS},512]{{1,0}}, f32[{64 * ROWS * SLOTS},512]{{1,0}})", lengths) == 1
    # Sent as one: 3,072 x 512 numbers of embeddings and 512 x 512 of a gradient.
    assert _share("all-reduce", f"(f32[{64 * PAIRS},512]{{1,0}}, f32[512,512]{{1,0}}, f32[])", lengths) == (
        pytest.approx(3072 / 3584, rel=1e-5)
    )
    assert _share("all-reduce", "f32[]", lengths) == 0


@pytest.mark.parametrize("chips", [32, 64, 128, 256, 512])
def test_no_parameter_has_such_a_length(chips):
    text, vision = small_backbone().text, small_backbone().vision
    widths = {text.width, text.mlp_width, text.vocab_size, text.layers}
    widths |= {heads * text.head_width for heads in (text.heads, text.kv_heads)}
    widths |= {vision.width, 3 * vision.width, vision.mlp_width, vision.patch_values, 4 * vision.width}
    parts = {width // 16 for width in widths}
    assert not _lengths(chips) & (widths | parts)


def test_a_table():
    row = Sent("3-contrastive", "lora", "v5e:8x8", 64, 1500.2, 900.0, 910.0, {"all-gather": 910.0}, 0)
    assert table([row]).splitlines()[-1] == "| 3-contrastive | lora | v5e:8x8 | 64 | 1,500 | 900 | 910 |"


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("training", ["lora", "full"])
@pytest.mark.parametrize("stage", ["1-warmup", "2-bridge", "3-contrastive"])
def test_four_times_the_chips_send_no_more_each(stage, training):
    few, many = (sent(stage, training, topology) for topology in ("v5e:4x8", "v5e:8x16"))
    assert many.steady == pytest.approx(few.steady, rel=0.001)  # the compiler chooses anew for every slice
    assert few.host == many.host == 0  # nothing in a step speaks with the host
    if stage != "3-contrastive":
        assert few.embeddings == many.embeddings < 1000  # a part of a parameter that is as long
        return
    for one in (few, many):
        # Gathered once in the slots and once in part in order, with the gradient of both; each at most an all-reduce in
        # float32. A matrix of scores would be beyond it.
        assert 0 < one.embeddings <= 6 * one.chips * ROWS * SLOTS * small_backbone().text.width * 4 / 2**10
