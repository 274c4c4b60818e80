"""Every kind of bad input is named with its reason; whatever comes in, a record or a RecordError comes out."""

import io
import json
import os
import pickle
import struct
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from cocoa_jax.data.bad import BAD
from cocoa_jax.data.batches import lengths_of
from cocoa_jax.data.intake import examples_of
from cocoa_jax.data.packing import plan_batch
from cocoa_jax.data.pipeline import BatchConfig, MaskingConfig, RowsConfig
from cocoa_jax.data.pixels import ImageError, decode, open_image
from cocoa_jax.data.readers import stores, tables
from cocoa_jax.data.readers.records import Columns, TableSource
from cocoa_jax.data.readers.stages import StagedSource
from cocoa_jax.data.readers.stores import FolderStore, ZipStore, inside, open_store
from cocoa_jax.data.readers.tables import JsonTable, ParquetTable, open_table
from cocoa_jax.data.rows import write_rows
from cocoa_jax.data.sources import RecordError, SourceError

PAIRS = Columns(query_image="image", target_text="caption")


def lying_png(width: int, height: int) -> bytes:
    """A header of any size over a few bytes of pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def encoded(picture: PIL.Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def source(folder: Path, rows: list, columns: Columns = PAIRS) -> TableSource:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return TableSource("mine", open_table([path], columns.names), columns, open_store([folder]))


GREY = PIL.Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000)
RED = PIL.Image.new("RGB", (20, 10), (200, 30, 30))
PROGRAM = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\n(x) run showpage\n%%EOF\n"
REFUSED = {
    "zero bytes": (b"", "zero bytes"),
    "HTML": (b"<html><body>404</body></html>", "are no picture"),
    "a program that draws": (PROGRAM, "are no picture"),
    "40 gigapixels": (lying_png(200_000, 200_000), "40000000000 pixels"),
    "16 bits of grey": (encoded(GREY, "PNG"), "would turn white"),
    "grey in fractions": (encoded(PIL.Image.new("F", (8, 8), 0.5), "TIFF"), "would turn white"),
    "only a header": (encoded(RED, "JPEG")[:20], "cannot be decoded"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_is_no_usable_picture_is_refused_when_it_is_read(tmp_path, case):
    data, words = REFUSED[case]
    (tmp_path / "a.jpg").write_bytes(data)
    with pytest.raises(RecordError, match=r"^mine 0: .*a\.jpg") as raised:
        source(tmp_path, [{"image": "a.jpg", "caption": "red"}]).record(0)
    assert words in str(raised.value) and "0x" not in str(raised.value), "the same words every time"


@pytest.mark.parametrize(
    "data",
    [encoded(PIL.Image.effect_noise((64, 64), 50), "JPEG")[:-400], lying_png(300, 300)],
    ids=["truncated", "lying"],
)
def test_a_picture_that_ends_early_is_refused_when_it_is_decoded(data):
    image = open_image(data, "a.jpg")
    with pytest.raises(ImageError, match=r"a\.jpg: cannot be decoded"):
        decode(image)


def test_unusual_pictures_are_pictures(picture):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    frames = [PIL.Image.new("RGB", (20, 10), colour) for colour in ("red", "blue")]
    good = {
        "CMYK": (encoded(RED.convert("CMYK"), "JPEG"), (20, 10)),
        "animated": (encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), (20, 10)),
        "rotated": (encoded(RED, "JPEG", exif=exif), (10, 20)),
        "1x1": (encoded(PIL.Image.new("RGB", (1, 1), "red"), "PNG"), (1, 1)),
    }
    for name, (data, size) in good.items():
        shown = decode(open_image(data, name))
        assert shown.size == size and shown.mode == "RGB"
        red, green, blue = shown.getpixel((0, 0))
        assert red > 150 > 80 > max(green, blue), name  # JPEG and CMYK move colours a little; the first frame is shown


LEAVING = ["../a.jpg", "x/../../a.jpg", "/etc/hostname", "\\a.jpg", "C:\\a.jpg", "..\\a.jpg", "a\0.jpg", "", "./"]


@pytest.mark.parametrize("path", LEAVING)
def test_a_path_never_leaves_its_folder(tmp_path, path):
    with pytest.raises(RecordError, match="relative to"):
        inside(path)
    with pytest.raises(RecordError):
        FolderStore(tmp_path).read(path)


def test_links_out_of_the_folder_pipes_and_huge_files_are_refused(tmp_path, monkeypatch, picture):
    folder = tmp_path / "images"
    folder.mkdir()
    (tmp_path / "secret.jpg").write_bytes(picture(0))
    (folder / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (tmp_path / "images2").mkdir()
    (tmp_path / "images2" / "a.jpg").write_bytes(picture(0))
    (folder / "beside").symlink_to("../images2")
    (folder / "inner.jpg").symlink_to("real.jpg")
    (folder / "real.jpg").write_bytes(picture(1))
    os.mkfifo(folder / "pipe.jpg")
    store = FolderStore(folder)
    assert store.read("inner.jpg") == picture(1)
    for path, words in {
        "link.jpg": "a link out",
        "beside/a.jpg": "a link out",
        "pipe.jpg": "no file",
        "gone.jpg": "not in",
        "real.jpg/x": "not in",
    }.items():
        with pytest.raises(RecordError, match=words):
            store.read(path)
    with pytest.raises(RecordError, match="cannot name a file"):
        store.read("x" * 300)
    monkeypatch.setattr(stores, "LARGEST_FILE", 10)
    with pytest.raises(RecordError, match="at most 10 are read"):
        store.read("real.jpg")


def test_a_zip_bomb_is_not_unpacked(tmp_path, picture):
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("honest.jpg", b"\0" * (stores.LARGEST_FILE + 1))
        archive.writestr("lying.jpg", b"\0" * 2**25)
        archive.writestr("good.jpg", picture(3))
    data = path.read_bytes()
    # The directory now says that 32 MiB of zeros are ten bytes.
    place = data.rindex(b"lying.jpg") - 46
    path.write_bytes(data[: place + 24] + struct.pack("<L", 10) + data[place + 28 :])
    store = ZipStore(path)
    store.settle(lambda: ["images/sub/good.jpg"])
    assert store.read("images/sub/good.jpg") == picture(3)
    with pytest.raises(RecordError, match="at most"):
        store.read("images/sub/honest.jpg")
    tracemalloc.start()
    try:
        with pytest.raises(RecordError, match="not the 10 bytes"):
            store.read("images/sub/lying.jpg")
        assert tracemalloc.get_traced_memory()[1] < 2**20, "no more than was announced is unpacked"
    finally:
        tracemalloc.stop()
    with pytest.raises(RecordError, match=r"not in bomb\.zip \(without the leading images/sub/ of paths\): fetch it"):
        store.read("other.jpg")


def test_damage_inside_a_zip_is_named(tmp_path, picture):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("a.jpg", picture(1))
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    path.write_bytes(data)
    with pytest.raises(RecordError, match="fetch it again"):
        ZipStore(path).read("a.jpg")
    (tmp_path / "no.zip").write_bytes(b"PK nonsense")
    with pytest.raises(SourceError, match="no whole zip"):
        ZipStore(tmp_path / "no.zip")


def test_a_zip_that_cannot_be_opened_says_why(tmp_path, picture):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("a.jpg", picture(1))
    data = bytearray(path.read_bytes())
    data[data.rindex(b"PK\x01\x02") + 6] = 99  # the version of the format that it takes to unpack: 9.9
    path.write_bytes(data)
    with pytest.raises(SourceError, match=r"version 9\.9.*pack it again"):
        ZipStore(path)
    with pytest.raises(SourceError, match=r"cannot be read .*correct the path"):
        ZipStore(tmp_path)


def zipped(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def shown(places: list[Path], paths: list[str]) -> list[int | str]:
    """The red of each row's picture, or why there is none; a pickled copy reads the rows from the last to the first."""
    table = places[0].parent / "rows.jsonl"
    table.write_text("".join(json.dumps({"image": path, "caption": "x"}) + "\n" for path in paths))
    made = TableSource("mine", JsonTable([table]), PAIRS, open_store(places))
    made.fingerprint()  # as all openers do; a copy keeps what this found out about zips
    copy = pickle.loads(pickle.dumps(made))
    found: list[int | str] = []
    for index in reversed(range(len(paths))):
        try:
            found.insert(0, decode(copy.record(index).query.images[0]).getpixel((0, 0))[0])
        except RecordError as error:
            found.insert(0, "missing" if "not in" in str(error) else str(error))
    return found


