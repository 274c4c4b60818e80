"""Builds the embedded pictures: a Parquet file becomes ArrayRecord shards in the layout of tensorflow-datasets.

Run as `python -m cocoa_jax.data.build_pictures PICTURES.parquet DESTINATION`. It needs pyarrow to read Parquet; neither
it nor the readers need TensorFlow. The same input gives the same bytes.
"""

import argparse
import hashlib
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.core.example_serializer import ExampleSerializer

NAME = "pictures"
VERSION = "1.0.0"
SPLITS = ("train", "validation", "test_seen", "test_unseen")
TEXT_COLUMNS = (
    "id", "source", "style", "split", "group", "caption", "description", "category", "code_point", "licence", "origin",
)  # fmt: skip
SHARD_LIMIT = 3 * 2**20  # bytes of one file
TOTAL_LIMIT = 12 * 10**6  # bytes of all files
# Records that share a compressed chunk. Alone, each repeats its column names and the whole takes 14.1 MB. A random read
# decodes about 50 kB; array_record logs that Grain reads groups of one faster, which matters to larger files only.
WRITER_OPTIONS = "group_size:32"
SHARD_TARGET = (
    2.8 * 2**20
)  # bytes of serialized records: compression only makes a file smaller, its index needs some room


def features() -> tfds.features.FeaturesDict:
    """The columns; `image` holds the encoded bytes (plain bytes, so that nothing decodes before it is asked to)."""
    text = {name: tfds.features.Text() for name in TEXT_COLUMNS}
    return tfds.features.FeaturesDict(
        {
            **text,
            "image": tfds.features.Tensor(shape=(), dtype=np.object_),
            "width": tfds.features.Scalar(np.int64),
            "height": tfds.features.Scalar(np.int64),
            "keywords": tfds.features.Sequence(tfds.features.Text()),
        }
    )


def serialize(rows: Sequence[Mapping[str, Any]], columns: tfds.features.FeaturesDict) -> list[bytes]:
    """One `tf.train.Example` a row, ordered by a hash of its id so that neighbours are unrelated."""
    serializer = ExampleSerializer(columns.get_serialized_info())
    ordered = sorted(rows, key=lambda row: hashlib.sha256(row["id"].encode()).digest())
    examples = (serializer.get_tf_example(columns.encode_example(dict(row))) for row in ordered)
    return [example.SerializeToString(deterministic=True) for example in examples]


def write_split(split: str, records: Sequence[bytes], destination: Path) -> tfds.core.SplitInfo:
    """Writes the shards of one split, of nearly equal record counts."""
    size = sum(map(len, records))
    shards = math.ceil(size / SHARD_TARGET)
    bounds = [len(records) * shard // shards for shard in range(shards + 1)]
    for shard in range(shards):
        path = destination / f"{NAME}-{split}.array_record-{shard:05d}-of-{shards:05d}"
        writer = ArrayRecordWriter(str(path), WRITER_OPTIONS)
        for record in records[bounds[shard] : bounds[shard + 1]]:
            writer.write(record)
        writer.close()
        if path.stat().st_size > SHARD_LIMIT:
            raise ValueError(
                f"{path.name} has {path.stat().st_size} bytes, the limit is {SHARD_LIMIT}: lower SHARD_TARGET"
            )
    return tfds.core.SplitInfo(
        name=split,
        shard_lengths=[stop - start for start, stop in pairwise(bounds)],
        num_bytes=size,
        filename_template=tfds.core.ShardedFileTemplate(
            data_dir=destination, dataset_name=NAME, split=split, filetype_suffix="array_record"
        ),
    )


def build(parquet: Path, destination: Path) -> None:
    """Writes every split and the metadata into `destination / VERSION`.

    Raises:
        ValueError: a split is not one of SPLITS, a shard or the whole is too large, or the folder already holds shards.
    """
    import pyarrow.parquet

    rows = pyarrow.parquet.read_table(parquet).to_pylist()
    unknown = {row["split"] for row in rows} - set(SPLITS)
    if unknown:
        raise ValueError(f"{parquet} has the splits {sorted(unknown)}, known are {SPLITS}: add them to SPLITS")
    folder = destination / VERSION
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: remove it or choose another destination")
    columns = features()
    infos = [
        write_split(split, serialize([row for row in rows if row["split"] == split], columns), folder)
        for split in SPLITS
    ]
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=columns,
        split_infos=infos,
        version=VERSION,
        check_data=False,  # the check would import TensorFlow; the tests read every record instead
        description="Real pictures with words, from packages whose licences allow redistribution.",
    )
    total = sum(path.stat().st_size for path in folder.iterdir())
    if total > TOTAL_LIMIT:
        raise ValueError(f"{folder} has {total} bytes, the limit is {TOTAL_LIMIT}: store fewer or smaller pictures")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parquet", type=Path, help="the Parquet file, one row a picture")
    parser.add_argument("destination", type=Path, help=f"the folder to hold {VERSION}/")
    arguments = parser.parse_args()
    build(arguments.parquet, arguments.destination)


if __name__ == "__main__":
    main()
