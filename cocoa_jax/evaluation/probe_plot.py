"""The picture of a probe: bits through the bridge, attention by layer, and how embeddings lie, stage by stage."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

_COLOURS = ("#9a8f84", "#2a7f7a", "#c26a2b", "#5562b8", "#b0382c")


def draw_probe(results: Mapping[str, Any], path: Path) -> None:
    """Four panels as one SVG or PNG file."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    stages = results["stages"]
    names, values = list(stages), list(stages.values())
    colours = [_COLOURS[i % len(_COLOURS)] for i in range(len(names))]
    figure = Figure(figsize=(11, 7), layout="constrained")
    ((bits, right), (mass, lie)) = figure.subplots(2, 2)
    gains = [found["bits_of_an_example"] for found in values]
    errors = [
        [gain - found["bits_of_an_example_interval"][0] for gain, found in zip(gains, values, strict=True)],
        [found["bits_of_an_example_interval"][1] - gain for gain, found in zip(gains, values, strict=True)],
    ]
    bits.bar(names, gains, color=colours, yerr=errors, capsize=3)
    bits.axhline(0, color="black", linewidth=0.8)
    bits.set(title="Bits about the words that come through <EOS>", ylabel="bits an example, 95 % interval")
    places = range(len(names))
    for offset, key, alpha in ((-0.2, "accuracy", 1.0), (0.2, "shuffled_accuracy", 0.4)):
        heights = [100 * found[key] for found in values]
        right.bar([i + offset for i in places], heights, 0.38, color=colours, alpha=alpha)
    right.set_xticks(list(places), names)
    right.set(title="Words rebuilt from their own <EOS> alone (pale: from another's)", ylabel="accuracy, %")
    for found, colour in zip(values, colours, strict=True):
        layers = range(1, len(found["attention"]["words_to_bridge"]) + 1)
        mass.plot(layers, found["attention"]["words_to_bridge"], "-o", color=colour, markersize=4)
        mass.plot(layers, found["attention"]["bridge_to_block_a"], "--", color=colour, linewidth=1)
    mass.set(title="Attention: words to <EOS> (lines), <EOS> to block A (dashes)", ylim=(0, 1.02))
    mass.set_xlabel("layer (colours as above)")
    mass.xaxis.set_major_locator(MaxNLocator(integer=True))
    ranks = [found["embeddings"]["effective_rank"] for found in values]
    lie.plot(names, ranks, "-o", color="#5562b8")
    lie.set(title="Embeddings: effective rank (blue), uniformity (orange)", ylabel="effective rank", ylim=(0, None))
    other = lie.twinx()
    other.plot(names, [found["embeddings"]["uniformity"] for found in values], "-s", color="#c26a2b")
    other.set_ylabel("log mean exp(-2 d²)")
    if max(map(len, names)) > 12:
        for axis in (bits, right, lie):
            for label in axis.get_xticklabels():
                label.set(rotation=20, ha="right", rotation_mode="anchor")
    for axis in (bits, right, mass, lie):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else None)
