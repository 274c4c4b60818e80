"""Run in processes of their own by test_hosts: trains by the command line, gets a signal when a step is recorded."""

import os
import signal
import sys
import time

from cocoa_jax import cli
from cocoa_jax.training import loop
from cocoa_jax.training.metrics import MetricsWriter, NoMetrics


def main(config: str, number: int, at: int) -> None:
    for writer in (MetricsWriter, NoMetrics):
        watch(writer, number, at)
    if os.environ.get("INTERLEAVED"):  # as the hosts of a slice lie in a mesh: not one after the other
        loop.make_mesh = interleaved
    cli.main(["train", "--config", config])


def watch(writer: type, number: int, at: int) -> None:
    write = writer.write

    def write_and_be_told(self, step, metrics, load):
        write(self, step, metrics, load)
        if at >= 0:
            time.sleep(0.3)  # JAX looks for signals once a second
        if step == at:
            os.kill(os.getpid(), signal.Signals(number))

    writer.write = write_and_be_told


def interleaved(config):
    import jax

    from cocoa_jax.training.mesh import AXES, mesh_sizes

    devices = jax.devices()
    half = len(devices) // 2
    order = [device for pair in zip(devices[:half], devices[half:], strict=True) for device in pair]
    sizes = mesh_sizes(config, len(devices))
    return jax.make_mesh(sizes, AXES, (jax.sharding.AxisType.Auto,) * len(AXES), devices=order)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
