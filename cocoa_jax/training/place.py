"""Batches from the host onto the mesh."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import Mesh

from cocoa_jax.training.mesh import replicated, rows_sharding

# Entries of a batch that speak of global rows: every device needs them whole.
GLOBAL = ("example", "target_key", "image_key", "negative_key")


def place(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Put a host's share of a batch onto the mesh: rows spread out, what is global everywhere."""
    rows, everywhere = rows_sharding(mesh), replicated(mesh)
    return {
        name: jax.make_array_from_process_local_data(everywhere if name in GLOBAL else rows, array)
        for name, array in batch.items()
    }
