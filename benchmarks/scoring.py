"""How long scoring takes and how much memory: python benchmarks/scoring.py [queries] [candidates] [width]."""

import resource
import sys
import time

import numpy as np

from cocoa_jax.evaluation.scorer import rank
from cocoa_jax.evaluation.statistics import summarise


def main(queries: int = 1000, candidates: int = 1000, width: int = 1536) -> None:
    """Random embeddings; every query has a list of 1,000 candidates, or of all where there are fewer."""
    rng = np.random.default_rng(0)
    rows = [rng.standard_normal((n, width), np.float32) for n in (queries, candidates)]
    asked, shown = (part / np.linalg.norm(part, axis=1, keepdims=True) for part in rows)
    lists = [rng.permutation(candidates)[:1000].astype(np.int32) for _ in range(queries)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    summarise(rank(asked, shown, [{int(one[0])} for one in lists], lists))
    seconds = time.perf_counter() - began
    more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    sys.stdout.write(
        f"{queries} queries, {candidates} candidates, width {width}: {seconds:.2f} s, {more / 1024:.0f} MiB more\n"
    )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