def red(value: int) -> bytes:
    return encoded(PIL.Image.new("RGB", (4, 4), (value, 0, 0)), "PNG")


def test_flat_zips_give_the_pictures_of_their_own_folders(tmp_path):
    train = zipped(tmp_path / "train.zip", {"0.png": red(1), "1.png": red(2)})
    val = zipped(tmp_path / "val.zip", {"0.png": red(3), "2.png": red(4)})
    rows = ["train/0.png", "train/1.png", "val/0.png", "val/1.png", "val/2.png", "gone/dir/0.png", "train/2.png"]
    for places in ([train, val], [val, train]):
        assert shown(places, rows) == [1, 2, 3, "missing", 4, "missing", "missing"]
    # One whose name says nothing has whole paths beside others, and what its first path says alone.
    part = train.rename(tmp_path / "part-1.zip")
    assert shown([part, val], ["train/0.png", "val/0.png", "1.png"]) == ["missing", 3, 2]
    assert shown([part], ["no", "../0.png", "a/train/0.png", "a/train/1.png", "b/train/0.png", "1.png", "train/1.png"])[
        2:
    ] == [1, 2, "missing", "missing", "missing"]


ZIPS = {
    "one folder twice": ({"T/a": 1, "T/T/a": 2}, ["a", "T/a"], [1, 2]),
    "one folder beside files": ({"a.jsonl": 9, "T/1": 1, "T/2": 2}, ["1", "2", "T/1"], [1, 2, "missing"]),
    "one that paths have beside files": ({"README": 9, "val/2": 2}, ["val/2", "2"], [2, "missing"]),
    "found without its folder": ({"a/1": 1, "0": 2}, ["a/0", "a/1", "0"], ["missing", 1, 2]),
    "without a folder and as it is": ({"0": 1, "1": 2}, ["val/0", "0", "val/1"], [1, "missing", 2]),
    "below one that paths lack": ({"T/a": 1, "T/b": 2}, ["gone", "a", "T/b", "b"], ["missing", 1, "missing", 2]),
    "lacking one and below another": ({"T/a": 1, "T/b": 2}, ["x/a", "x/T/b", "x/b"], [1, "missing", 2]),
}


