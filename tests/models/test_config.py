"""Sizes of a backbone from config.json: both forms, and one clear error for each thing that is wrong."""

import contextlib
import copy
import json

import pytest

from cocoa_jax.models.config import ConfigError, parse_config, read_config

FLAT = {
    "model_type": "qwen2_vl",
    "vocab_size": 151936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "tie_word_embeddings": True,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_config": {
        "depth": 32,
        "embed_dim": 1280,
        "mlp_ratio": 4,
        "num_heads": 16,
        "in_chans": 3,
        "hidden_size": 1536,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
}
NEWER = {
    **FLAT,
    "model_type": "qwen2_5_vl",
    "vision_config": {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 1536,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
    },
}
TEXT_FIELDS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
TEXT_FIELDS += ("num_key_value_heads", "rms_norm_eps")
TEXT_ONLY = ("hidden_act", "layer_types")  # where there are any


def nested(flat: dict) -> dict:
    """The form that transformers 5 writes: a section of text fields, rope_theta inside rope_parameters."""
    values = copy.deepcopy(flat)
    text = {name: values.pop(name) for name in (*TEXT_FIELDS, *TEXT_ONLY) if name in values}
    text["rope_parameters"] = {**values.pop("rope_scaling"), "rope_theta": values.pop("rope_theta")}
    return {**values, "text_config": text}


def changed(values: dict, path: str, value, *, remove: bool = True) -> dict:
    """A copy with one field changed, or (``remove``) removed where the value is None."""
    values = copy.deepcopy(values)
    *sections, name = path.split(".")
    place = values
    for section in sections:
        place = place[section]
    if value is None and remove:
        del place[name]
    else:
        place[name] = value
    return values


@pytest.mark.parametrize("flat", [FLAT, NEWER], ids=["qwen2", "qwen2_5"])
def test_flat_and_nested_forms_say_the_same(flat):
    config = parse_config(flat)
    assert config == parse_config(nested(flat))
    assert (config.text.head_width, config.text.mrope_sections, config.text.rope_theta) == (128, (16, 24, 24), 1e6)
    assert (config.vision.width, config.vision.patch_values, config.vision.unit_patches) == (1280, 1176, 4)
    assert config.image_token == 151655 and config.text.tied_head


def test_the_families_differ_where_they_do():
    older, newer = parse_config(FLAT), parse_config(NEWER)
    assert (older.family, older.vision.mlp_width, older.vision.window, older.vision.full_layers) == ("2", 5120, 0, ())
    assert (newer.family, newer.vision.mlp_width, newer.vision.window) == ("2.5", 3420, 112)
    assert newer.vision.full_layers == (7, 15, 23, 31) and newer.vision.tokens_per_second == 2


def test_a_head_that_is_not_mentioned_is_untied():
    assert not parse_config(changed(FLAT, "tie_word_embeddings", None)).text.tied_head


def test_a_head_width_of_its_own():
    config = parse_config(changed(changed(FLAT, "head_dim", 64), "rope_scaling.mrope_section", [8, 12, 12]))
    assert config.text.head_width == 64


def every_field(values: dict, prefix: str = "") -> list[str]:
    paths = []
    for name, value in values.items():
        paths += every_field(value, f"{prefix}{name}.") if isinstance(value, dict) else [prefix + name]
    return paths


def every_field_and_section(values: dict) -> list[str]:
    return [*every_field(values), *(name for name, value in values.items() if isinstance(value, dict))]


OPTIONAL = {"model_type", "tie_word_embeddings", "vision_config.in_chans", "rope_scaling.type"}


@pytest.mark.parametrize("flat", [FLAT, NEWER], ids=["qwen2", "qwen2_5"])
def test_every_missing_field_is_named(flat):
    for path in sorted(set(every_field(flat)) - OPTIONAL):
        with pytest.raises(ConfigError) as caught:
            parse_config(changed(flat, path, None), "here/config.json")
        assert repr(path.split(".")[-1]) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="here: vision_config lacks the field 'depth'"):
        parse_config(changed(flat, "vision_config.depth", None), "here")
    with pytest.raises(ConfigError, match="lacks the field 'vision_config'"):
        parse_config(changed(flat, "vision_config", None))
    with pytest.raises(ConfigError, match="lacks the field 'rope_scaling'"):
        parse_config(changed(flat, "rope_scaling", None))


