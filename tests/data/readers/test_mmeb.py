"""MMEB as published: columns, markers, instructions, pictures in folders and zips, candidates."""

import pickle
import zipfile

import pytest

from cocoa_jax.data.pixels import decode
from cocoa_jax.data.readers.mmeb import (
    QUERY_INSTRUCTIONS,
    TARGET_INSTRUCTIONS,
    TRAIN_CAPS,
    candidates,
    instructions_hash,
    mmeb_eval,
    mmeb_train,
    split_instruction,
    strip_markers,
)
from cocoa_jax.data.sources import SourceError

QUESTION = "Represent the given image with the following question:"


def test_a_question_is_split_from_its_instruction_and_its_marker_is_gone(mmeb, picture):
    source = mmeb_train(mmeb, "A-OKVQA")
    record = source.record(3)
    assert len(source) == 5 and record.dataset == "A-OKVQA" and record.id == "3"
    assert record.query.text == f"{QUESTION} What is number 3?"
    assert record.query.instruction == QUESTION and record.query.words == "What is number 3?"
    assert [image.data for image in record.query.images] == [picture(3)]
    assert (record.target.text, record.target.images, record.negatives) == ("answer 0", (), ())
    assert record.target_key == source.record(0).target_key != source.record(1).target_key


PUBLISHED = """
ImageNet-1K, ImageNet-A, ImageNet-R | Represent the given image for classification
N24News | Represent the given news image with the following caption for domain classification:
HatefulMemes | Represent the given image for binary classification to determine whether it constitutes hateful speech or not
VOC2007, ObjectNet | Identify the object shown in the image
SUN397, Place365 | Identify the scene shown in the image
Country211 | Identify the country depicted in the image
OK-VQA, A-OKVQA, DocVQA, InfographicsVQA, ChartQA | Represent the given image with the following question:
Visual7W, ScienceQA, VizWiz, GQA, TextVQA | Represent the given image with the following question:
VisDial | Represent the given dialogue about an image, which is used for image retrieval:
CIRR | Given an image, find a similar everyday image with the described changes:
FashionIQ | Find an image to match the fashion image and style note:
NIGHTS | Find a day-to-day image that looks similar to the provided image.
WebQA | Find a Wikipedia image that answers this question:
OVEN | Retrieve a Wikipedia image-description pair that provides evidence for the question of this image:
EDIS | Find a news image that matches the provided caption:
Wiki-SS-NQ | Find the document image that can answer the given query:
MSCOCO_t2i | Find me an everyday image that matches the given caption:
MSCOCO_i2t | Find an image caption describing the given everyday image.
VisualNews_t2i | Retrieve an image of this news caption.
VisualNews_i2t | Find a caption for the news in the given photo.
MSCOCO | Select the portion of the image that isolates the object labeled as
RefCOCO | Select the portion of the image that follows the language expressions.
RefCOCO-Matching | Select the portion of the image that follows the language expressions:
Visual7W-Pointing | Select the portion of the image that answers the question
"""  # noqa: E501
OF_TARGETS = """
Represent the given image.
Represent the given cropped image of the object
Represent the given Wikipedia image with related text information:
Represent the given image with related text information:
Represent the given document screenshot.
Select the portion of the image that follows the language expressions:
"""


def test_the_instructions_are_those_of_the_36_sets():
    """Typed a second time, from what is published: a slip in either is found."""
    lines = [line.split(" | ") for line in PUBLISHED.strip().splitlines()]
    wanted = {name: text for names, text in lines for name in names.split(", ")}
    assert len(wanted) == 36 and wanted == QUERY_INSTRUCTIONS
    assert tuple(OF_TARGETS.strip().splitlines()) == TARGET_INSTRUCTIONS


def test_other_wordings_of_an_instruction_stay_in_the_text(mmeb):
    query = mmeb_train(mmeb, "A-OKVQA", "diverse_instruction").record(1).query
    assert query.text == "Look, then take the following question: What is number 1?" and not query.instruction


def test_pictures_come_out_of_the_published_zip(mmeb, picture):
    record = mmeb_train(mmeb, "MSCOCO_t2i").record(2)
    assert record.query.words == "scene 2" and not record.query.images
    assert record.target.images[0].data == picture(12) and record.target.instruction == "Represent the given image."
    assert [negative.images[0].data for negative in record.negatives] == [picture(13)]
    assert decode(record.target.images[0]).size == (40, 30)


def test_an_instruction_of_ones_own_replaces_the_stored_one(mmeb):
    one = mmeb_train(mmeb, "A-OKVQA", instruction="Answer:").record(0).query
    assert one.text == "Answer: What is number 0?" and one.words == "What is number 0?"
    two = mmeb_train(mmeb, "A-OKVQA", instruction="Asked «{text}», what is right?").record(0).query
    assert two.text == "Asked «What is number 0?», what is right?"


def test_the_first_candidate_is_right(tmp_path, to_parquet, picture):
    rows = [
        {
            "qry_text": "<|image_1|>\nFind an image caption describing the given everyday image.\n",
            "qry_img_path": f"MSCOCO_i2t/image_{i}.jpg",
            "tgt_text": [f"caption {i}", "other", "third"],
            "tgt_img_path": ["", "", ""],
        }
        for i in range(3)
    ]
    to_parquet(tmp_path / "MSCOCO_i2t" / "test-00000-of-00001.parquet", rows)
    (tmp_path / "images" / "MSCOCO_i2t").mkdir(parents=True)
    for i in range(3):
        (tmp_path / "images" / "MSCOCO_i2t" / f"image_{i}.jpg").write_bytes(picture(i))
    source = mmeb_eval(tmp_path, "MSCOCO_i2t", negatives=1)
    record = source.record(1)
    assert record.target.text == "caption 1" and [n.text for n in record.negatives] == ["other"]
    assert record.query.images[0].data == picture(1) and record.query.text == QUERY_INSTRUCTIONS["MSCOCO_i2t"]
    assert candidates(source, 2) == (("caption 2", ""), ("other", ""), ("third", ""))