@pytest.mark.parametrize("case", ZIPS)
def test_no_two_paths_are_one_picture_of_a_zip(tmp_path, case):
    members, rows, wanted = ZIPS[case]
    path = zipped(tmp_path / "some.zip", {name: red(value) for name, value in members.items()})
    assert shown([path], rows) == wanted


names = st.lists(st.lists(st.sampled_from(["T", "a", "b"]), min_size=1, max_size=3).map("/".join), unique=True)


@settings(max_examples=100)
@given(members=names, rows=names)
def test_whatever_a_table_says_no_member_is_two_paths(tmp_path_factory, members, rows):
    path = zipped(tmp_path_factory.mktemp("zip") / "T.zip", {name: name.encode() for name in members})
    for settle in (ZipStore.settle, ZipStore.settle_by_name):
        store = ZipStore(path)
        settle(store, lambda: rows)
        found = [place for row in rows if (place := store.place(inside(row))) is not None]
        assert len(set(found)) == len(found)
        assert found or not set(rows) & set(members)


def test_a_picture_that_a_zip_has_by_accident_is_that_of_its_own_place(tmp_path):
    train = zipped(tmp_path / "train.zip", {"0.png": red(1), "1.png": red(2)})
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "0.png").write_bytes(red(3))
    rows = ["train/1.png", "train/0.png", "0.png"]
    assert shown([train, tmp_path / "photos"], rows) == [2, 1, 3]
    assert shown([train, tmp_path / "photos"], ["0.png", *rows[:2]]) == [3, 2, 1], "in whatever order"
    store = open_store([train, tmp_path / "photos"])
    store.settle(lambda: rows)
    with pytest.raises(RecordError) as raised:
        store.read("train/2.png")
    assert str(raised.value) == (
        f"path 'train/2.png': not in train.zip (without the leading train/ of paths), {tmp_path}/photos: fetch it or "
        "correct `images`, or call a zip like the folder of the paths that it lacks"
    )


