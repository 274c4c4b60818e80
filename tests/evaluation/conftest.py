"""Small evaluation sets as published: MMEB's lists of candidates, BEIR's folders, folders of classes."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow
import pytest
from pyarrow import parquet


def picture(seed: int) -> bytes:
    """Noise of 56 x 56 pixels, 4 visual tokens."""
    noise = np.random.default_rng(seed).integers(0, 256, (56, 56, 3), dtype=np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(noise).save(file, "PNG")
    return file.getvalue()


def write_set(root: Path, name: str, rows: list[dict], pictures: dict[str, bytes]) -> None:
    (root / name).mkdir(parents=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), root / name / "test-00000-of-00001.parquet")
    for path, data in pictures.items():
        (root / "images" / path).parent.mkdir(parents=True, exist_ok=True)
        (root / "images" / path).write_bytes(data)


@pytest.fixture(scope="session")
def mmeb_eval_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sets of MMEB-eval: a class for a picture, a picture for words, words for words and a picture."""
    root = tmp_path_factory.mktemp("mmeb-eval")
    names = ["a kiwi", "a boat", "a car", "a hill"]
    rows = [
        {
            "qry_text": "<|image_1|>\nIdentify the object shown in the image\n",
            "qry_img_path": f"VOC2007/image_{i}.png",
            # Every list in another order, the right one first; the right one again at the end of the second.
            "tgt_text": [names[i % 4], *(n for n in names if n != names[i % 4]), *([names[i % 4]] * (i == 1))],
            "tgt_img_path": [""] * (5 if i == 1 else 4),
        }
        for i in range(6)
    ]
    write_set(root, "VOC2007", rows, {f"VOC2007/image_{i}.png": picture(i) for i in range(6)})
    rows = [
        {
            "qry_text": f"Find me an everyday image that matches the given caption: scene {i}\n",
            "qry_img_path": "",
            "tgt_text": ["<|image_1|>\nRepresent the given image.\n"] * 4,
            # One candidate's file is a copy of the right one under another name.
            "tgt_img_path": [f"MSCOCO_t2i/{(i + step) % 4}.png" for step in range(3)] + [f"MSCOCO_t2i/copy_{i}.png"],
        }
        for i in range(4)
    ]
    shown = {f"MSCOCO_t2i/{i}.png": picture(i) for i in range(4)}  # pictures that the first set shows too
    shown |= {f"MSCOCO_t2i/copy_{i}.png": picture(i) for i in range(4)}
    write_set(root, "MSCOCO_t2i", rows, shown)
    rows = [
        {
            "qry_text": f"<|image_1|>\nRepresent the given image with the following question: what is {i}?\n",
            "qry_img_path": f"GQA/{i}.png",
            "tgt_text": [names[i], *names[:i], *names[i + 1 :]],
            "tgt_img_path": [""] * 4,
        }
        for i in range(3)
    ]
    write_set(root, "GQA", rows, {f"GQA/{i}.png": picture(20 + i) for i in range(3)})
    return root


@pytest.fixture(scope="session")
def make_picture() -> Callable[[int], bytes]:
    return picture


@pytest.fixture(scope="session")
def own_sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A YAML file of a set in BEIR's layout and a folder of classes."""
    root = tmp_path_factory.mktemp("own")
    (root / "fruit" / "qrels").mkdir(parents=True)
    corpus = [
        {"_id": "d0", "title": "Kiwi", "text": "a green fruit"},
        {"_id": "d1", "text": "a boat", "image": "boat.png"},
        {"_id": "d2", "title": "Kiwi", "text": "a green fruit"},
        {"_id": "d3", "text": "", "image": "boat.png"},
    ]
    queries = [{"_id": "q0", "text": "which fruit is green?"}, {"_id": "q1", "text": "", "image": "boat.png"}]
    for name, lines in (("corpus", corpus), ("queries", [*queries, {"_id": "q2", "text": "not judged"}])):
        (root / "fruit" / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (root / "fruit" / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq0\td0\t1\nq1\td1\t2\nq1\td0\t0\n")
    (root / "fruit" / "boat.png").write_bytes(picture(7))
    for label in ("red_car", "hill"):
        (root / "things" / label).mkdir(parents=True)
        for i in range(2):
            (root / "things" / label / f"{i}.png").write_bytes(picture(30 + i + 5 * (label == "hill")))
    (root / "things" / "red_car" / "notes.txt").write_text("no picture")
    (root / "sets.yaml").write_text(
        "sets:\n"
        "  fruit: {format: beir, path: fruit, instruction: 'Find a document:'}\n"
        "  things: {format: classes, path: things, meta_task: classification, split: IND, instruction: Name it.}\n"
    )
    return root / "sets.yaml"
