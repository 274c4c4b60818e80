"""The embedded pictures: counts, sizes, licences, splits, and the script that builds them."""

import importlib.util
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import tensorflow_datasets as tfds

from cocoa_jax.data import build_pictures
from cocoa_jax.data.pixels import decode
from cocoa_jax.data.sources import PICTURES, SPLITS, Picture, load_pictures

COUNTS = {"train": 6466, "validation": 371, "test_seen": 195, "test_unseen": 789}
SOURCES = {"openclipart": 3063, "noto-emoji": 2560, "fluent-emoji": 1852, "sweet-home-3d": 175, "endless-sky": 171}
CARD = PICTURES.parent


@pytest.fixture(scope="module")
def everything() -> list[Picture]:
    return [picture for split in SPLITS for picture in load_pictures(split)]


def test_counts(everything: list[Picture]) -> None:
    assert Counter(picture.split for picture in everything) == COUNTS
    assert Counter(picture.source for picture in everything) == SOURCES
    assert len({picture.id for picture in everything}) == len(everything)


def test_sizes_of_files() -> None:
    sizes = [path.stat().st_size for path in CARD.rglob("*") if path.is_file()]
    assert max(sizes) <= 3 * 2**20
    assert sum(sizes) <= 12 * 10**6


def test_image_bytes_are_whole(everything: list[Picture]) -> None:
    """Every file ends in a zero byte, which an array of numpy's bytes type would drop; RIFF states its own length."""
    for picture in everything:
        data = picture.image.data
        assert data[:4] == b"RIFF" and int.from_bytes(data[4:8], "little") + 8 == len(data)
        assert data[8:12] == b"WEBP"


def test_sizes_are_those_of_the_decoded_pictures(everything: list[Picture]) -> None:
    for picture in everything[::40]:
        decoded = decode(picture.image)
        assert decoded.size == (picture.image.width, picture.image.height)
        assert decoded.mode == "RGB"


def test_groups_and_captions_are_not_divided(everything: list[Picture]) -> None:
    known = [picture for picture in everything if picture.split in ("train", "validation")]
    unseen = [picture for picture in everything if picture.split == "test_unseen"]
    assert not {picture.group for picture in known} & {picture.group for picture in unseen}
    drawn = {picture.caption.lower() for picture in unseen if picture.style != "photo"}
    assert not drawn & {picture.caption.lower() for picture in known}
    train = {picture.group for picture in load_pictures("train")}
    assert all(picture.group in train for picture in load_pictures("test_seen"))


def test_every_source_and_licence_is_on_the_card(everything: list[Picture]) -> None:
    card = (CARD / "README.md").read_text()
    notice = (Path(__file__).parents[2] / "NOTICE").read_text()
    files = {
        "Apache-2.0": "Apache License",
        "MIT": "Microsoft Corporation",
        "CC0-1.0": "CC0",
        "Public Domain": "public domain",
    }
    for licence in {picture.licence for picture in everything}:
        name = licence.replace(" ", "-") + ".txt"
        assert files[licence] in (CARD / "LICENSES" / name).read_text()
        assert f"LICENSES/{name}" in card
    for source, count in SOURCES.items():
        assert f"| {source} | {count:,} |" in card
        assert source in notice
    for split, count in COUNTS.items():
        assert f"| `{split}` | {count:,} |" in card


def test_photos_with_an_author_are_credited(everything: list[Picture]) -> None:
    """Their file names end in the author's mark."""
    card = (CARD / "README.md").read_text()
    marked = [picture.origin for picture in everything if picture.source == "endless-sky" and "-" in picture.origin]
    assert len(marked) == 17
    assert all(origin.split("-")[1].removesuffix(".jpg") in card for origin in marked)
    assert "ShareAlike 4.0" in (CARD / "LICENSES" / "CC-BY-SA-4.0.txt").read_text()


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'test'.*train, validation, test_seen, test_unseen"):
        load_pictures("test")


def test_a_split_pickles_as_its_name() -> None:
    train = load_pictures("train")
    packed = pickle.dumps(train)
    assert len(packed) < 200
    assert pickle.loads(packed)[5] == train[5]


def test_reading_imports_neither_tensorflow_nor_jax() -> None:
    code = (
        "import sys; from cocoa_jax.data.sources import load_pictures; "
        "assert len(load_pictures('train')) == 6466; "
        "assert not {'tensorflow', 'jax', 'torch'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # array_record's remark about shared chunks stays unsaid


def test_tensorflow_datasets_opens_the_folder() -> None:
    source = tfds.builder_from_directory(PICTURES).as_data_source(split="test_seen")
    row, picture = source[3], load_pictures("test_seen")[3]
    assert row["image"] == picture.image.data
    assert row["caption"].decode() == picture.caption
    assert [word.decode() for word in row["keywords"]] == list(picture.keywords)
    assert set(row) == {*build_pictures.TEXT_COLUMNS, "image", "width", "height", "keywords"}


def _rows(count: int) -> list[dict[str, object]]:
    text = dict.fromkeys(build_pictures.TEXT_COLUMNS, "")
    return [
        {
            **text,
            "id": f"p-{i}",
            "split": build_pictures.SPLITS[i % 4],
            "caption": f"thing {i}",
            "keywords": ["a", "b"][: i % 3],
            "image": bytes([i, 1, 0, 0]),
            "width": i,
            "height": 2,
        }
        for i in range(count)
    ]


def _build(rows: list[dict[str, object]], folder: Path) -> Path:
    folder.mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "rows.parquet")
    build_pictures.build(folder / "rows.parquet", folder / "out")
    return folder / "out" / build_pictures.VERSION


def test_building_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    assert importlib.util.find_spec("tensorflow") is None or "tensorflow" not in sys.modules
    rows = _rows(90)
    one, two = _build(rows, tmp_path / "one"), _build(rows[::-1], tmp_path / "two")
    names = sorted(path.name for path in one.iterdir())
    assert len(names) == 6  # four splits and two files of metadata
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in names)
    found = [row for split in SPLITS for row in tfds.builder_from_directory(one).as_data_source(split=split)]
    assert {row["id"].decode(): row["image"] for row in found} == {row["id"]: row["image"] for row in rows}


def test_building_refuses_unknown_splits_and_used_folders(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dev"):
        _build([{**row, "split": "dev"} for row in _rows(4)], tmp_path / "one")
    folder = _build(_rows(8), tmp_path / "two")
    with pytest.raises(ValueError, match="not empty"):
        build_pictures.build(tmp_path / "two" / "rows.parquet", folder.parent)
