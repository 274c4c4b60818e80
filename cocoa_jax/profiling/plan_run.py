"""``cocoa plan``: what it prints, and when it fails."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from cocoa_jax.config import TrainConfig
from cocoa_jax.profiling.cells import Cells
from cocoa_jax.profiling.plan import PlanError, plan_spec
from cocoa_jax.profiling.plan_report import plan_markdown, search_markdown
from cocoa_jax.profiling.plan_search import Say, advise, candidates, ranked, try_settings


def plan(
    config: TrainConfig, topology: str, slices: int, cells: Cells, say: Say, write: Callable[[str], object]
) -> None:
    """Write the plan of a step.

    Raises:
        PlanError: it does not fit; after the plan, with what would make it fit.
        TopologyError, ConfigError, ValueError: it cannot be compiled at all.
    """
    result = cells.get(plan_spec(config, topology, slices))
    write(plan_markdown(result))
    if not result["fits"]:
        remedy = advise(config, topology, slices, result["needed"], cells, say)
        sizes = f"needs {result['needed'] / 2**30:.2f} GiB of {result['capacity'] / 2**30:.2f} GiB a device"
        raise PlanError(f"stage {config.stage} {sizes} on {topology}: {remedy}")


def search(config: TrainConfig, topology: str, slices: int, limit: int, cells: Cells, say: Say) -> str:
    """The table of the settings that fit, the fastest first.

    Raises:
        PlanError: none of those that were tried fits.
        TopologyError, ConfigError, ValueError: nothing can be compiled at all.
    """
    if limit < 1:
        raise PlanError(f"--limit is {limit}: at least 1")
    choices = list(itertools.islice(candidates(config, topology, slices), limit))
    if not choices:
        plan_spec(config, topology, slices)  # says why
    tried = try_settings(config, topology, slices, choices, cells, say)
    found = ranked(tried)
    if not found:
        raise PlanError(f"none of {len(choices)} settings fits {topology}: take a larger slice, or raise --limit")
    return search_markdown(found, len(choices))
