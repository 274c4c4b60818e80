"""Small data sets as they are published, written to a folder."""

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
from pyarrow import parquet


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