def test_a_thousand_paths_say_how_a_zip_is_read(tmp_path, monkeypatch):
    """Each counts once, however often a table repeats it."""
    path = zipped(tmp_path / "some.zip", {"0": red(1), "1": red(2), "2": red(3)})
    assert shown([path], ["0", "0", "0", "a/1", "a/2"]) == ["missing"] * 3 + [2, 3]
    monkeypatch.setattr(stores, "_ENOUGH", 1)
    read = []
    ZipStore(path).settle(lambda: (read.append(row) or row for row in ["gone", "b/0", "a/1", "a/2"]))
    assert read == ["gone", "b/0"], "no more of a table is read than that"


def test_the_first_place_that_holds_a_picture_gives_it(tmp_path):
    deep = zipped(tmp_path / "deep.zip", {"val/0.png": red(3), "val/1.png": red(4), "a/0.png": red(5)})
    flat = zipped(tmp_path / "train.zip", {"0.png": red(1), "1.png": red(2)})
    for places in ([flat, deep], [deep, flat]):
        assert shown(places, ["up/train/1.png", "val/0.png", "val/1.png", "up/train/0.png", "train/0.png"]) == [
            *(2, 3, 4, 1),
            "missing",
        ]
    (tmp_path / "folder" / "val").mkdir(parents=True)
    (tmp_path / "folder" / "val" / "0.png").write_bytes(red(6))
    assert shown([flat, tmp_path / "folder"], ["val/0.png", "0.png", "up/0.png", "train/1.png"]) == [
        6,
        1,
        "missing",
        "missing",
    ]
    assert shown([tmp_path / "folder", deep], ["val/0.png", "val/1.png"]) == [6, 4]
    assert shown([deep, tmp_path / "folder"], ["val/0.png", "deep/a/0.png"]) == [3, "missing"]


