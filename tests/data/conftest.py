"""A tiny checkpoint folder (tokenizer, picture settings, config), pictures, and small data sets as published."""

import dataclasses
import io
import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow
import pytest
import tokenizers
from pyarrow import parquet
from tokenizers import decoders, models, pre_tokenizers, trainers

from cocoa_jax.checkpoints.scratch import SPECIAL_TOKENS
from cocoa_jax.data.processor import Processor
from cocoa_jax.data.processor_settings import ProcessorConfig
from cocoa_jax.data.sources import Content, Image, Record
from cocoa_jax.models.config import Qwen2VLConfig, parse_config

SPECIAL = list(SPECIAL_TOKENS)
WORDS = ["a kiwi fruit", "the red car on a green hill", "face with tears of joy", "two small boats", "dark skin tone"]


def config_values(family: str) -> dict:
    """A config.json of the hub's flat form, tiny but with patches of 14 pixels."""
    vision = {"depth": 2, "num_heads": 2, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
    if family == "2":
        vision |= {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
    else:
        vision |= {"hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 48, "window_size": 56}
        vision |= {"fullatt_block_indexes": [1], "tokens_per_second": 2}
    ids = {name: SPECIAL.index(f"<|{name}|>") for name in ("vision_start", "vision_end")}
    return {
        "model_type": "qwen2_vl" if family == "2" else "qwen2_5_vl",
        "vocab_size": 384,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "tie_word_embeddings": True,
        "image_token_id": SPECIAL.index("<|image_pad|>"),
        "video_token_id": SPECIAL.index("<|video_pad|>"),
        **{f"{name}_token_id": number for name, number in ids.items()},
        "vision_config": vision,
    }


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder without weights."""
    path = tmp_path_factory.mktemp("checkpoint")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(WORDS * 10, trainer)
    # Real Qwen2.5 checkpoints have added tokens that are not special; transformers never splits those.
    tokenizer.add_tokens(["<tool_call>"])
    tokenizer.save(str(path / "tokenizer.json"))
    write = {
        "tokenizer_config.json": {
            "tokenizer_class": "Qwen2Tokenizer",
            "pad_token": "<|endoftext|>",
            "eos_token": "<|im_end|>",
        },
        "preprocessor_config.json": {
            "image_processor_type": "Qwen2VLImageProcessor",
            "min_pixels": 784,
            "max_pixels": 50176,
            "patch_size": 14,
            "merge_size": 2,
            "temporal_patch_size": 2,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
        },
        "config.json": config_values("2"),
    }
    for name, values in write.items():
        (path / name).write_text(json.dumps(values))
    return path


@pytest.fixture(scope="session")
def model_config() -> Callable[[str], Qwen2VLConfig]:
    return lambda family: parse_config(config_values(family))


@pytest.fixture(scope="session")
def processors(folder: Path, model_config: Callable[[str], Qwen2VLConfig]) -> dict[str, Processor]:
    """One processor per family; at most 16 visual tokens a picture, 24 text tokens."""
    settings = ProcessorConfig(min_pixels=784, max_pixels=16 * 784, max_text_tokens=24)
    return {family: Processor.load(folder, model_config(family), settings) for family in ("2", "2.5")}


def encode(picture: PIL.Image.Image, name: str = "picture", form: str = "PNG", **options) -> Image:
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return Image(data=buffer.getvalue(), width=picture.width, height=picture.height, name=name)


@pytest.fixture(scope="session")
def encoded() -> Callable[..., Image]:
    return encode


@pytest.fixture(scope="session")
def noise() -> Callable[..., Image]:
    """A picture of random pixels: noise(width, height, seed)."""

    def make(width: int, height: int, seed: int = 0, **options) -> Image:
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        return encode(PIL.Image.fromarray(pixels), f"noise-{width}x{height}-{seed}", **options)

    return make


def jpeg(seed: int, width: int = 40, height: int = 30, form: str = "JPEG") -> bytes:
    """A picture of blocks of random colours."""
    colours = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    PIL.Image.fromarray(colours).resize((width, height), PIL.Image.Resampling.NEAREST).save(buffer, form)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def picture() -> Callable[..., bytes]:
    return jpeg


def write_parquet(path: Path, rows: Sequence[Mapping[str, Any]], group: int = 2) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path, row_group_size=group)
    return path


@pytest.fixture(scope="session")
def to_parquet() -> Callable[..., Path]:
    return write_parquet


def write_lines(path: Path, rows: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def to_lines() -> Callable[..., Path]:
    return write_lines


def train_row(subset: str, number: int, question: str, answer: str, **more: str) -> dict[str, str]:
    row = {
        "qry": f"<|image_1|>\nRepresent the given image with the following question: {question}\n",
        "qry_image_path": f"images/{subset}/Train/{subset}_image_{number}.jpg",
        "pos_text": answer,
        "pos_image_path": "",
        "neg_text": "",
        "neg_image_path": "",
    }
    return {**row, **more}


@pytest.fixture(scope="session")
def mmeb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MMEB-train as its clone looks before and after unzipping; not to be written to."""
    root = tmp_path_factory.mktemp("mmeb")
    questions = [train_row("A-OKVQA", i, f"What is number {i}?", f"answer {i % 3}") for i in range(5)]
    write_parquet(root / "A-OKVQA" / "original-00000-of-00001.parquet", questions)
    diverse = [
        {**row, "qry": row["qry"].replace("Represent the given image with", "Look, then take")} for row in questions
    ]
    write_parquet(root / "A-OKVQA" / "diverse_instruction-00000-of-00001.parquet", diverse)
    (root / "images" / "A-OKVQA" / "Train").mkdir(parents=True)
    for i in range(5):
        (root / "images" / "A-OKVQA" / "Train" / f"A-OKVQA_image_{i}.jpg").write_bytes(jpeg(i))
    captions = [
        {
            "qry": f"Find me an everyday image that matches the given caption: scene {i}\n",
            "qry_image_path": "",
            "pos_text": "<|image_1|>\nRepresent the given image.\n",
            "pos_image_path": f"images/MSCOCO_t2i/Train/{i}.jpg",
            "neg_text": "<|image_1|>\nRepresent the given image.\n",
            "neg_image_path": f"images/MSCOCO_t2i/Train/{(i + 1) % 4}.jpg",
        }
        for i in range(4)
    ]
    write_parquet(root / "MSCOCO_t2i" / "original-00000-of-00001.parquet", captions)
    (root / "images_zip").mkdir()
    with zipfile.ZipFile(root / "images_zip" / "MSCOCO_t2i.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for i in range(4):
            archive.writestr(f"MSCOCO_t2i/Train/{i}.jpg", jpeg(10 + i))
    return root


@dataclasses.dataclass(frozen=True)
class Mixed:
    """Pairs of all kinds: text and pictures, hard negatives, equal keys; ``broken`` lists records that are bad."""

    pictures: tuple[Image, ...]
    broken: tuple[int, ...] = ()
    name: str = "Mixed-1"

    def __len__(self) -> int:
        return 2 * len(self.pictures)

    def record(self, index: int, rng: np.random.Generator) -> Record:
        picture = self.pictures[index // 2]
        if index in self.broken:
            picture = dataclasses.replace(picture, data=picture.data[: len(picture.data) // 2])
        query = Content("Find it: a kiwi", (picture,), instruction="Find it:")
        target = Content(f"a boat {index}") if index % 2 else Content("", (picture, picture))
        wrong = (Content("no"), Content("never", (picture,)))[: index % 3]
        return Record(f"{index}", self.name, query, target, f"key {index % 5}", wrong, f"image {index // 2}")


@pytest.fixture(scope="session")
def mixed_pairs() -> type[Mixed]:
    return Mixed
