"""``Embedder``: load a model once, embed texts, pictures or both."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import PIL.ImageOps
from jaxtyping import Array, Float
from tqdm import tqdm

from cocoa_jax.checkpoints.added_tokens import with_mean_rows
from cocoa_jax.checkpoints.backbone import Backbone, open_backbone
from cocoa_jax.checkpoints.orbax import read_metadata
from cocoa_jax.config import READING, EvaluateConfig, MeshConfig, evaluate_config_of, load_config
from cocoa_jax.data.inference import embedding_rows
from cocoa_jax.data.packing import RowsConfig
from cocoa_jax.data.pixels import decode, open_image
from cocoa_jax.data.processor import Processor
from cocoa_jax.data.processor_settings import ProcessorConfig
from cocoa_jax.data.sources import Content, Image, RecordError, utf8_text
from cocoa_jax.models.qwen2_vl import Params, bind, graph_of
from cocoa_jax.objectives.embedding import embed_in_chunks
from cocoa_jax.objectives.similarity import truncated
from cocoa_jax.training.hosts import row_share
from cocoa_jax.training.mesh import batch_shards, compiler_options, make_mesh, mesh_here, replicated
from cocoa_jax.training.place import place
from cocoa_jax.training.sharding import param_shardings

Item = Mapping[str, Any]
_PIXELS = 2**30  # bytes of a batch's pixels on a device, where two batches lie at a time
_THREADS = min(8, os.cpu_count() or 1)  # that read pictures while devices compute
_NO_PNG = ("CMYK", "YCbCr", "LAB", "HSV")  # modes that PNG cannot store and that are read as RGB


class ItemError(ValueError):
    """An item that cannot be embedded; the message names its place in the list."""


class Embedder:
    """A trained stage or a Hugging Face folder that turns items into unit-length rows.

    A row does not depend on which other items are embedded with it, nor on their order.

    Args:
        untrained: whether bridge tokens that the folder's tokenizer lacks begin as the mean of the others, as they do
            where training begins; by default they are refused, since they mean nothing there.
    """

    def __init__(self, folder: str | Path, settings: EvaluateConfig, *, untrained: bool = False):
        backbone = open_backbone(folder)
        self.settings = settings
        self._mesh = make_mesh(settings.mesh)
        self._processor = Processor.load(backbone.side_files, backbone.config, settings.processor)
        # Shared evenly by the devices that are here, and by their chunks, whatever the config was written for: of a
        # batch for a pod, few devices have no room.
        chunk, shards = settings.compute.chunk_rows, batch_shards(self._mesh)
        pixels = 4 * backbone.config.vision.patch_values * settings.rows.widest.patches
        fitting = settings.rows.at_most(shards * max(_PIXELS // max(pixels, 1), 1))
        self._rows = fitting.divisible_by(shards * (chunk or 1))
        if not untrained:
            self._processor.require_bridge(folder)
        graph, shapes = graph_of(backbone.config, settings.compute)
        shardings = param_shardings({"backbone": shapes}, self._mesh)["backbone"]
        wanted = jax.tree.map_with_path(
            lambda keys, a, s: jax.ShapeDtypeStruct(a.shape, _held(keys, a, settings.compute.dtype), sharding=s),
            shapes,
            shardings,
        )
        params = jax.tree.map(jax.device_put, backbone.load(wanted), shardings)
        self._params = with_mean_rows(params, self._processor.lacking_bridge.values(), self._processor.used_rows)
        kept, width = settings.kept_tokens, settings.width

        def embed(params: Params, batch: Mapping[str, Array]) -> Array:
            # The model asks the mesh in use how rows and heads are shared.
            with jax.sharding.use_abstract_mesh(self._mesh.abstract_mesh):
                model = bind(graph, params)
                rows, _ = embed_in_chunks(lambda *_: model, batch, chunk, settings.pooling, settings.tokens)
                return rows if width is None else truncated(rows, width, kept)

        self.width = kept * (backbone.config.text.width if width is None else width)
        self._embed: Callable[..., Any] = jax.jit(
            embed, out_shardings=replicated(self._mesh), compiler_options=compiler_options(self._mesh)
        )

    @classmethod
    def load(cls, folder: str | Path, settings: EvaluateConfig | None = None) -> Embedder:
        """Open a folder; ``settings`` defaults to the pixels and visibility that the model was trained with.

        Raises:
            CheckpointError, ConfigError, ProcessorError: a folder that holds no model that can be loaded.
        """
        return cls(folder, default_settings(folder) if settings is None else settings)

    def embed(self, items: Sequence[Item], progress: bool = False) -> Float[np.ndarray, "n W"]:
        """Embed ``{"text": str}``, ``{"image": path, bytes or PIL image}`` or both; float32, rows of length 1.

        Args:
            items: what to embed, pictures before text.
            progress: whether to show a bar.

        Raises:
            ItemError: naming the first item with an unknown key, nothing in it, or what cannot be read.
        """
        return self.embed_contents([read_item(item, f"item {place}") for place, item in enumerate(items)], progress)

    def embed_contents(
        self, contents: Sequence[Content], progress: bool = False, tick: Callable[[int], object] | None = None
    ) -> Float[np.ndarray, "n W"]:
        """The same for contents that are made already, or are made when they are indexed.

        Args:
            tick: told how many more are done, for a bar of one's own.
        """
        out = np.zeros((len(contents), self.width), np.float32)
        share, visibility = row_share(self._mesh), self.settings.visibility
        rows = embedding_rows(contents, self._processor, self._rows, visibility, share, _THREADS)

        def keep(embedded: Array, held: np.ndarray) -> None:
            used = held.ravel() >= 0
            out[held.ravel()[used]] = np.asarray(embedded)[used]
            bar.update(int(used.sum()))
            if tick is not None:
                tick(int(used.sum()))

        running: tuple[Array, np.ndarray] | None = None
        with tqdm(total=len(contents), desc="embed", unit="item", disable=not progress, leave=False) as bar:
            for batch, held in rows:
                batch["example"] = np.arange(held.size, dtype=np.int32)
                started = self._embed(self._params, place(batch, self._mesh)), held
                if running is not None:  # fetched when the next one runs, so that no device waits for the host
                    keep(*running)
                running = started
            if running is not None:
                keep(*running)
        return out


def _held(keys: tuple[Any, ...], leaf: Any, dtype: str) -> Any:
    """How a parameter is held that nobody trains: what products round before they use it is kept rounded."""
    return jnp.dtype(dtype) if keys[-1].key in ("kernel", "table") else leaf.dtype


def trained_settings(backbone: Backbone) -> EvaluateConfig | None:
    """How a stage was trained, or what its export says of that; None where nothing tells."""
    if backbone.trained and (trained_with := read_metadata(backbone.path)["config"]) is not None:
        return evaluate_config_of(trained_with)
    told = backbone.side_files / READING
    return load_config(EvaluateConfig, told) if told.is_file() else None


def default_settings(folder: str | Path) -> EvaluateConfig:
    """How a folder wants to be read: as it was trained, or, where nothing tells, at the size of the method.

    Parameters lie on the devices as in training where those that are here allow it, else they are shared by all.
    """
    settings = trained_settings(open_backbone(folder))
    if settings is not None:
        return dataclasses.replace(settings, mesh=mesh_here(settings.mesh))
    # Pictures of up to 448 x 448 pixels, as the method trains on; dense attention over larger rows needs gigabytes.
    units = 256
    rows = RowsConfig(
        batch_size=8,
        shapes=((1, 2 * units, 4 * units), (4, 2 * units, 4 * units)),
        examples_per_row=16,
        masked_per_row=16,
    )
    side = 28
    return EvaluateConfig(ProcessorConfig(None, units * side**2, units - 8), rows, mesh=MeshConfig(data=1, fsdp=-1))


def reading(folder: str | Path, settings: EvaluateConfig) -> str:
    """Sixteen hex digits over what a folder holds beside weights: sizes, tokenizer and pixels, read with ``settings``.

    Raises:
        CheckpointError, ConfigError, ProcessorError: a folder that holds no model that can be read so.
    """
    backbone = open_backbone(folder)
    processor = Processor.load(backbone.side_files, backbone.config, settings.processor)
    return hashlib.sha256(repr((backbone.config, processor.fingerprint())).encode()).hexdigest()[:16]


def read_item(item: Item, name: str) -> Content:
    """An item as content; ``name`` is what an error calls it.

    Raises:
        ItemError: an unknown key, nothing in it, or a text or a picture that cannot be read.
    """
    unknown = sorted(set(item) - {"text", "image"})
    if unknown or not item:
        raise ItemError(f"{name}: has the keys {sorted(item)}, expected text, image or both")
    try:
        text = utf8_text(item.get("text", ""), "text")
    except RecordError as error:
        raise ItemError(f"{name}: {error}") from error
    images = (_read_image(item["image"], name),) if "image" in item else ()
    if not text and not images:
        raise ItemError(f"{name}: its text is empty and it has no image: leave it out")
    return Content(text, images)


def _read_image(source: Any, name: str) -> Image:
    try:
        if isinstance(source, PIL.Image.Image):
            data = _png(source)
        else:
            data = source if isinstance(source, bytes) else Path(source).read_bytes()
        image = open_image(data, name)
        decode(image)  # a damaged picture is named now, not in the middle of a batch
        return image
    except (OSError, ValueError, TypeError) as error:  # ImageError among them, and what Pillow says of a closed picture
        what = repr(str(source)) if isinstance(source, str | Path) else type(source).__name__
        raise ItemError(f"{name}: the image {what} cannot be read ({error}): give a picture file") from error


def _png(picture: PIL.Image.Image) -> bytes:
    """A picture of Pillow's as a file of which the same is read as of its own: PNG keeps no orientation."""
    picture = PIL.ImageOps.exif_transpose(picture)
    if picture.mode in _NO_PNG:
        picture = picture.convert("RGB")
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def read_items(lines: Iterable[tuple[int, Item]], folder: Path) -> list[Content]:
    """Items of a JSON-lines file, image paths relative to ``folder``; errors name the line."""
    contents = []
    for number, item in lines:
        if isinstance(item.get("image"), str):
            item = {**item, "image": folder / item["image"]}
        contents.append(read_item(item, f"line {number}"))
    return contents


def embed_file(
    checkpoint: str | Path, source: str | Path, output: str | Path, settings: EvaluateConfig | None = None
) -> None:
    """Embed a JSON-lines file into ``embeddings`` of an npz file, whole or not at all.

    ``settings`` are those of `Embedder.load`.

    Raises:
        ItemError: naming the line that is no JSON object, or whose text or picture cannot be read.
    """
    path = Path(source)
    items = []
    # Text may hold what Python and Unicode take for ends of lines: JSON lines end with \n alone.
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except ValueError as error:  # no JSON, or no UTF-8
            raise ItemError(f"{path} line {number}: no JSON ({error}): give one object a line") from None
        if not isinstance(item, dict):
            raise ItemError(f"{path} line {number}: a {type(item).__name__}, expected an object with text or image")
        items.append((number, item))
    embedder = Embedder.load(checkpoint, settings)  # before the pictures, of which there may be many
    rows = embedder.embed_contents(read_items(items, path.parent), progress=True)
    target = Path(output)
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(target.name + ".partial")
    with aside.open("wb") as file:
        np.savez(file, embeddings=rows)
    os.replace(aside, target)
