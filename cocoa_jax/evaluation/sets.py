"""Score a checkpoint on sets of queries with candidate lists, one set after the other, and go on after a kill."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Float
from tqdm import tqdm

from cocoa_jax.checkpoints.backbone import open_backbone
from cocoa_jax.config import EvaluateConfig, SettingsError, differences, load_config, to_dict
from cocoa_jax.data.readers.mmeb import instructions_hash
from cocoa_jax.data.readers.ranked import LazyContents, RankedConfig, RankedFile, RankedSet, open_ranked
from cocoa_jax.embedder import Embedder, default_settings, reading, trained_settings
from cocoa_jax.evaluation import set_gallery
from cocoa_jax.evaluation.distinct import Distinct, distinct
from cocoa_jax.evaluation.mmeb_sets import SETS
from cocoa_jax.evaluation.prompts_used import compared, trained_prompts
from cocoa_jax.evaluation.row_store import RowStore
from cocoa_jax.evaluation.scorer import EmbeddingError, rank
from cocoa_jax.evaluation.set_tables import markdown, means
from cocoa_jax.evaluation.statistics import histogram, summarise
from cocoa_jax.training.hosts import check_shared, is_first

RESULTS, TABLE = "results.json", "table.md"
MMEB = "mmeb-v1"
Sets = Mapping[str, tuple[RankedConfig, Path]]  # with the folder where its path begins


def named_sets(tasks: str, data: str | None, wanted: Sequence[str] = ()) -> dict[str, tuple[RankedConfig, Path]]:
    """The sets of ``mmeb-v1`` below a folder, or those that a YAML file lists.

    Args:
        tasks: ``mmeb-v1`` or the path of a file.
        data: where MMEB lies, or where the paths of the file begin, by default its own folder.
        wanted: only these.

    Raises:
        SettingsError: a name that does not exist, or sets of MMEB that are not in ``data``.
    """
    if tasks == MMEB:
        if data is None:
            raise SettingsError("mmeb-v1 needs its data: give --data, a clone of TIGER-Lab/MMEB-eval with its pictures")
        root = Path(data)
        sets = {name: RankedConfig("mmeb", "", one.meta_task, one.split, name) for name, one in SETS.items()}  # type: ignore[arg-type]
    else:
        sets = dict(load_config(RankedFile, tasks).sets)
        root = Path(tasks).resolve().parent / (data or "")
    paths = [name for name in sets if Path(name).name != name]
    if paths:
        raise SettingsError(f"sets {paths} of {tasks}: names become names of files, leave out slashes")
    unknown = sorted(set(wanted) - set(sets))
    if unknown:
        raise SettingsError(f"sets {unknown} are not in {tasks}: choose of {', '.join(sets)}")
    chosen = {name: config for name, config in sets.items() if not wanted or name in wanted}
    if tasks == MMEB:
        gone = [name for name in chosen if not list((root / name).glob("test-*.parquet"))]
        if gone:
            raise SettingsError(
                f"{len(gone)} of {len(chosen)} sets are not in {root} ({', '.join(gone[:4])} ...): fetch them, or name "
                "those to score by --sets"
            )
    return {name: (config, root) for name, config in chosen.items()}


def evaluate_sets(
    checkpoint: str | Path,
    output: str | Path,
    sets: Sets,
    settings: EvaluateConfig | None = None,
) -> dict[str, Any]:
    """Scores every set that ``output`` does not hold yet of this model, data and settings; returns all results.

    The processes of one run share ``output``, which they check. Each set leaves ``sets/NAME.json``, and all together
    ``results.json`` and ``table.md``.

    Raises:
        SourceError: naming what cannot be read; EmbeddingError: a model whose embeddings are not finite.
        SettingsError: an output that not all processes see.
    """
    folder = Path(output)
    check_shared(folder)
    chosen = default_settings(checkpoint) if settings is None else settings
    made_with = {
        "weights": open_backbone(checkpoint).fingerprint(),
        "reading": reading(checkpoint, chosen),
        "instructions": instructions_hash(),
        "settings": chosen.identity(),
    }
    opened = {name: open_ranked(name, config, root) for name, (config, root) in sets.items()}
    done = {name: _read(folder / "sets" / f"{name}.json", _stamp(made_with, opened[name])) for name in opened}
    left = [opened[name] for name, result in done.items() if result is None]
    if left:
        store = RowStore(folder / "embeddings", made_with, code_version())
        embedder = Embedder(checkpoint, chosen)
        _together("the sets to do are known")
        total = 2 * sum(len(one.queries) + len(one.candidates) for one in left)  # each is read, and embedded if new
        with tqdm(total=total, unit="item", dynamic_ncols=True, disable=not is_first()) as bar:
            for number, one in enumerate(left, start=1):
                bar.set_description(f"{one.name}, {number} of {len(left)} sets")
                done[one.name] = _score(one, embedder, store, folder, made_with, bar)
    results = {
        "sets": done,
        "means": means({name: result["p_at_1"] for name, result in done.items() if result}),
        "config": {
            "checkpoint": str(checkpoint),
            **made_with,
            "code": code_version(),
            **_reading(checkpoint, chosen),
            "prompts": compared(opened, trained_prompts(checkpoint)),
        },
    }
    _write(folder / RESULTS, json.dumps(results, indent=1))
    _write(folder / TABLE, markdown({str(checkpoint): results}))
    return results


def code_version() -> str:
    """Twelve hex digits over every Python file of the package."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _reading(checkpoint: str | Path, settings: EvaluateConfig) -> dict[str, Any]:
    """Whether pixels, text and visibility are those of training, and where not."""
    trained, own = to_dict(default_settings(checkpoint)), to_dict(settings)
    parts = ("processor", "visibility", "pooling", "tokens", "width")
    other = [line for part in parts for line in differences(own[part], trained[part], part)]
    here = trained_settings(open_backbone(checkpoint)) is not None
    return {"trained_here": here, "read_otherwise": other}


