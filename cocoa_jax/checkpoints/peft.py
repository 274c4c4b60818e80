"""Adapters in the form of PEFT, both ways: ``adapter_config.json`` and ``adapter_model.safetensors``.

Of a stage, the tokenizer lies beside them: that of what it is put on may lack tokens.

Names are those of the hub's table (``hub_layout``); a stacked array of ours is one tensor per layer there, [r, in] and
[out, r] where ours are [in, r] and [r, out]. Written for transformers 5, read in the names of either layout.
Source: PEFT 0.21, LoraConfig and get_peft_model_state_dict.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from cocoa_jax.checkpoints.added_tokens import copy_tokenizer, token_ids
from cocoa_jax.checkpoints.aside import written_aside
from cocoa_jax.checkpoints.backbone import Backbone, open_backbone
from cocoa_jax.checkpoints.errors import CheckpointError
from cocoa_jax.checkpoints.hub_layout import hub_key, plan, raise_problems
from cocoa_jax.checkpoints.orbax import base_folder, read_metadata
from cocoa_jax.checkpoints.stream import with_newest
from cocoa_jax.models.config import Qwen2VLConfig
from cocoa_jax.models.lora import AdapterRecord, LoraConfig, LoraError, adapted_maps
from cocoa_jax.models.qwen2_vl import Params, abstract_params

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_ROWS = "trainable_tokens_delta"
_EMBED = "model.embed_tokens"
_KINDS = {"a": "lora_A.weight", "b": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
_NAME = re.compile(
    rf"({re.escape(_PREFIX)})?(?P<module>.+?)\.(?P<kind>lora_A|lora_B|lora_magnitude_vector|(token_adapter\.)?{_ROWS})"
    r"(\.default)?(\.weight)?"
)
# Fields of adapter_config.json that change what an adapter computes, and the values under which they do not.
_OFF: tuple[Any, ...] = (None, False, {}, [])
_ONLY_OFF = (
    "rank_pattern alpha_pattern modules_to_save layer_replication target_parameters megatron_config arrow_config "
    "layers_to_transform alora_invocation_tokens use_qalora use_bdlora kasa_config monteclora_config velora_config"
)
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "lora_bias": (False,),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),  # the others change the base too
    **dict.fromkeys(_ONLY_OFF.split(), _OFF),
}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


_MOST_RANK = 2**16  # wider than any map
_FLAG = ("true or false", lambda value: isinstance(value, bool))
_FORMS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "r": (
        f"a whole number from 1 to {_MOST_RANK}",
        lambda value: isinstance(value, int) and _is_number(value) and 0 < value <= _MOST_RANK,
    ),
    "lora_alpha": ("a number above 0", lambda value: _is_number(value) and 0 < value < float("inf")),
    "lora_dropout": ("a number from 0 to below 1", lambda value: _is_number(value) and 0 <= value < 1),
    "use_dora": _FLAG,
    "use_rslora": _FLAG,
}


@dataclasses.dataclass(frozen=True)
class _Module:
    """A linear map of the hub in our tree: its dotted path, and the layer where it is stacked."""

    path: str
    layer: int | None


def _modules(sizes: Qwen2VLConfig) -> dict[str, _Module]:
    """Every linear map by the name that it has on the hub."""
    vision = sizes.vision
    patch = (vision.channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    return {
        key.removesuffix(".weight"): _Module(slot.path.removesuffix(".kernel"), slot.layer)
        for key, slot in plan(abstract_params(sizes), patch).items()
        if slot.path.endswith(".kernel")
    }


def _newer(module: str) -> str:
    """The name that transformers 5 has in memory for one of the hub."""
    return f"model.{module}" if module.startswith("visual.") else module.replace("model.", "model.language_model.", 1)


# ------------------------------------------------------------------------------------------------------------- saving


def save_adapter(
    folder: str | Path,
    adapter: Params,
    record: AdapterRecord,
    sizes: Qwen2VLConfig,
    base: str | None = None,
    tokenizer_source_folder: str | Path | None = None,
) -> None:
    """Write an adapter as PEFT does; the folder appears whole or not at all.

    Args:
        folder: must not exist, or be empty.
        adapter: the arrays, as ``models/lora.py`` describes them.
        base: what the adapter belongs to: a folder or a name on the hub.
        tokenizer_source_folder: whose tokenizer files are carried along, None for none.

    Raises:
        CheckpointError: the destination is taken, or the disk is too small.
    """
    tensors = dict(_tensors(adapter, _modules(sizes)))
    with written_aside(Path(folder), sum(tensor.nbytes for tensor in tensors.values())) as partial:
        (partial / CONFIG_FILE).write_text(json.dumps(_config_of(record, sizes, base), indent=2, sort_keys=True) + "\n")
        save_file(tensors, partial / WEIGHTS_FILE, metadata={"format": "pt"})
        if tokenizer_source_folder is not None:
            copy_tokenizer(tokenizer_source_folder, partial)


def _tensors(adapter: Params, modules: Mapping[str, _Module]) -> Iterator[tuple[str, np.ndarray]]:
    leaves = {path: np.asarray(leaf, np.float32) for path, leaf in flatten_dict(adapter, sep=".").items()}
    if "text.embed.rows" in leaves:
        yield f"{_PREFIX}{_newer(_EMBED)}.token_adapter.{_ROWS}", leaves["text.embed.rows"]
    for name, module in modules.items():
        for ours, theirs in _KINDS.items():
            leaf = leaves.get(f"{module.path}.{ours}")
            if leaf is not None:
                tensor = leaf if module.layer is None else leaf[module.layer]
                yield f"{_PREFIX}{_newer(name)}.{theirs}", np.ascontiguousarray(tensor.T)


def _config_of(record: AdapterRecord, sizes: Qwen2VLConfig, base: str | None) -> dict[str, Any]:
    config = record.config
    paths = adapted_maps(abstract_params(sizes), config)
    names = {name for name, module in _modules(sizes).items() if module.path in paths}
    # What follows the tower's own name, any layer: the same in both layouts, and different for the two towers.
    ends = {re.sub(r"\\\.\d+\\\.", r"\\.\\d+\\.", re.escape(name.split(".", 1)[1]), count=1) for name in names}
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "task_type": None,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "use_dora": config.dora,
        "use_rslora": False,
        "init_lora_weights": "gaussian",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": rf"(.*\.)?({'|'.join(sorted(ends))})",
        "trainable_token_indices": list(record.rows) or None,
    }


# ------------------------------------------------------------------------------------------------------------ loading


def load_adapter(folder: str | Path, sizes: Qwen2VLConfig) -> tuple[AdapterRecord, Params]:
    """Read an adapter of PEFT for a backbone of these sizes: its settings and its arrays, float32.

    Raises:
        CheckpointError: files that are missing or damaged, settings that are not LoRA's or DoRA's, and tensors that
            are missing, unexpected, given twice or of another shape, as those of another base are: all in one error.
    """
    folder = Path(folder)
    values = _read_config(folder / CONFIG_FILE)
    problems = [
        f"{CONFIG_FILE}: {name} is {values[name]!r}, only {allowed[0]!r} is supported"
        for name, allowed in _PLAIN.items()
        if name in values and values[name] not in allowed
    ]
    rows = _rows_of(values.get("trainable_token_indices"), sizes.text.vocab_size, problems)
    rank, dora = values["r"], values.get("use_dora", False)
    alpha = values["lora_alpha"] * (rank**0.5 if values.get("use_rslora") else 1)  # rsLoRA divides by the root of r
    tensors = _read_tensors(folder / WEIGHTS_FILE, problems)
    leaves = _stacked(tensors, sizes, rank, dora, rows, problems)
    raise_problems(f"{folder} is no adapter for this backbone", problems)
    paths = sorted({path.rsplit(".", 1)[0] for path in leaves} - {"text.embed"})
    try:
        config = LoraConfig(
            targets=tuple(re.escape(path) for path in paths),
            rank=rank,
            alpha=float(alpha),
            dropout=float(values.get("lora_dropout", 0)),
            dora=dora,
            tokens=bool(rows),
        )
        adapted_maps(abstract_params(sizes), config)
    except LoraError as error:
        raise CheckpointError(f"{folder} is no adapter for this backbone: {error}") from error
    return AdapterRecord(config, rows), unflatten_dict(leaves, sep=".")


def _read_config(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
        missing = sorted({"peft_type", "r", "lora_alpha"} - values.keys())
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): give the folder of a PEFT adapter") from None
    wrong = [
        f"has {name} = {values[name]!r}, expected {wanted}"
        for name, (wanted, fits) in _FORMS.items()
        if name in values and not fits(values[name])
    ]
    if missing or wrong:
        what = f"lacks {missing}" if missing else " and ".join(wrong)
        raise CheckpointError(f"{path} {what}: give the folder of a LoRA or DoRA adapter")
    return values


def _rows_of(indices: Any, vocabulary: int, problems: list[str]) -> tuple[int, ...]:
    """The ids whose rows an adapter trains: a list, or a list by the name of the embedding."""
    if isinstance(indices, dict):
        others = [name for name in indices if name.rsplit(".", 1)[-1] != "embed_tokens"]
        problems += [f"{CONFIG_FILE}: trainable_token_indices of {name}, only of embed_tokens" for name in others]
        indices = next((part for name, part in indices.items() if name not in others), None)
    if indices is not None and not isinstance(indices, list):
        problems.append(f"{CONFIG_FILE}: trainable_token_indices is {indices!r}, expected a list of ids")
        return ()
    rows = tuple(indices or ())
    if any(not isinstance(row, int) or not 0 <= row < vocabulary for row in rows) or len(set(rows)) < len(rows):
        problems.append(f"{CONFIG_FILE}: trainable_token_indices {list(rows)} are not different ids below {vocabulary}")
    return rows


def _read_tensors(path: Path, problems: list[str]) -> dict[tuple[str, str], np.ndarray]:
    """Tensors by the hub's name of their module and what they are (the end of their own name)."""
    found: dict[tuple[str, str], np.ndarray] = {}
    try:
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                match = _NAME.fullmatch(name)
                key = (hub_key(match["module"]), match["kind"].removeprefix("token_adapter.")) if match else None
                if key is None or key in found:
                    problems.append(f"{name}: {'unexpected' if key is None else 'the same tensor is there twice'}")
                else:
                    found[key] = file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        problems.append(f"{path.name}: cannot be read ({error}): copy the file again")
    return found


