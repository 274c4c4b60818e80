"""Compiled programs that are kept from run to run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from cocoa_jax.checkpoints.places import is_remote

_SETTING = "jax_compilation_cache_dir"


@contextmanager
def kept_programs(folder: str | None) -> Iterator[None]:
    """JAX's persistent compilation cache in ``folder`` for as long as this lasts; None leaves JAX as it is.

    Of several processes the first one writes and all read, so they need a folder that all of them see, which may be in
    a bucket. A program is found again by its code, its shapes, the devices and the versions of JAX and the compiler.
    """
    if folder is None:
        yield
        return
    if not is_remote(folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
    before = jax.config.values[_SETTING]
    _keep_in(folder)
    try:
        yield
    finally:
        _keep_in(before)


def _keep_in(folder: str | None) -> None:
    jax.config.update(_SETTING, folder)
    compilation_cache.reset_cache()  # JAX opens the folder once, when it compiles first
