"""Tokens that the method needs and a published tokenizer lacks, in rows of the embedding that nothing uses."""

from __future__ import annotations

import json
import shutil
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

_WHOLE = "tokenizer.json"
_FILES = (_WHOLE, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt")
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
    tokenizer.save(str(Path(folder, _WHOLE)))
    path = Path(folder, "tokenizer_config.json")
    if path.is_file():
        values: dict[str, Any] = json.loads(path.read_text())
        if "added_tokens_decoder" in values:  # transformers 5 writes none, and takes one for all that there are
            entries = {str(number): {"content": text, **_FLAGS} for text, number in added.items()}
            values["added_tokens_decoder"] |= entries
            path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def token_ids(folder: str | Path, names: Collection[str]) -> set[int]:
    """Ids of those of these tokens that the tokenizer of a folder knows."""
    tokenizer = _tokenizer_of(Path(folder))
    return {number for name in names if (number := tokenizer.token_to_id(name)) is not None}


def copy_tokenizer(source: str | Path, destination: str | Path) -> None:
    """Put the tokenizer files of a folder in the place of those of another."""
    for name in _FILES:
        Path(destination, name).unlink(missing_ok=True)
        if Path(source, name).is_file():
            shutil.copyfile(Path(source, name), Path(destination, name))


def wider_tokenizer(base: str | Path, adapter: str | Path) -> Path:
    """Of a backbone's folder and an adapter's, the one whose tokenizer knows all tokens of both.

    Raises:
        CheckpointError: neither does, or they number tokens differently.
    """
    base, adapter = Path(base), Path(adapter)
    if not (adapter / _WHOLE).is_file():
        return base
    if not any((base / name).is_file() for name in (_WHOLE, "vocab.json")):
        return adapter
    held = {folder: set(_tokenizer_of(folder).get_vocab().items()) for folder in (base, adapter)}
    widest = max(held, key=lambda folder: len(held[folder]))
    odd = sorted((held[base] | held[adapter]) - held[widest])
    if odd:
        raise CheckpointError(
            f"the tokenizers of {base} and {adapter} differ, as in {odd[0]}: give the checkpoint that the adapter was "
            "trained on"
        )
    return widest


def _tokenizer_of(folder: Path) -> Tokenizer:
    if (folder / _WHOLE).is_file():
        return Tokenizer.from_file(str(folder / _WHOLE))
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
