"""From a finished run to its report: nothing is embedded twice, and what is shown is what came out."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import PIL.Image
import pytest

from cocoa_jax import embedder
from cocoa_jax.checkpoints.backbone import open_backbone
from cocoa_jax.checkpoints.errors import CheckpointError
from cocoa_jax.checkpoints.huggingface import read_folder
from cocoa_jax.checkpoints.orbax import StageCheckpoints, carry_backbone, load_trees
from cocoa_jax.checkpoints.scratch import ScratchConfig, make_backbone
from cocoa_jax.config import TrainConfig, load_config, named_config, to_dict
from cocoa_jax.data.collage import encode
from cocoa_jax.data.processor import Processor
from cocoa_jax.data.processor_settings import ProcessorConfig
from cocoa_jax.data.sources import Content, load_pictures
from cocoa_jax.evaluation import collect, drawings, run
from cocoa_jax.evaluation.collect import build_report, collect_gallery, collect_points, collect_report
from cocoa_jax.evaluation.drawings import draw_hidden, to_pixels
from cocoa_jax.evaluation.embeddings import load_embeddings, save_embeddings
from cocoa_jax.evaluation.run import Evaluation, evaluate
from cocoa_jax.evaluation.tasks import picture_tasks
from cocoa_jax.models.mae import decoder_graph, init_decoder
from cocoa_jax.models.qwen2_vl import abstract_params

STAGES = ("1-warmup", "2-bridge", "3-contrastive")
SIZES = ScratchConfig(
    vocab_size=320, width=32, layers=2, heads=2, kv_heads=1, mlp_width=32,
    vision_width=32, vision_layers=1, vision_heads=2, vision_mlp_ratio=2, seed=0,
)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """The folder of a run whose stages were saved but hardly trained: weights as they began, plus a number."""
    folder = tmp_path_factory.mktemp("run")
    make_backbone(folder / "backbone", SIZES, ["a red car", "two kiwis", "a smiling face"] * 20, abstract_params)
    backbone = open_backbone(folder / "backbone")
    before = "backbone"
    for number, stage in enumerate(STAGES):
        config = dataclasses.replace(
            load_config(TrainConfig, named_config(f"demo/{stage}.yaml")), checkpoint=str(folder / before)
        )
        config = dataclasses.replace(config, loop=dataclasses.replace(config.loop, steps=3))
        began = read_folder(folder / "backbone", abstract_params(backbone.config))
        params = jax.tree.map(lambda x, n=number: x + 1e-3 * n, began)
        head = init_decoder(backbone.config, params, 0) if number == 0 else {}
        carry_backbone(folder / "backbone", folder / stage)
        parent = {"path": str(folder / before), "stage": None, "parent": None}
        metadata = {"stage": config.stage, "config": to_dict(config), "parent": parent}
        with StageCheckpoints(folder / stage, keep=1) as checkpoints:
            checkpoints.save(3, params=params, head=head, optimizer={}, loop={}, metadata=metadata)
        lines = [
            {"step": s, "loss": 3.0 - s, "bridge": 3.0 - s, "mae": 1.0 / (s + 1), "rows": 4, "seconds": 40.0}
            for s in range(3)
        ]
        (folder / stage / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        before = stage
    return folder


@pytest.fixture(scope="module")
def few_tasks():
    return [task for task in picture_tasks("test_unseen") if task.name.split("/")[0] in ("scenery", "skin-tone")]


@pytest.fixture
def on_few_tasks(few_tasks, monkeypatch) -> list[int]:
    """Evaluates on two small tasks, with random embeddings; gives how many contents each call embedded."""
    calls: list[int] = []

    def embed(self, contents, progress=False):
        calls.append(len(contents))
        rows = np.random.default_rng(0).normal(size=(len(contents), 32)).astype(np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    monkeypatch.setattr(run, "picture_tasks", lambda split: few_tasks if split == "test_unseen" else [])
    monkeypatch.setattr(embedder.Embedder, "embed_contents", embed)
    return calls


def random_evaluation(tasks, results=None) -> Evaluation:
    rng = np.random.default_rng(1)

    def rows(count: int) -> np.ndarray:
        made = rng.normal(size=(count, 8))
        return (made / np.linalg.norm(made, axis=1, keepdims=True)).astype(np.float32)

    embeddings = {task.name: (rows(len(task.queries)), rows(len(task.candidates))) for task in tasks}
    return Evaluation(tuple(tasks), embeddings, results or {})


# --------------------------------------------------------------------------------------- what is kept of an evaluation


def test_embeddings_come_back_and_only_where_they_belong(tmp_path, few_tasks):
    path = tmp_path / "new" / "embeddings.npz"
    assert load_embeddings(path, few_tasks, {"a": 1}) is None
    wanted = random_evaluation(few_tasks).embeddings
    save_embeddings(path, wanted, {"a": 1, "b": [2]})
    found = load_embeddings(path, few_tasks, {"b": [2], "a": 1})
    assert found is not None and found.keys() == wanted.keys()
    for name, sides in wanted.items():
        for left, right in zip(sides, found[name], strict=True):
            np.testing.assert_array_equal(left, right)
    assert load_embeddings(path, few_tasks, {"a": 2, "b": [2]}) is None
    longer = dataclasses.replace(few_tasks[0], queries=few_tasks[0].queries * 2)
    assert load_embeddings(path, [longer], {"a": 1, "b": [2]}) is None
    assert load_embeddings(path, [dataclasses.replace(longer, name="other")], {"a": 1, "b": [2]}) is None
    assert [file.name for file in path.parent.iterdir()] == ["embeddings.npz"]
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"no archive"):
        path.write_bytes(damaged)
        assert load_embeddings(path, few_tasks, {"a": 1, "b": [2]}) is None


def test_what_is_evaluated_is_not_evaluated_again(made, tmp_path, on_few_tasks):
    first = evaluate(made / STAGES[-1], tmp_path)
    assert len(on_few_tasks) == 2  # the trained and the untrained model
    again = evaluate(made / STAGES[-1], tmp_path)
    assert len(on_few_tasks) == 2
    assert again.results == first.results == json.loads((tmp_path / "results.json").read_text())
    for name in first.embeddings:
        np.testing.assert_array_equal(first.embeddings[name][0], again.embeddings[name][0])


def test_killed_between_the_two_models_it_goes_on_with_the_second(made, tmp_path, on_few_tasks):
    whole = evaluate(made / STAGES[-1], tmp_path)
    (tmp_path / "results.json").unlink()
    assert evaluate(made / STAGES[-1], tmp_path).results["tasks"] == whole.results["tasks"]
    assert len(on_few_tasks) == 3


def test_other_weights_and_settings_are_evaluated_anew(made, tmp_path, on_few_tasks):
    folder = Path(shutil.copytree(made / STAGES[-1], tmp_path / "stage"))
    evaluate(folder, tmp_path, untrained=made / "backbone")
    evaluate(folder, tmp_path, splits=["test_unseen"], untrained=made / "backbone")
    assert len(on_few_tasks) == 4
    with StageCheckpoints(folder, keep=1) as checkpoints:
        wanted = {"params": abstract_params(open_backbone(folder).config)}
        last = checkpoints.restore_latest(wanted)
        assert last is not None
        changed = jax.tree.map(lambda x: x + 0.5, last.params)
        checkpoints.save(9, params=changed, head={}, optimizer={}, loop={}, metadata=last.metadata)
    evaluate(folder, tmp_path, splits=["test_unseen"], untrained=made / "backbone")
    assert len(on_few_tasks) == 6


def test_other_pixels_beside_the_same_weights_are_evaluated_anew(made, tmp_path, on_few_tasks):
    folder = Path(shutil.copytree(made / "backbone", tmp_path / "backbone"))
    evaluate(made / STAGES[-1], tmp_path, untrained=folder)
    evaluate(folder, tmp_path / "untrained")
    assert len(on_few_tasks) == 3
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "image_mean": [0.5, 0.5, 0.5]}))
    evaluate(folder, tmp_path / "untrained")
    assert len(on_few_tasks) == 4
    evaluate(made / STAGES[-1], tmp_path, untrained=folder)
    assert len(on_few_tasks) == 6


def test_a_fingerprint_belongs_to_weights_not_to_folders(made, tmp_path):
    names = ["backbone", *STAGES]
    prints = [open_backbone(made / name).fingerprint() for name in names]
    assert len(set(prints)) == len(names)
    for name, known in zip(names, prints, strict=True):
        moved = shutil.copytree(made / name, tmp_path / "moved" / name)
        assert open_backbone(moved).fingerprint() == known


# ------------------------------------------------------------------------------------------------------- the gallery


@pytest.fixture(scope="module")
def all_tasks():
    return [task for split in ("test_seen", "test_unseen") for task in picture_tasks(split)]


def test_the_gallery_shows_every_task_and_marks_what_is_right(all_tasks):
    evaluation = random_evaluation(all_tasks)
    by_text = {query.text + str(query.images): (t, i) for t in all_tasks for i, query in enumerate(t.queries)}
    assert len(by_text) > 1000
    rows = collect_gallery(evaluation)
    assert rows == collect_gallery(evaluation)
    assert len(rows) == 16
    assert [row.note.startswith("Never seen.") for row in rows] == [True] * 10 + [False] * 6
    assert len({(row.task, row.note.split(".")[0]) for row in rows}) == 16
    for row in rows:
        scores = [hit.score for hit in row.hits]
        assert len(scores) == 5 and scores == sorted(scores, reverse=True)
        place = int(row.note.rsplit("place ", 1)[1].split(" of ")[0].replace(",", ""))
        first = next((number for number, hit in enumerate(row.hits, start=1) if hit.right), None)
        assert first == (place if place <= 5 else None)


def test_a_perfect_model_has_only_right_answers_first(all_tasks):
    tasks = [task for task in all_tasks if task.name in ("scenery/test_unseen", "flat-to-3d/test_unseen")]
    embeddings = {}
    for task in tasks:
        candidates = np.eye(len(task.candidates), dtype=np.float32)
        embeddings[task.name] = candidates[[min(right) for right in task.relevant]], candidates
    rows = collect_gallery(Evaluation(tuple(tasks), embeddings, {}))
    assert all(row.hits[0].right and "place 1 of" in row.note for row in rows)
    captions = [row for row in rows if row.task == "flat to 3d"]
    assert captions and all(row.picture and all(hit.picture for hit in row.hits) for row in captions)
    labels = {picture.caption for picture in load_pictures("test_unseen")}
    assert all(hit.label in labels for row in captions for hit in row.hits)
    words = [row for row in rows if row.task == "scenery"]
    assert words and all(hit.picture is None and hit.label for row in words for hit in row.hits)


def test_the_map_holds_pictures_of_every_split(all_tasks):
    points = collect_points(random_evaluation(all_tasks))
    assert len(points) == 300 and len({point.picture for point in points}) == 300
    for split in ("test_seen", "test_unseen"):
        assert len({p.image.data for p in load_pictures(split)} & {point.picture for point in points}) > 50
    assert collect_points(random_evaluation(all_tasks[1:2])) == ()


@pytest.mark.parametrize(("total", "wanted"), [(1, 9), (9, 9), (10, 9), (1000, 300)])
def test_even_choices_are_distinct_and_inside(total, wanted):
    chosen = collect._evenly(total, wanted)
    assert len(set(chosen)) == len(chosen) == min(total, wanted) and min(chosen) >= 0 and max(chosen) < total
    assert np.ptp(np.diff([-1, *chosen, total])) <= total / wanted + 1


# ------------------------------------------------------------------------------------------------------ the drawings


@pytest.mark.parametrize("window", [0, 56])
@pytest.mark.parametrize(("height", "width"), [(28, 28), (112, 56), (112, 140)])
def test_pixels_come_back_from_patches(made, height, width, window):
    config = open_backbone(made / "backbone").config
    config = dataclasses.replace(config, vision=dataclasses.replace(config.vision, window=window))
    processor = Processor.load(made / "backbone", config, ProcessorConfig(784, 25088, 8))
    true = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    example = processor.warmup(Content("", (encode(PIL.Image.fromarray(true), "noise", "PNG"),)))
    patches = np.empty((example.patches, config.vision.patch_values), np.float32)
    processor.fill_patches(example, patches)
    np.testing.assert_array_equal(to_pixels(patches, example.grids[0], processor), true)


def test_only_hidden_units_are_noisy_and_only_they_are_drawn(made):
    pictures = load_pictures("test_unseen")[:4]
    drawn = draw_hidden(made / STAGES[0], pictures, seed=3)
    again = draw_hidden(made / STAGES[0], pictures, seed=3)
    other = draw_hidden(made / STAGES[0], pictures, seed=4)
    assert any(not np.array_equal(a.masked, b.masked) for a, b in zip(drawn, other, strict=True))
    for one, same, picture in zip(drawn, again, pictures, strict=True):
        assert one.label == picture.caption
        assert one.original.dtype == np.uint8 and max(one.original.shape) == 112
        np.testing.assert_array_equal(one.masked, same.masked)
        if min(one.original.shape[:2]) % 28:
            continue  # enlarged
        rows, columns = one.original.shape[0] // 28, one.original.shape[1] // 28
        kinds = set()
        for row in range(rows):
            for column in range(columns):
                cell = slice(28 * row, 28 * row + 28), slice(28 * column, 28 * column + 28)
                hidden = not np.array_equal(one.masked[cell], one.original[cell])
                kinds.add(hidden)
                # Shown units are kept to the bit; noise in normalised pixels has a deviation of about 68 of 255.
                assert np.array_equal(one.drawn[cell], one.original[cell]) != hidden
                assert not hidden or 45 < one.masked[cell].std() < 90
        assert kinds == {True, False}


def test_what_the_head_says_lands_in_its_own_unit(made, monkeypatch):
    """A head that says the true pixels gives those back, wherever the model saw grey."""
    pictures = load_pictures("test_unseen")[:3]

    def truth(stage, config, settings, batch):
        return 0 * batch["patches"], batch["patches"]

    monkeypatch.setattr(drawings, "_run", truth)
    for one in draw_hidden(made / STAGES[0], pictures, seed=0):
        same = (one.drawn == one.original).all(axis=-1)
        grey = (one.drawn == one.masked).all(axis=-1)
        assert (same | grey).all() and same.any() and grey.any()


def test_trees_come_from_one_checkpoint_or_are_missed_by_name(made):
    config = open_backbone(made / STAGES[2]).config
    with pytest.raises(CheckpointError, match="head/proj/kernel: not in the checkpoint"):
        load_trees(made / STAGES[2], {"params": abstract_params(config), "head": decoder_graph(config)[1]})


# ------------------------------------------------------------------------------------------------------- the report


def test_the_report_of_a_run(made, on_few_tasks):
    path = build_report(made, STAGES)
    page = path.read_text()
    assert path == made / "report.html"
    for words in ("Masked and drawn", "Nearest neighbours", "Warm-up", "Contrastive", "6.0 minutes", "3 steps"):
        assert words in page
    data = collect_report(made, STAGES, evaluate(made / STAGES[-1], made))
    assert len(on_few_tasks) == 2
    mean = 100 * np.mean([task["p_at_1"] for task in data.results["tasks"].values()])
    assert f"is right for {mean:.1f} %" in data.summary[2] and f"{len(load_pictures('train')):,}" in data.summary[0]
    assert [list(curve.values) for curve in data.curves] == [["loss", "mae"]] * 3
    assert len(data.reconstructions) == 9 and data.points == () and len(data.gallery) == 16
    assert sorted(p.name for p in made.iterdir() if p.is_file()) == ["embeddings.npz", "report.html", "results.json"]