def _stacked(
    tensors: dict[tuple[str, str], np.ndarray],
    sizes: Qwen2VLConfig,
    rank: int,
    dora: bool,
    rows: tuple[int, ...],
    problems: list[str],
) -> dict[str, np.ndarray]:
    """Our leaves by their paths, filled from the tensors; whatever does not fit is added to ``problems``."""
    modules, params = _modules(sizes), flatten_dict(abstract_params(sizes), sep=".")
    used = {modules[name].path for name, kind in tensors if name in modules and kind != _ROWS}
    leaves: dict[str, np.ndarray] = {}
    for name, module in modules.items():
        if module.path not in used:
            continue
        *stack, inputs, outputs = params[f"{module.path}.kernel"].shape
        shapes = {"a": (inputs, rank), "b": (rank, outputs), **({"magnitude": (outputs,)} if dora else {})}
        for ours, shape in shapes.items():
            leaf = leaves.setdefault(f"{module.path}.{ours}", np.zeros((*stack, *shape), np.float32))
            kind = _KINDS[ours].removesuffix(".weight")
            tensor = _take(tensors, (name, kind), shape[::-1], problems)
            if tensor is not None:
                leaf[... if module.layer is None else module.layer] = tensor.T
    if rows:
        table = _take(tensors, (_EMBED, _ROWS), (len(rows), sizes.text.width), problems)
        if table is not None:
            leaves["text.embed.rows"] = table.astype(np.float32)
    problems += [
        f"{name}.{kind}: unexpected, the backbone or the settings have no place for it" for name, kind in tensors
    ]
    return leaves