def test_an_encrypted_member_of_a_zip_is_named(tmp_path, picture):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("a.jpg", picture(1))
    data = bytearray(path.read_bytes())
    data[data.rindex(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)
    with pytest.raises(RecordError, match=r"path 'a\.jpg' is encrypted or packed by method 0"):
        ZipStore(path).read("a.jpg")


def test_an_array_behind_a_byte_order_mark_is_an_array(tmp_path):
    (tmp_path / "rows.json").write_bytes(b'\xef\xbb\xbf [{"caption": "caf\xc3\xa9"}]')
    assert JsonTable([tmp_path / "rows.json"]).row(0) == {"caption": "café"}


@pytest.mark.parametrize(("first", "there"), [('{"caption": "a"}\n', ["a"]), ("\r\n", []), ("\n", [])])
def test_lines_behind_a_byte_order_mark_are_all_read(tmp_path, first, there):
    (tmp_path / "rows.jsonl").write_bytes(f'\ufeff{first}{{"caption": "café"}}\n'.encode())
    table = JsonTable([tmp_path / "rows.jsonl"])
    assert [table.row(i)["caption"] for i in range(len(table))] == [*there, "café"]
    (tmp_path / "rows.jsonl").write_bytes(b"\xef\xbb\xbf")
    assert len(JsonTable([tmp_path / "rows.jsonl"])) == 0


ROWS = {
    "no UTF-8": (b'{"caption": "caf\xe9"}', "no UTF-8"),
    "no JSON": (b'{"caption": "x"', "no JSON"),
    "no object": (b"[1, 2]", "expected an object"),
    "a lone surrogate": (rb'{"image": "a.jpg", "caption": "\ud800"}', "no UTF-8"),
    "deep": (b"[" * 100_000, "no JSON"),
    "an empty caption": (b'{"image": "a.jpg", "caption": " \\n"}', "its target has neither text nor pictures"),
    "a number": (b'{"image": "a.jpg", "caption": 7}', "target is a int, expected text"),
    "a missing file": (b'{"image": "b.jpg", "caption": "x"}', "path 'b.jpg': not in"),
    "a picture of another kind": (b'{"image": 5, "caption": "x"}', "a picture is a int"),
}


@pytest.mark.parametrize("case", ROWS)
def test_a_bad_row_is_named_and_its_neighbours_are_read(tmp_path, picture, case):
    line, words = ROWS[case]
    (tmp_path / "a.jpg").write_bytes(picture(0))
    good = b'{"image": "a.jpg", "caption": "fine"}\n'
    (tmp_path / "rows.jsonl").write_bytes(good + line + b"\n\n" + good)
    rows = TableSource("mine", JsonTable([tmp_path / "rows.jsonl"]), PAIRS, FolderStore(tmp_path))
    assert len(rows) == 3 and rows.record(0).target.text == rows.record(2).target.text == "fine"
    with pytest.raises(RecordError, match=r"^mine (row )?1: ") as raised:
        rows.record(1)
    assert words in str(raised.value)


def test_a_parquet_of_another_schema_is_refused_before_anything_is_read(tmp_path, to_parquet):
    one = to_parquet(tmp_path / "a.parquet", [{"image": "a.jpg", "caption": "x"}])
    two = to_parquet(tmp_path / "b.parquet", [{"picture": "a.jpg", "caption": "x"}])
    with pytest.raises(SourceError, match=r"b\.parquet has the columns .*not \['image'\]"):
        open_table([one, two], PAIRS.names)
    (tmp_path / "c.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(SourceError, match="no readable Parquet"):
        open_table([tmp_path / "c.parquet"], PAIRS.names)
    with pytest.raises(SourceError, match="expected"):
        open_table([one, tmp_path / "x.csv"], PAIRS.names)


def test_a_text_of_parquet_that_is_no_utf8_is_named(tmp_path):
    broken = pyarrow.Array.from_buffers(
        pyarrow.string(), 2, [None, pyarrow.py_buffer(np.array([0, 2, 6], np.int32)), pyarrow.py_buffer(b"okcaf\xe9")]
    )
    parquet.write_table(pyarrow.table({"caption": broken}), tmp_path / "a.parquet")
    columns = Columns(query_text="caption", target_text="caption")
    rows = TableSource("mine", open_table([tmp_path / "a.parquet"], columns.names), columns)
    assert rows.record(0).target.text == "ok"
    with pytest.raises(RecordError, match="caption is no UTF-8"):
        rows.record(1)


def test_a_damaged_row_group_costs_its_rows_alone(tmp_path, to_parquet):
    path = to_parquet(tmp_path / "a.parquet", [{"caption": f"{i} " + "words " * 50} for i in range(6)])
    data = bytearray(path.read_bytes())
    group = parquet.read_metadata(path).row_group(1).column(0)
    start = group.dictionary_page_offset or group.data_page_offset
    data[start : start + 40] = b"\xff" * 40
    path.write_bytes(data)
    table = ParquetTable([path], ["caption"])
    for index in (0, 1, 4, 5):
        assert table.row(index)["caption"].startswith(f"{index} ")
    with pytest.raises(RecordError, match="row group 1: damaged"):
        table.row(2)


def test_the_second_of_two_equal_ids_is_bad(tmp_path):
    columns = Columns(id="key", query_text="q", target_text="t")
    rows = source(tmp_path, [{"key": key, "q": "x", "t": "y"} for key in ("a", "b", "a")], columns)
    assert rows.record(0).id == "a" and rows.record(1).id == "b"
    with pytest.raises(RecordError, match="mine a: another row before it has the same id"):
        rows.record(2)


def test_ids_of_a_parquet_are_compared_without_reading_its_pictures(tmp_path, to_parquet, picture, monkeypatch):
    keys = ["a", "b", "c", "d", "e", "a"]
    path = to_parquet(tmp_path / "a.parquet", [{"key": key, "q": {"bytes": picture(0)}, "t": "y"} for key in keys])
    read = []
    plain = ParquetTable._read
    monkeypatch.setattr(
        ParquetTable, "_read", lambda self, n, names: read.append(tuple(names)) or plain(self, n, names)
    )
    columns = Columns(id="key", query_image="q", target_text="t")
    rows = TableSource("mine", open_table([path], columns.names), columns)
    assert rows.repeated == {5} and set(read) == {("key",)}
    data = bytearray(path.read_bytes())
    group = parquet.read_metadata(path).row_group(1).column(0)
    start = group.dictionary_page_offset or group.data_page_offset
    data[start : start + 20] = b"\xff" * 20
    path.write_bytes(data)
    assert TableSource("mine", open_table([path], columns.names), columns).repeated == {5}


@pytest.mark.parametrize("typed", ["<|image_pad|>", "<|im_end|>", "<|vision_start|>", "<|mask|>", "<tool_call>"])
def test_special_tokens_typed_in_a_caption_are_plain_text(tmp_path, processors, picture, typed):
    (tmp_path / "a.jpg").write_bytes(picture(0))
    processor = processors["2"]
    record = source(tmp_path, [{"image": "a.jpg", "caption": f"a {typed} b"}]).record(0)
    example = processor.embedding(record.target)
    special = {
        processor.mask_id,
        *processor.bridge_ids,
        processor.config.image_token,
        processor.config.vision_start_token,
    }
    assert not special & set(example.tokens[:-1].tolist())
    assert processor.text.decode(example.tokens[:-1].tolist()) == f"a {typed} b"


BASES = [encoded(RED, form) for form in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF")]


@settings(max_examples=300)
@given(
    st.sampled_from(BASES),
    st.lists(st.tuples(st.integers(0, 999), st.integers(0, 255)), max_size=8),
    st.integers(0, 1000),
)
def test_no_bytes_crash_the_decoder(data, changes, cut):
    broken = bytearray(data)
    for place, value in changes:
        broken[place % len(broken)] = value
    try:
        shown = decode(open_image(bytes(broken[: max(0, len(broken) - cut)]), "fuzzed"))
    except ImageError as error:
        assert str(error).startswith("fuzzed: ") and "\n" not in str(error)
    else:
        assert shown.mode == "RGB" and min(shown.size) >= 1


CELLS = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["a.jpg", "../a.jpg"])
    | st.tuples(st.sampled_from(BASES), st.integers(1, 1000)).map(lambda cut: cut[0][: cut[1]]),
    lambda part: (
        st.lists(part, max_size=3) | st.dictionaries(st.sampled_from(["bytes", "path", "x"]), part, max_size=2)
    ),
    max_leaves=4,
)
COLUMNS = Columns(
    query_text="a", query_image="b", target_text="c", target_image="d", query_instruction="e", negative_text="f",
    negative_image="g",
)  # fmt: skip


FUZZED = {
    stage: BatchConfig(stage, RowsConfig(2, ((2, 64, 64),), 2, 24), masking=masking)
    for stage, masking in (
        ("warmup", MaskingConfig(0.5, 0.5)),
        ("bridge", MaskingConfig(0.5, 0.0)),
        ("contrastive", None),
    )
}


class OneRow:
    """A table of one row."""

    def __init__(self, row):
        self._row = row

    def __len__(self):
        return 1

    def row(self, index):
        return self._row

    def fingerprint(self):
        return ""


@settings(max_examples=150)
@given(st.dictionaries(st.sampled_from("abcdefg"), CELLS), st.booleans(), st.sampled_from(sorted(FUZZED)))
def test_no_row_crashes_the_builder(tmp_path_factory, processors, row, lists, stage):
    """A row of anything becomes rows of a stage, or is refused as a bad record is."""
    folder = tmp_path_factory.getbasetemp() / "fuzz"
    if not folder.is_dir():
        folder.mkdir()
        (folder / "a.jpg").write_bytes(BASES[0])
    made = StagedSource(TableSource("fuzz", OneRow(row), COLUMNS, FolderStore(folder), list_targets=lists), stage)
    config, processor = FUZZED[stage], processors["2"]
    try:
        found = examples_of(made.record(0, np.random.default_rng(0)), config, processor)
        examples = dict(enumerate(found))
        shape, rows = plan_batch(lengths_of(examples, {}), config.rows)
        batch = write_rows(examples, rows, processor, shape, 2, config.visibility, truncated=stage == "bridge")
    except BAD as error:
        assert str(error).startswith("fuzz 0: ")
    else:
        for example in found:
            assert len(example.tokens) <= 64 and example.patches <= 64
            assert (example.block == 2).sum() == (stage != "warmup")
        assert (batch["token_end"] > 0).sum() == sum(len(example.tokens) for example in found)
        assert (batch["patch_end"] > 0).sum() == sum(example.patches for example in found)
        assert np.isfinite(batch["patches"]).all()


@settings(max_examples=100)
@given(st.binary(max_size=200))
def test_no_bytes_crash_a_table_of_lines(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    path.write_bytes(data)
    try:
        table = JsonTable([path])
    except SourceError:
        return
    for index in range(len(table)):
        try:
            assert isinstance(table.row(index), dict)
        except RecordError as error:
            assert str(error).startswith("fuzz.jsonl row ")
    assert tables.hash_file(path)
