"""The 36 sets of MMEB-V1 as one table, and what others reached on them.

Sources: arXiv 2410.05160 (MMEB, VLM2Vec), arXiv 2603.01471 (CoCoA); columns by data set as published for VLM2Vec.
"""

from __future__ import annotations

from dataclasses import dataclass

from cocoa_jax.data.readers.mmeb import QUERY_INSTRUCTIONS


@dataclass(frozen=True)
class EvalSet:
    """One set: its meta-task, and whether its training set is among those of MMEB (IND) or not (OOD)."""

    name: str
    meta_task: str
    split: str

    @property
    def instruction(self) -> str:
        """How its queries begin."""
        return QUERY_INSTRUCTIONS[self.name]


# Set, split, and precision@1 in percent of the columns of PEERS.
PEERS = ("VLM2Vec-V1 2B", "VLM2Vec-V1 7B", "VLM2Vec-V2.0 2B", "GME 2B", "GME 7B", "LamRA-Ret")
_ROWS = {
    "classification": """
        ImageNet-1K IND 77.5 80.2 80.8 58.1 64.7 72.6
        N24News IND 73.8 79.5 73.0 50.3 50.3 51.6
        HatefulMemes IND 57.9 70.3 55.8 53.7 53.9 49.1
        VOC2007 IND 74.3 80.6 84.9 75.8 80.1 80.0
        SUN397 IND 73.7 77.3 70.9 67.0 69.4 68.7
        Place365 OOD 35.0 37.2 36.1 36.1 39.1 40.5
        ImageNet-A OOD 50.6 57.6 47.6 28.4 40.6 47.2
        ImageNet-R OOD 84.7 74.2 89.3 78.5 83.9 88.4
        ObjectNet OOD 36.9 40.5 65.1 71.2 69.0 66.3
        Country211 OOD 21.7 30.2 25.8 26.4 24.6 28.3""",
    "vqa": """
        OK-VQA IND 48.2 56.8 51.7 30.1 33.1 37.9
        A-OKVQA IND 39.7 47.5 44.0 18.6 20.8 26.9
        DocVQA IND 82.7 88.8 90.1 30.0 41.1 22.4
        InfographicsVQA IND 47.3 59.0 59.1 11.8 20.5 16.5
        ChartQA IND 42.2 56.6 48.1 13.3 17.7 11.6
        Visual7W IND 50.9 52.7 52.8 15.6 22.2 19.8
        ScienceQA OOD 30.5 38.2 38.1 27.1 28.2 26.5
        VizWiz OOD 38.8 39.6 43.3 37.1 38.9 31.9
        GQA OOD 48.1 54.4 65.4 75.3 76.8 38.3
        TextVQA OOD 63.2 71.6 71.6 39.5 46.4 33.1""",
    "retrieval": """
        VisDial IND 75.1 81.6 82.7 47.7 60.9 61.0
        CIRR IND 46.8 51.4 57.3 43.1 54.9 52.1
        VisualNews_t2i IND 73.4 80.3 74.7 74.8 79.5 70.9
        VisualNews_i2t IND 73.8 81.2 78.3 77.7 83.6 84.1
        MSCOCO_t2i IND 73.1 77.5 75.9 68.3 71.5 72.0
        MSCOCO_i2t IND 68.3 73.6 71.1 63.2 57.4 73.6
        NIGHTS IND 65.8 67.5 68.4 67.6 67.6 65.7
        WebQA IND 85.8 88.3 90.6 88.8 91.3 81.2
        FashionIQ OOD 13.8 16.8 19.6 32.2 37.6 41.7
        Wiki-SS-NQ OOD 54.6 62.1 67.6 73.8 78.4 70.1
        OVEN OOD 68.4 66.6 64.8 72.1 75.6 82.2
        EDIS OOD 81.4 85.9 84.2 91.7 96.1 86.1""",
    "grounding": """
        MSCOCO IND 65.7 75.4 66.2 28.4 31.4 44.7
        RefCOCO OOD 80.8 87.1 87.0 55.8 61.2 62.5
        RefCOCO-Matching OOD 76.6 84.4 86.3 73.7 78.7 76.2
        Visual7W-Pointing OOD 69.1 80.7 69.0 64.6 66.5 67.1""",
}
_PARSED = [(meta_task, line.split()) for meta_task, lines in _ROWS.items() for line in lines.strip().splitlines()]
SETS: dict[str, EvalSet] = {words[0]: EvalSet(words[0], meta_task, words[1]) for meta_task, words in _PARSED}
PUBLISHED: dict[str, tuple[float, ...]] = {words[0]: tuple(map(float, words[2:])) for _, words in _PARSED}

META_TASKS = tuple(_ROWS)
GROUPS: dict[str, list[str]] = {
    **{meta_task: [one.name for one in SETS.values() if one.meta_task == meta_task] for meta_task in META_TASKS},
    **{split: [one.name for one in SETS.values() if one.split == split] for split in ("IND", "OOD")},
    "all": list(SETS),
}

# As the method's paper prints them, in the order of GROUPS; the last line is what its table leaves out.
PAPER_ROWS: dict[str, tuple[float, ...]] = {
    "VLM2Vec Qwen2-VL 2B": (59.0, 49.4, 65.4, 73.4, 66.0, 52.6, 59.3),
    "UNITE Qwen2-VL 2B": (63.2, 55.9, 65.4, 75.6, 65.8, 60.1, 63.3),
    "MoCa Qwen2.5-VL 3B": (59.8, 62.9, 70.6, 88.6, 72.3, 61.5, 67.5),
    "MoCa Qwen2.5-VL 7B": (65.8, 64.7, 75.0, 92.4, 74.7, 67.6, 71.5),
    "CoCoA Qwen2-VL 2B": (63.0, 57.4, 69.6, 85.8, 70.2, 60.7, 66.0),
    "CoCoA Qwen2.5-VL 3B": (60.9, 63.5, 69.5, 88.2, 72.6, 61.2, 67.5),
    "CoCoA Qwen2.5-VL 7B": (64.7, 66.5, 72.5, 90.1, 75.7, 64.3, 70.6),
    "VLM2Vec-V2.0 Qwen2-VL 2B": (62.9, 56.4, 69.6, 77.1, 68.8, 60.1, 64.9),
}
REMARKS = (
    "Published rows are copied, not run here. VLM2Vec-V2.0 2B has the same backbone and the same 36 sets and is "
    "missing from the CoCoA paper's table: the margin of CoCoA 2B over the best contrastive-only peer is about 1.1.",
    "CoCoA 7B is below MoCa 7B, and the two 3B models tie. VLM2Vec 2B is printed with 59.3; its own columns give 60.1.",
    "Prompts differ between harnesses: GME 2B is 51.9 in the table by data set here and 55.8 in the CoCoA paper.",
    "Published scores take argmax with the right candidate listed first, which counts a tie as right. Ours counts a "
    "tie between distinct contents as a miss, after equal candidates became one; the published rule stands beside it.",
)