@pytest.mark.parametrize("kind", [None, "llama", "qwen2_vl_text", "qwen3_vl"])
def test_another_architecture_is_refused(kind):
    with pytest.raises(ConfigError, match=rf"model_type is {kind!r}, expected one of \['qwen2_5_vl', 'qwen2_vl'\]"):
        parse_config(changed(FLAT, "model_type", kind))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("num_key_value_heads", 5, "12 heads are no multiple of 5"),
        ("rope_scaling.mrope_section", [16, 24, 23], r"M-RoPE sections \(16, 24, 23\) must add up to half .* 128"),
        ("vision_config.num_heads", 15, "vision width 1280 is no multiple of 15 heads"),
        ("vision_config.num_heads", 128, "vision head width 10 is no multiple of 4"),
        ("vision_config.hidden_size", 3584, "vision tower gives width 3584, the text model takes 1536"),
        ("video_token_id", 151655, r"\(151655, 151655, 151652, 151653\) are not different ids below 151936"),
        ("vocab_size", 151655, "are not different ids below 151655"),
    ],
)
def test_sizes_that_contradict_each_other_are_refused(path, value, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(changed(FLAT, path, value))


IMPOSSIBLE = (None, "x", "12", -1, 0, 1.5, True, [], [1], {}, float("nan"), float("inf"))


@pytest.mark.parametrize(
    "values", [FLAT, NEWER, nested(FLAT), nested(NEWER)], ids=["2", "2.5", "nested 2", "nested 2.5"]
)
def test_a_field_with_anything_else_in_it_is_taken_or_named(values):
    """Never another error than a ConfigError, and that of one line which names field, value and remedy."""
    refused = 0
    for path in every_field_and_section(values):
        for wrong in IMPOSSIBLE:
            with contextlib.suppress(ConfigError):
                parse_config(changed(values, path, wrong, remove=False))
                continue
            with pytest.raises(ConfigError) as caught:
                parse_config(changed(values, path, wrong, remove=False), "here")
            told, refused = str(caught.value), refused + 1
            assert told.startswith("here") and "\n" not in told and ": " in told.split(",")[-1], told
            words = (path.split(".")[-1], repr(wrong), "no multiple", "width", "lacks the field")
            assert any(word in told for word in words), (path, wrong, told)
    assert refused > 200
    for whole in (None, [], "x", 3):
        with pytest.raises(ConfigError, match="expected named fields"):
            parse_config(whole)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [lambda values: values, nested], ids=["flat", "nested"])
@pytest.mark.parametrize(
    ("base", "path", "value", "message"),
    [
        (FLAT, "hidden_act", "gelu", "text hidden_act is 'gelu', only 'silu'"),
        (FLAT, "vision_config.hidden_act", "silu", "vision hidden_act is 'silu', only 'quick_gelu'"),
        (NEWER, "vision_config.hidden_act", "quick_gelu", "vision hidden_act is 'quick_gelu', only 'silu'"),
        (NEWER, "rope_scaling.type", "yarn", "type of the text's rope is 'yarn', only 'default' and 'mrope'"),
        (NEWER, "rope_scaling.rope_type", "linear", "rope_type of the text's rope is 'linear'"),
        (NEWER, "vision_config.rope_parameters", {"rope_theta": 5000.0}, "vision rope_theta is 5000.0, only 10000.0"),
        (FLAT, "layer_types", ["full_attention"] * 27 + ["sliding_attention"], "attend by a sliding window"),
    ],
)
def test_what_would_be_computed_otherwise_is_refused(shape, base, path, value, message):
    """Read without a word, each of these would give other states than transformers."""
    with pytest.raises(ConfigError, match=rf"{message}.*: give a checkpoint as it was published"):
        parse_config(shape(changed(base, path, value)))


@pytest.mark.parametrize(("first", "slides"), [(27, True), (28, False), (None, False)])
def test_only_a_window_that_some_layer_has_is_refused(first, slides):
    """Published files carry a window that is turned off; transformers 5.23 agrees on which layers have one."""
    import transformers

    window = {"use_sliding_window": True, "sliding_window": 4096}
    window |= {} if first is None else {"max_window_layers": first}
    theirs = transformers.Qwen2VLConfig(**{**copy.deepcopy(FLAT), **window}).text_config
    assert ("sliding_attention" in theirs.layer_types) == slides
    parse_config({**FLAT, **window, "use_sliding_window": False})
    if slides:
        with pytest.raises(ConfigError, match="sliding window"):
            parse_config({**FLAT, **window})
    else:
        parse_config({**FLAT, **window})


def test_all_contradictions_are_told_at_once():
    values = changed(changed(FLAT, "num_key_value_heads", 5), "vision_config.hidden_size", 1)
    with pytest.raises(ConfigError, match=r"no multiple of 5.*; .*gives width 1"):
        parse_config(values)


def test_a_folder(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no config\.json"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="is not JSON"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(FLAT))
    assert read_config(tmp_path) == parse_config(FLAT)
