"""How large the gradients of the parts of a model are."""

from __future__ import annotations

import re
from typing import Any

import jax
import optax
from jaxtyping import Array

from cocoa_jax.training.sharding import path_of

# The first that fits a path. The LM head is of the embeddings, to which it is tied in half of the backbones; ``head``
# is what trains beside a backbone.
GROUPS = (
    ("head", r"head/"),
    ("adapter", r"adapter/"),
    ("vision", r"backbone/vision/"),
    ("embeddings", r"backbone/text/(embed|head)/"),
    ("text", r"backbone/text/"),
)


def group_of(path: str) -> str:
    """The name of the group of a parameter by its path, such as ``backbone/text/norm/scale``.

    Raises:
        KeyError: it belongs to none.
    """
    for name, pattern in GROUPS:
        if re.match(pattern, path):
            return name
    raise KeyError(f"no group of gradients for parameter {path}: add it to the table in training/gradients.py")


def group_norms(gradients: Any) -> dict[str, Array]:
    """The norm of the gradients of every group that trains, before clipping, as ``gradient_norm_GROUP``."""
    parts: dict[str, list[Array]] = {}
    for keys, leaf in jax.tree.leaves_with_path(gradients):
        parts.setdefault(group_of(path_of(keys)), []).append(leaf)
    return {f"gradient_norm_{name}": optax.tree.norm(leaves) for name, leaves in parts.items()}
