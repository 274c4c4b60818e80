"""What a run opens, and what it says about it."""

import json

from cocoa_jax.checkpoints.backbone import open_backbone
from cocoa_jax.config import TrainConfig, parse
from cocoa_jax.data.naming import open_named
from cocoa_jax.data.prepare import BuildConfig, build
from cocoa_jax.data.processor import Processor
from cocoa_jax.training.inputs import open_dataset, open_sources


def test_a_run_says_where_it_reads_more_pixels_than_were_stored(backbone, stage_settings, tmp_path, caplog):
    settings = stage_settings("contrastive", backbone, tmp_path / "run")
    del settings["data"]["kinds"]
    settings["data"]["mixture"] = str(tmp_path / "mixture.yaml")
    opened = open_backbone(backbone)

    def reading(units):
        settings["data"]["processor"]["max_pixels"] = units * 784
        config = parse(TrainConfig, settings)
        return config, Processor.load(opened.side_files, opened.config, config.data.processor)

    (named,) = open_named("pictures:caption:validation", None)
    made = build("mine", named.source, "x", reading(4)[1], str(tmp_path / "built"), BuildConfig(workers=0))
    entry = {"format": "prepared", "path": made.folder}
    (tmp_path / "mixture.yaml").write_text(json.dumps({"datasets": {"mine": entry}}))
    for units in (2, 4, 8):
        config, processor = reading(units)
        open_dataset(config, processor, open_sources(config))
        assert ("the pictures of mine were made smaller by `cocoa data build`" in caplog.text) == (units == 8)