def _stamp(made_with: Mapping[str, Any], one: RankedSet) -> dict[str, Any]:
    return {**made_with, "data": one.source}


def _score(
    one: RankedSet, embedder: Embedder, store: RowStore, folder: Path, made_with: Mapping[str, Any], bar: Any
) -> dict[str, Any]:
    began = time.perf_counter()
    found = distinct(one, bar.update)
    missing = store.missing(found.digests)
    # What is stored twice or known from another set is read alone.
    bar.total -= len(one.queries) + len(one.candidates) - len(missing)
    bar.refresh()
    rows = _embed(one.name, found, missing, embedder, store, bar.update)
    candidates = rows[found.candidates]
    tokens = embedder.settings.compared_apart
    ranks = rank(rows[found.queries], candidates, found.right, found.lists, tokens, found.left_out)
    counts = found.counts
    result = {
        "name": one.name,
        "meta_task": one.meta_task,
        "split": one.split,
        **summarise(ranks),
        "queries": len(one.queries),
        "candidates": len(found.candidates),
        "candidates_of_a_query": [int(counts.min()), int(counts.max())],
        "repeated_candidates": found.repeated,
        "repeated_right_candidates": found.repeated_right,
        "histograms": {"right": histogram(ranks.right), "wrong": histogram(ranks.wrong)},
        "gallery": set_gallery.collect(found, rows, ranks, tokens),
        "contents": found.fingerprint,
        "code": code_version(),
        "embedded_by": store.codes(found.digests),
        "seconds": round(time.perf_counter() - began, 1),
        "made_with": _stamp(made_with, one),
    }
    _write(folder / "sets" / f"{one.name}.json", json.dumps(result))
    _together(one.name)
    return result


def _embed(
    name: str,
    found: Distinct,
    missing: Sequence[int],
    embedder: Embedder,
    store: RowStore,
    tick: Callable[[int], object],
) -> Float[np.ndarray, "n W"]:
    """The rows of every distinct content; those that were not known are kept for other sets."""
    if missing:
        fresh = embedder.embed_contents(LazyContents(missing, found.contents.__getitem__), tick=tick)
        bad = int((~np.isfinite(fresh).all(axis=1)).sum())
        if bad:  # before they are kept
            raise EmbeddingError(f"{name}: {bad} of {len(fresh)} embeddings are not finite: the model diverged")
        digests = [found.digests[place] for place in missing]
        path = store.path_of(name, digests)
        if is_first():
            store.save(path, digests, fresh)
        _together(f"{name} is embedded")
        store.note(path)
    return store.known(found.digests)


def _together(what: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def _read(path: Path, made_with: Mapping[str, Any]) -> dict[str, Any] | None:
    """A result that was made with all of this; None where there is none."""
    try:
        result: dict[str, Any] = json.loads(path.read_text())
        return result if result["made_with"] == made_with else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(path: Path, text: str) -> None:
    if not is_first():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".partial")
    aside.write_text(text)
    os.replace(aside, path)
