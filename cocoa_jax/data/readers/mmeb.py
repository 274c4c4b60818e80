"""MMEB as published: training and evaluation sets, their instructions and where their pictures lie.

Source: arXiv 2410.05160 and the public TIGER-Lab/MMEB-train, TIGER-Lab/MMEB-eval and ziyjiang/MMEB_Test_Instruct.
"""

from __future__ import annotations

import hashlib
import json
import re
from functools import partial
from pathlib import Path

from cocoa_jax.data.readers.records import Columns, TableSource, nearest
from cocoa_jax.data.readers.stores import PictureStore, open_store
from cocoa_jax.data.readers.tables import open_table
from cocoa_jax.data.sources import SourceError

TRAIN_SPLITS = ("original", "diverse_instruction")

_CLASSIFY = "Represent the given image for classification"
_OBJECT, _SCENE = "Identify the object shown in the image", "Identify the scene shown in the image"
_QUESTION = "Represent the given image with the following question:"
QUERY_INSTRUCTIONS: dict[str, str] = {
    "ImageNet-1K": _CLASSIFY,
    "ImageNet-A": _CLASSIFY,
    "ImageNet-R": _CLASSIFY,
    "N24News": "Represent the given news image with the following caption for domain classification:",
    "HatefulMemes": (
        "Represent the given image for binary classification to determine whether it constitutes hateful speech or not"
    ),
    "VOC2007": _OBJECT,
    "ObjectNet": _OBJECT,
    "SUN397": _SCENE,
    "Place365": _SCENE,
    "Country211": "Identify the country depicted in the image",
    "OK-VQA": _QUESTION,
    "A-OKVQA": _QUESTION,
    "DocVQA": _QUESTION,
    "InfographicsVQA": _QUESTION,
    "ChartQA": _QUESTION,
    "Visual7W": _QUESTION,
    "ScienceQA": _QUESTION,
    "VizWiz": _QUESTION,
    "GQA": _QUESTION,
    "TextVQA": _QUESTION,
    "VisDial": "Represent the given dialogue about an image, which is used for image retrieval:",
    "CIRR": "Given an image, find a similar everyday image with the described changes:",
    "FashionIQ": "Find an image to match the fashion image and style note:",
    "NIGHTS": "Find a day-to-day image that looks similar to the provided image.",
    "WebQA": "Find a Wikipedia image that answers this question:",
    "OVEN": "Retrieve a Wikipedia image-description pair that provides evidence for the question of this image:",
    "EDIS": "Find a news image that matches the provided caption:",
    "Wiki-SS-NQ": "Find the document image that can answer the given query:",
    "MSCOCO_t2i": "Find me an everyday image that matches the given caption:",
    "MSCOCO_i2t": "Find an image caption describing the given everyday image.",
    "VisualNews_t2i": "Retrieve an image of this news caption.",
    "VisualNews_i2t": "Find a caption for the news in the given photo.",
    "MSCOCO": "Select the portion of the image that isolates the object labeled as",
    "RefCOCO": "Select the portion of the image that follows the language expressions.",
    "RefCOCO-Matching": "Select the portion of the image that follows the language expressions:",
    "Visual7W-Pointing": "Select the portion of the image that answers the question",
}
TARGET_INSTRUCTIONS: tuple[str, ...] = (
    "Represent the given image.",
    "Represent the given cropped image of the object",
    "Represent the given Wikipedia image with related text information:",
    "Represent the given image with related text information:",
    "Represent the given document screenshot.",
    "Select the portion of the image that follows the language expressions:",
)
TRAIN_CAPS: dict[str, int] = {
    "ImageNet_1K": 100_000, "N24News": 50_000, "HatefulMemes": 10_000, "VOC2007": 10_000, "SUN397": 20_000,
    "OK-VQA": 10_000, "A-OKVQA": 20_000, "DocVQA": 40_000, "InfographicsVQA": 25_000, "ChartQA": 28_000,
    "Visual7W": 70_000, "VisDial": 130_000, "CIRR": 30_000, "VisualNews_t2i": 100_000, "VisualNews_i2t": 100_000,
    "MSCOCO_t2i": 100_000, "MSCOCO_i2t": 120_000, "NIGHTS": 20_000, "WebQA": 20_000, "MSCOCO": 100_000,
}  # fmt: skip
"""Most records of each training set in the published settings (VLM2Vec-V2, images)."""

# The stored place of the picture; our rows put pictures first anyway. WebQA's queries carry it without having one.
_MARKERS = re.compile(r"\A(?:\s*<\|image_\d+\|>\s*)+")

_TRAIN = Columns(
    query_text="qry",
    query_image="qry_image_path",
    target_text="pos_text",
    target_image="pos_image_path",
    negative_text="neg_text",
    negative_image="neg_image_path",
)
_EVAL = Columns(query_text="qry_text", query_image="qry_img_path", target_text="tgt_text", target_image="tgt_img_path")
_EVAL_INSTRUCT = Columns(
    query_text="qry_text",
    query_image="qry_img_path",
    query_instruction="qry_inst",
    target_text="tgt_text",
    target_image="tgt_img_path",
    target_instruction="tgt_inst",
)


