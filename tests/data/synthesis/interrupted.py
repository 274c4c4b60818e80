"""Run in a process of its own by test_run, which kills it: texts about a folder of pictures, four at a time."""

import sys
from pathlib import Path

from cocoa_jax.data.synthesis.endpoint import EndpointConfig
from cocoa_jax.data.synthesis.pictures import open_subjects
from cocoa_jax.data.synthesis.plan import TextsConfig
from cocoa_jax.data.synthesis.run import Synthesis, synthesize


def run(photos: str, output: str, url: str) -> Synthesis:
    endpoint = EndpointConfig("tiny", url, concurrency=4, retries=2, timeout=20)
    texts = TextsConfig(["caption", "description"], ["en"], per_picture=2)
    return synthesize(open_subjects([photos], {}), endpoint, texts, Path(output), lambda line: None)


if __name__ == "__main__":
    run(*sys.argv[1:])
