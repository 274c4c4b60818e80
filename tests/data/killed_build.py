"""Run in a process of its own by test_prepare, which kills it: a build of the validation pictures by one worker."""

import sys

from cocoa_jax.data.naming import open_named
from cocoa_jax.data.prepare import BuildConfig, build
from cocoa_jax.data.processor import Processor
from cocoa_jax.data.processor_settings import ProcessorConfig
from cocoa_jax.models.config import read_config

SETTINGS = ProcessorConfig(max_text_tokens=16, resolution="dynamic:1..8")


def run(checkpoint: str, output: str, workers: int) -> str:
    processor = Processor.load(checkpoint, read_config(checkpoint), SETTINGS)
    (named,) = open_named("pictures:caption:validation", None)
    settings = BuildConfig(shard_records=64, workers=workers)
    return build(named.name, named.source, named.contents, processor, output, settings).folder


if __name__ == "__main__":
    run(sys.argv[1], sys.argv[2], 1)