def test_pictures_of_the_evaluation_come_out_of_its_one_zip(tmp_path, to_parquet, picture):
    row = {
        "qry_text": f"<|image_1|>\n{QUESTION} What is it?\n",
        "qry_img_path": "A-OKVQA/image_0.jpg",
        "tgt_text": ["a kiwi", "a dog"],
        "tgt_img_path": ["", ""],
    }
    to_parquet(tmp_path / "A-OKVQA" / "test-00000-of-00001.parquet", [row])
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr("A-OKVQA/image_0.jpg", picture(4))
    record = mmeb_eval(tmp_path, "A-OKVQA").record(0)
    assert record.query.images[0].data == picture(4) and record.query.words == "What is it?"
    assert record.target.text == "a kiwi" and not record.negatives


def test_several_hard_negatives_stand_in_lists(tmp_path, to_parquet, picture):
    """Texts and pictures of one place belong together; empty places are none."""
    row = {
        "qry": f"<|image_1|>\n{QUESTION} What is it?\n",
        "qry_image_path": "images/OVEN/Train/0.jpg",
        "pos_text": "a kiwi",
        "pos_image_path": "",
        "neg_text": ["a dog", "<|image_1|>\nRepresent the given image.\n", ""],
        "neg_image_path": ["", "images/OVEN/Train/1.jpg", ""],
    }
    to_parquet(tmp_path / "OVEN" / "original-00000-of-00001.parquet", [row])
    (tmp_path / "images" / "OVEN" / "Train").mkdir(parents=True)
    for i in range(2):
        (tmp_path / "images" / "OVEN" / "Train" / f"{i}.jpg").write_bytes(picture(i))
    wrong = mmeb_train(tmp_path, "OVEN").record(0).negatives
    assert [(content.text, len(content.images)) for content in wrong] == [
        ("a dog", 0),
        ("Represent the given image.", 1),
    ]
    assert wrong[1].images[0].data == picture(1)


def test_markers_without_pictures_are_stripped_and_the_training_set_has_its_own_spelling(tmp_path, to_parquet, picture):
    common = {"pos_text": "kiwi", "pos_image_path": "", "neg_text": "", "neg_image_path": ""}
    asked = {"qry": f"<|image_1|>\n{QUERY_INSTRUCTIONS['WebQA']} Where is it?\n", "qry_image_path": ""}
    to_parquet(tmp_path / "WebQA" / "original-00000-of-00001.parquet", [common | asked])
    query = mmeb_train(tmp_path, "WebQA").record(0).query
    assert (query.text, query.images) == (f"{QUERY_INSTRUCTIONS['WebQA']} Where is it?", ())
    shown = {"qry": "<|image_1|>\nRepresent the given image for classification\n", "qry_image_path": "a.jpg"}
    to_parquet(tmp_path / "ImageNet_1K" / "original-00000-of-00001.parquet", [common | shown])
    (tmp_path / "a.jpg").write_bytes(picture(0))
    query = mmeb_train(tmp_path, "ImageNet_1K").record(0).query
    assert query.instruction == QUERY_INSTRUCTIONS["ImageNet-1K"] and not query.words


def test_the_instructed_edition_joins_instruction_and_text(tmp_path, to_parquet, picture):
    row = {
        "qry_inst": "<|image_1|> Find the cat.", "qry_text": "A red one.", "qry_img_path": "a.jpg",
        "tgt_inst": "<|image_1|> Represent it.", "tgt_text": ["", ""], "tgt_img_path": ["b.jpg", "a.jpg"],
    }  # fmt: skip
    to_parquet(tmp_path / "Cats" / "test-00000-of-00001.parquet", [row])
    for seed, name in enumerate(("a.jpg", "b.jpg")):
        (tmp_path / name).write_bytes(picture(seed))
    record = mmeb_eval(tmp_path, "Cats").record(0)
    assert record.query.text == "Find the cat. A red one." and record.query.instruction == "Find the cat."
    assert record.target.text == "Represent it." and record.target.images[0].data == picture(1)


def test_markers_are_stripped_where_they_begin_a_text():
    assert strip_markers("<|image_1|>\nFind it\n") == "Find it"
    assert strip_markers("<|image_1|> <|image_2|>\nboth") == "both"
    assert strip_markers("say <|image_1|> aloud") == "say <|image_1|> aloud"
    assert split_instruction(("Find it:",), "<|image_1|>\nFind it: now\n") == ("Find it:", "now")


def test_instructions_are_data_with_a_hash():
    assert len(QUERY_INSTRUCTIONS) == 36 and len(TRAIN_CAPS) == 20 and len(instructions_hash()) == 12
    assert {name.replace("_1K", "-1K") for name in TRAIN_CAPS} <= QUERY_INSTRUCTIONS.keys()


def test_a_source_pickles_and_reads_the_same(mmeb):
    source = mmeb_train(mmeb, "MSCOCO_t2i")
    again = pickle.loads(pickle.dumps(source))
    assert again.record(1) == source.record(1) and again.fingerprint() == source.fingerprint()
    assert len(pickle.dumps(source)) < 3000  # paths travel, rows do not


@pytest.mark.parametrize(
    ("subset", "split", "words"),
    [("AOKVQA", "original", "did you mean 'A-OKVQA'"), ("A-OKVQA", "funny", "choose one of original")],
)
def test_what_is_not_there_is_named(mmeb, subset, split, words):
    with pytest.raises(SourceError, match=words):
        mmeb_train(mmeb, subset, split)
