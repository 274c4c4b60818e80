"""MMEB as published: columns, markers, instructions, pictures in folders and zips, candidates."""

import pickle

import pytest

from cocoa_jax.data.pixels import decode
from cocoa_jax.data.readers.mmeb import (
    QUERY_INSTRUCTIONS,
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
