"""Where the numbers of a run go, and a disk that has no room for them."""

import contextlib
import json
import resource
from collections.abc import Iterator

import pytest

from cocoa_jax.checkpoints.causes import chain
from cocoa_jax.training.metrics import MetricsError, MetricsWriter
from cocoa_jax.training.throughput import Load, Meter


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Larger ones fail as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("name", ["metrics.jsonl", "tensorboard/*"])
def test_a_full_disk_is_one_error_and_what_is_written_stays(tmp_path, name):
    meter, load = Meter(lambda work: 0.0, 1), Load(8, 4, 100, 20, 120, 32, 1e9)
    told = rf"metrics could not be written to {tmp_path} \(.*File too large\): .*whole, make room and continue"
    # The writer is closed before there is room again, which must not be another error.
    with (
        pytest.raises(MetricsError, match=told) as caught,
        contextlib.ExitStack() as full,
        MetricsWriter(tmp_path, "bridge", 0, 9, meter) as writer,
    ):
        for step in range(9):
            if step == 3:
                (file,) = tmp_path.glob(name)
                full.enter_context(files_of_at_most(file.stat().st_size))
            writer.write(step, {"loss": 1.0}, load)
    assert len(list(chain(caught.value))) == 2
    with pytest.raises(MetricsError, match=told), files_of_at_most(10):
        MetricsWriter(tmp_path, "bridge", 3, 9, meter)
    with MetricsWriter(tmp_path, "bridge", 3, 9, meter) as writer:
        writer.write(3, {"loss": 1.0}, load)
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").open()] == [0, 1, 2, 3]