def _take(
    tensors: dict[tuple[str, str], np.ndarray], key: tuple[str, str], shape: tuple[int, ...], problems: list[str]
) -> np.ndarray | None:
    """Remove one tensor from ``tensors``, or say what is wrong with it."""
    name, tensor = ".".join(key), tensors.pop(key, None)
    if tensor is None:
        problems.append(f"{name}: missing, wanted {list(shape)}")
    elif tensor.shape != shape:
        problems.append(f"{name}: shape {list(tensor.shape)}, wanted {list(shape)}")
    return tensor if tensor is not None and tensor.shape == shape else None


# -------------------------------------------------------------------------------------------------- whole checkpoints


def export_adapter(stage: str | Path, folder: str | Path) -> None:
    """What a stage trained instead of its backbone, as a folder of PEFT with the tokenizer of the stage.

    Raises:
        CheckpointError: the stage trained no adapter, or the destination is taken.
    """
    backbone = open_backbone(stage)
    record, adapter = backbone.adapter()
    metadata = read_metadata(stage)
    if not record.rows and (added := _added(backbone, metadata)):
        record, adapter = _with_rows(backbone, record, adapter, added)
    save_adapter(folder, adapter, record, backbone.config, metadata["parent"]["path"], backbone.side_files)


def _added(backbone: Backbone, metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """Ids of the tokens that what the stage began from lacks; of a stage that does not say, all that it may lack."""
    if "added" in metadata["parent"]:
        return tuple(sorted(metadata["parent"]["added"].values()))
    settings = metadata["config"]["data"]["processor"]
    return tuple(sorted(token_ids(backbone.side_files, {settings["mask_token"], *settings["bridge_tokens"]})))


def _with_rows(
    backbone: Backbone, record: AdapterRecord, adapter: Params, rows: tuple[int, ...]
) -> tuple[AdapterRecord, Params]:
    """The adapter with rows of its frozen weights: those that the run began from have others of added tokens."""
    found = []

    def take(params: dict[str, Any]) -> None:
        found.append(np.asarray(params["text"]["embed"]["table"])[list(rows)].astype(np.float32))

    with_newest(base_folder(backbone.path), abstract_params(backbone.config), take)
    config = dataclasses.replace(record.config, tokens=True)
    text = {**adapter.get("text", {}), "embed": {"rows": found[-1]}}
    return AdapterRecord(config, rows), {**adapter, "text": text}