def instructions_hash() -> str:
    """Twelve hex digits over every instruction string here; result files carry it."""
    return hashlib.sha256(json.dumps([QUERY_INSTRUCTIONS, TARGET_INSTRUCTIONS]).encode()).hexdigest()[:12]


def strip_markers(text: str) -> str:
    """A stored text without the ``<|image_1|>`` it begins with; one that stands elsewhere was typed by somebody."""
    return _MARKERS.sub("", text).strip()


def split_instruction(known: tuple[str, ...], text: str) -> tuple[str, str]:
    """(instruction, words) of a stored text; an instruction that is not among ``known`` stays part of the words."""
    shown = strip_markers(text)
    for instruction in known:
        if shown.startswith(instruction):
            return instruction, shown.removeprefix(instruction).strip()
    return "", shown


def mmeb_train(
    root: Path, subset: str, split: str = "original", images: PictureStore | None = None, instruction: str = ""
) -> TableSource:
    """One training set of a clone of ``TIGER-Lab/MMEB-train``.

    Args:
        root: holds ``<subset>/<split>-*.parquet`` and ``images/<subset>/`` or ``images_zip/<subset>.zip``.
        split: ``original``, or ``diverse_instruction`` with other wordings of each instruction.
        images: where the pictures are if not there.
    Raises:
        SourceError: naming what is not there.
    """
    if split not in TRAIN_SPLITS:
        raise SourceError(f"split {split!r} of {subset} does not exist: choose one of {', '.join(TRAIN_SPLITS)}")
    table = open_table(_parquet(root, subset, split), _TRAIN.names)
    return TableSource(
        name=subset,
        table=table,
        columns=_TRAIN,
        images=images or _pictures(root, subset),
        instruction=instruction,
        split_query=partial(split_instruction, _known(subset)),
        split_target=partial(split_instruction, TARGET_INSTRUCTIONS),
    )


def mmeb_eval(
    root: Path, subset: str, images: PictureStore | None = None, negatives: int = 0, instruction: str = ""
) -> TableSource:
    """One evaluation set of a clone of ``TIGER-Lab/MMEB-eval`` or ``ziyjiang/MMEB_Test_Instruct``.

    The target of a record is its first candidate; ``negatives`` of the others follow it. All of them by key, for
    scoring, are `candidates`.

    Raises:
        SourceError: naming what is not there.
    """
    paths = _parquet(root, subset, "test")
    instruct = _has_column(paths[0], "qry_inst")
    columns = _EVAL_INSTRUCT if instruct else _EVAL
    return TableSource(
        name=subset,
        table=open_table(paths, columns.names),
        columns=columns,
        images=images or _pictures(root, subset),
        instruction=instruction,
        split_query=partial(split_instruction, () if instruct else _known(subset)),
        split_target=partial(split_instruction, () if instruct else TARGET_INSTRUCTIONS),
        list_targets=True,
        negatives=negatives,
    )


def candidates(source: TableSource, index: int) -> tuple[tuple[str, str], ...]:
    """(text, path) of every candidate of query ``index`` as stored, the right one first; nothing is read or decoded.

    Equal pairs are equal contents, so each needs one embedding.
    """
    row = source.table.row(index)
    texts, paths = (row[column] or [] for column in (source.columns.target_text, source.columns.target_image))
    total = max(len(texts), len(paths))
    padded = [list(part) + [""] * (total - len(part)) for part in (texts, paths)]
    return tuple((text or "", path or "") for text, path in zip(*padded, strict=True))


def evaluated_name(subset: str) -> str:
    """The evaluation set of a training set, which may be spelled with an underscore for a hyphen."""
    return subset.replace("ImageNet_1K", "ImageNet-1K")


def _known(subset: str) -> tuple[str, ...]:
    name = evaluated_name(subset)
    return (QUERY_INSTRUCTIONS[name],) if name in QUERY_INSTRUCTIONS else ()


def _parquet(root: Path, subset: str, split: str) -> list[Path]:
    paths = sorted((root / subset).glob(f"{split}-*.parquet"))
    if not paths:
        there = sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
        raise SourceError(
            f"{root / subset}: no {split}-*.parquet{nearest(there, subset)}: fetch the data set or correct its name"
        )
    return paths


def _pictures(root: Path, subset: str) -> PictureStore | None:
    """The published places, folders before zips; None where there is none, as with a set of texts alone."""
    if (root / "images" / subset).is_dir():  # rows of the training sets say `images/...`, of the others do not
        return open_store([root, root / "images"])
    zips = [path for path in (root / "images_zip" / f"{subset}.zip", root / "images.zip") if path.is_file()]
    if zips:
        return open_store(zips)
    return open_store([root]) if (root / subset).is_dir() else None


def _has_column(path: Path, name: str) -> bool:
    from pyarrow import parquet

    return name in parquet.read_schema(path).names
