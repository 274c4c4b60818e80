"""What transformers says of a layout: every state of both towers, logits, loss and gradients."""

from __future__ import annotations

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from typing import Any

import numpy as np
import torch
import transformers
from layouts import Layout
from sizes import random_tensor
from transformers.initialization import no_init_weights

from cocoa_jax.checkpoints.hub_layout import hub_key

_MODELS = {
    "qwen2_vl": (transformers.Qwen2VLConfig, transformers.Qwen2VLForConditionalGeneration),
    "qwen2_5_vl": (transformers.Qwen2_5_VLConfig, transformers.Qwen2_5_VLForConditionalGeneration),
}


def make_model(
    values: dict[str, Any], seed: int, *, dtype: torch.dtype = torch.float32, attention: str = "sdpa"
) -> torch.nn.Module:
    """A model whose weights are those of ``random_params``; made in ``dtype``, so that rotary tables stay float32."""
    make_config, make = _MODELS[values["model_type"]]
    config = make_config(**values)
    config._attn_implementation = attention
    with no_init_weights():
        model = make._from_config(config, dtype=dtype).eval()
    model.tie_weights()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(random_tensor(hub_key(name), tuple(parameter.shape), seed)))
    return model


def positions(model: torch.nn.Module, layout: Layout) -> np.ndarray:
    """M-RoPE positions of every slot by ``get_rope_index``, [B, T, 3]."""
    names = ("input_ids", "attention_mask", "mm_token_type_ids", "image_grid_thw", "video_grid_thw")
    names += ("second_per_grid_ts",)
    given = {name: torch.from_numpy(layout.theirs[name]) for name in names if name in layout.theirs}
    return model.model.get_rope_index(**given)[0].permute(1, 2, 0).numpy()


def additive(layout: Layout, mask: str, dtype: torch.dtype) -> torch.Tensor:
    """The 4-D mask that is added to the scores."""
    allowed = torch.from_numpy(layout.spans(mask).as_mask(layout.real.shape[1]))[:, None]
    return torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)


def arguments(model: torch.nn.Module, layout: Layout, mask: str) -> dict[str, torch.Tensor]:
    """Causal: what any user of transformers passes, positions and mask left to the model. Else a 4-D mask."""
    given = {name: torch.from_numpy(value) for name, value in layout.theirs.items()}
    if mask != "causal":
        del given["mm_token_type_ids"]
        given.pop("second_per_grid_ts", None)
        given["position_ids"] = torch.from_numpy(positions(model, layout)).permute(2, 0, 1)
        given["attention_mask"] = additive(layout, mask, model.dtype)
    elif "image_grid_thw" not in given and "video_grid_thw" not in given:
        # Text alone: transformers would count padding, too, without these.
        given["position_ids"] = torch.from_numpy(layout.batch["positions"]).permute(2, 0, 1).long()
    return given


def states(model: torch.nn.Module, layout: Layout, mask: str) -> dict[str, np.ndarray]:
    """Every state of both towers and the logits, float32; vision states lack where nothing is seen.

    ``vision{i}`` enters layer i of the tower, ``vision`` leaves the last; ``hidden{i}`` likewise, ``hidden`` having
    passed the final norm.
    """
    found: dict[str, list[torch.Tensor]] = {}
    with torch.no_grad():
        for pixels, grids in (("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw")):
            if pixels in layout.theirs:
                for name, value in _vision(model, layout.theirs[pixels], layout.theirs[grids]).items():
                    found.setdefault(name, []).append(value)
        out = model(**arguments(model, layout, mask), output_hidden_states=True, use_cache=False)
    *entered, last = out.hidden_states
    made = {name: torch.cat(parts) for name, parts in found.items()}
    made |= {f"hidden{i}": x for i, x in enumerate(entered)} | {"hidden": last, "logits": out.logits}
    return {name: value.float().numpy() for name, value in made.items()}


def _vision(model: torch.nn.Module, pixels: np.ndarray, grids: np.ndarray) -> dict[str, torch.Tensor]:
    entered: list[torch.Tensor] = []
    tower = model.model.visual
    hooks = [
        block.register_forward_pre_hook(lambda _, args: entered.append(args[0].detach())) for block in tower.blocks
    ]
    seen = tower(torch.from_numpy(pixels).to(model.dtype), grid_thw=torch.from_numpy(grids))
    for hook in hooks:
        hook.remove()
    made = {f"vision{i}": x for i, x in enumerate(entered)}
    return made | {"vision": seen.last_hidden_state, "merged": seen.pooler_output}


def loss_and_gradients(
    model: torch.nn.Module, layout: Layout, mask: str, at: np.ndarray, ids: np.ndarray
) -> tuple[float, dict[str, float]]:
    """The mean cross-entropy of ``ids`` at columns ``at`` (-1: unused), and every gradient's norm by hub key."""
    model.zero_grad()
    logits = model(**arguments(model, layout, mask), use_cache=False).logits
    rows, slots = np.nonzero(at >= 0)
    chosen = logits[torch.from_numpy(rows), torch.from_numpy(at[rows, slots]).long()].float()
    loss = torch.nn.functional.cross_entropy(chosen, torch.from_numpy(ids[rows, slots]).long())
    loss.backward()
    named = ((hub_key(name), parameter.grad) for name, parameter in model.named_parameters())
    norms = {key: float(gradient.double().norm()) for key, gradient in named if gradient is not None}
    return float(loss.detach()), norms
