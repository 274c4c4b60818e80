"""Tokens that the method needs and a published tokenizer lacks, in rows of the embedding that nothing uses."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from tokenizers import AddedToken, Tokenizer

from cocoa_jax.checkpoints.errors import CheckpointError
from cocoa_jax.models.qwen2_vl import Params

_FLAGS = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}


def add_to_tokenizer(folder: str | Path, added: Mapping[str, int]) -> None:
    """Write tokens into the tokenizer files of a folder, so that every program that reads them knows the same ids.

    Raises:
        CheckpointError: the tokenizer would give a token another id.
    """
    if not added:
        return
    tokenizer = _tokenizer_of(Path(folder))
    for text, number in sorted(added.items(), key=lambda item: item[1]):
        tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False)])
        found = tokenizer.token_to_id(text)
        if found != number:
            raise CheckpointError(
                f"{text!r} would be token {found} of {folder}, not {number}: name a token that the tokenizer has"
            )
    tokenizer.save(str(Path(folder, "tokenizer.json")))
    path = Path(folder, "tokenizer_config.json")
    if path.is_file():
        values: dict[str, Any] = json.loads(path.read_text())
        if "added_tokens_decoder" in values:  # transformers 5 writes none, and takes one for all that there are
            entries = {str(number): {"content": text, **_FLAGS} for text, number in added.items()}
            values["added_tokens_decoder"] |= entries
            path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def _tokenizer_of(folder: Path) -> Tokenizer:
    if (folder / "tokenizer.json").is_file():
        return Tokenizer.from_file(str(folder / "tokenizer.json"))
    from transformers import AutoTokenizer  # slow to import; a folder of vocab.json and merges.txt alone

    made: Tokenizer = AutoTokenizer.from_pretrained(str(folder)).backend_tokenizer
    return made


def with_mean_rows(params: Params, rows: Collection[int], used: int) -> Params:
    """The parameters with the mean of the first ``used`` rows of the embedding in ``rows``; the old table is donated.

    What a checkpoint has in an unused row is arbitrary, and of another size than those that were trained.
    """
    if not rows:
        return params
    table = jnp.asarray(params["text"]["embed"]["table"])
    filled = jax.jit(partial(_fill, tuple(rows), used), donate_argnums=0, out_shardings=table.sharding)(table)
    return {**params, "text": {**params["text"], "embed": {**params["text"]["embed"], "table": filled}}}


def _fill(rows: tuple[int, ...], used: int, table: Float[Array, "V D"]) -> Float[Array, "V D"]:
    # By masks: a slice or a scatter would gather a table that devices share.
    place = jnp.arange(len(table))[:, None]
    mean = jnp.where(place < used, table.astype(jnp.float32), 0).sum(0) / used
    return jnp.where(jnp.isin(place, jnp.array(rows)), mean.astype(table.dtype), table)
