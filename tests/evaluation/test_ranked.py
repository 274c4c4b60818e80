"""Sets to score: what is read of MMEB, of BEIR's layout and of folders of classes, and what is refused."""

import json
import os
import shutil

import pyarrow
import pytest
from pyarrow import parquet

from cocoa_jax.config import load_config
from cocoa_jax.data.readers.ranked import RankedConfig, RankedFile, open_ranked
from cocoa_jax.data.sources import Content, SourceError


def opened(path):
    config = load_config(RankedFile, path)
    return {name: open_ranked(name, one, path.parent) for name, one in config.sets.items()}


def test_mmeb_gives_each_query_its_own_list_with_the_right_one_first(mmeb_eval_root):
    one = open_ranked("VOC2007", RankedConfig("mmeb", "", "classification", "IND"), mmeb_eval_root)
    assert (len(one.queries), len(one.candidates)) == (6, 4)
    for i, (listed, right) in enumerate(zip(one.lists, one.right, strict=True)):
        assert right == {int(listed[0])}
        assert one.candidates[listed[0]].text == ["a kiwi", "a boat", "a car", "a hill"][i % 4]
    assert [len(listed) for listed in one.lists] == [4, 5, 4, 4, 4, 4]
    assert one.queries[0].text == "Identify the object shown in the image" and len(one.queries[0].images) == 1


def test_nothing_is_read_before_it_is_asked_for(mmeb_eval_root, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(mmeb_eval_root, root)
    (root / "images" / "VOC2007" / "image_3.png").unlink()
    one = open_ranked("VOC2007", RankedConfig("mmeb", ""), root)
    assert len(one.queries[2].images) == 1
    with pytest.raises(SourceError, match=r"VOC2007: query 'VOC2007/image_3.png': .*not in"):
        one.queries[3]


def test_beir_takes_judged_queries_and_all_documents(own_sets):
    fruit = opened(own_sets)["fruit"]
    assert [query.text for query in fruit.queries] == ["Find a document: which fruit is green?", "Find a document:"]
    assert [len(document.images) for document in fruit.candidates] == [0, 1, 0, 1]
    assert fruit.candidates[0].text == "Kiwi a green fruit"
    assert fruit.lists is None and fruit.right == (frozenset({0}), frozenset({1}))  # a judgement of 0 is none


def test_a_folder_of_classes_names_them(own_sets):
    things = opened(own_sets)["things"]
    assert [label.text for label in things.candidates] == ["hill", "red car"]
    assert things.right == (frozenset({0}),) * 2 + (frozenset({1}),) * 2
    assert {query.text for query in things.queries} == {"Name it."} and things.split == "IND"


def test_another_instruction_is_another_set(own_sets):
    one, other = (RankedConfig("beir", "fruit", instruction=text) for text in ("Find:", "Seek:"))
    sources = [open_ranked("fruit", config, own_sets.parent).source for config in (one, other, one)]
    assert sources[0] == sources[2] != sources[1]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (RankedConfig("beir", "nowhere"), "corpus.jsonl is not there"),
        (RankedConfig("beir", "fruit", qrels="dev"), "dev.tsv cannot be read"),
        (RankedConfig("classes", "nowhere"), "is no folder"),
        (RankedConfig("mmeb", "fruit"), "no test-"),
    ],
    ids=str,
)
def test_what_is_not_there_is_named(own_sets, config, words):
    with pytest.raises(SourceError, match=words):
        open_ranked("mine", config, own_sets.parent)


@pytest.fixture
def fruit(own_sets, tmp_path):
    """A copy to change, and a function that writes judgements and opens the set."""
    shutil.copytree(own_sets.parent / "fruit", tmp_path / "fruit")

    def judge(*lines: str):
        written = "".join(f"{line}\n" for line in lines).encode("utf-8", "surrogateescape")
        (tmp_path / "fruit" / "qrels" / "test.tsv").write_bytes(written)
        return open_ranked("mine", RankedConfig("beir", "fruit"), tmp_path)

    return tmp_path / "fruit", judge


def test_what_scores_above_0_is_relevant(fruit):
    lines = ["q0\td0\t1.5", "q0\td1\t0.0", "q1\td0\t-2", "q1\td1\t 3 ", "q2\td0\t0"]
    assert fruit[1]("query-id\tcorpus-id\tscore", *lines).right == (frozenset({0}), frozenset({1}))


def test_a_document_with_the_id_of_a_query_is_none_of_its_candidates(fruit):
    folder, judge = fruit
    lines = ["query-id\tcorpus-id\tscore", "q0\td0\t1", "q1\td1\t1", "q2\td2\t1"]
    assert judge(*lines).left_out is None
    queries = (folder / "queries.jsonl").read_text()
    (folder / "queries.jsonl").write_text(queries.replace('"q0"', '"d3"').replace('"q1"', '"d1"'))
    one = judge(*(line.replace("q0", "d3").replace("q1", "d1") for line in lines))
    assert one.left_out.tolist() == [3, -1, -1]  # the second is judged right, the third is no document
    assert one.lists is None and one.right == (frozenset({0}), frozenset({1}), frozenset({2}))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("q0\td9\t1", r"test.tsv line 1: document 'd9' is not in its .jsonl"),
        ("q9\td0\t1", r"test.tsv line 1: query 'q9' is not in its .jsonl"),
        ("q0 d0 1", r"test.tsv line 1: 'q0 d0 1' has 1 columns: give a query, a document and a score"),
        ("q0\td0\tno", r"test.tsv line 1: score 'no' is no number: give one above 0"),
        ("q0\td0\tnan", r"score 'nan' is no number"),
        ("h\udcfcgel\td0\t1", r"test.tsv line 1: no UTF-8 \(invalid start byte at byte 1\): encode the file again"),
    ],
)
def test_a_judgement_that_cannot_be_read_is_named(fruit, line, words):
    with pytest.raises(SourceError, match=words):
        fruit[1](line)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["\u2028", "\x85", "\x1c", "\x0b"])
def test_a_judgement_ends_with_a_newline_alone(fruit, mark, end):
    folder, judge = fruit
    corpus = (folder / "corpus.jsonl").read_text()
    (folder / "corpus.jsonl").write_text(corpus.replace('"d0"', json.dumps(f"d{mark}0")))
    one = judge(*(f"{line}{end[:-1]}" for line in ("query-id\tcorpus-id\tscore", f"q0\td{mark}0\t1", "", "q1\td1\t1")))
    assert one.right == (frozenset({0}), frozenset({1}))


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"text": 7}, r"corpus.jsonl row 4: text is a int, expected text"),
        ({"title": 1984, "text": "a novel"}, r"corpus.jsonl row 4: title is a int, expected text"),
        ({"title": ["a"]}, r"corpus.jsonl row 4: title is a list, expected text"),
        ({"text": "a \ud800"}, r"corpus.jsonl row 4: text is no UTF-8 \(surrogates not allowed at character 2\)"),
        ({"image": "\ud800.png"}, r"corpus.jsonl row 4: image is no UTF-8"),
        ({"image": 7}, r"corpus.jsonl row 4: image is a int, expected text"),
        ("no object", r"mine: corpus.jsonl row 4: a str, expected an object"),
    ],
    ids=str,
)
def test_an_entry_that_is_no_text_is_named(fruit, entry, words):
    folder, judge = fruit
    with (folder / "corpus.jsonl").open("a") as lines:
        lines.write(json.dumps({"_id": "d4", **entry} if isinstance(entry, dict) else entry) + "\n")
    with pytest.raises(SourceError, match=words):
        judge("q0\td0\t1")


def test_an_entry_may_leave_out_what_it_does_not_have(fruit):
    folder, judge = fruit
    with (folder / "corpus.jsonl").open("a") as lines:
        lines.write('{"_id": "d4", "title": null, "text": "a hill", "image": null}\n')
    assert judge("q0\td4\t1").candidates[4] == Content("a hill")


def test_a_class_whose_name_is_no_text_is_named(tmp_path):
    os.mkdir(os.fsencode(tmp_path) + b"/h\xfcgel")  # as a disk of Latin-1 names has it
    with pytest.raises(SourceError, match=r"mine: the name of the folder 'h\\udcfcgel' is no UTF-8"):
        open_ranked("mine", RankedConfig("classes", ""), tmp_path)


@pytest.mark.parametrize(
    "row",
    [
        {"qry_text": 7, "qry_img_path": "", "tgt_text": ["a"], "tgt_img_path": [""]},
        {"qry_text": "a", "qry_img_path": "", "tgt_text": [1, 2], "tgt_img_path": ["", ""]},
    ],
    ids=["query", "candidates"],
)
def test_a_set_of_mmeb_whose_words_are_numbers_is_refused(tmp_path, row):
    (tmp_path / "mine").mkdir()
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "mine" / "test-00000-of-00001.parquet")
    with pytest.raises(SourceError, match="mine row 0: expected a text, a path and two lists of candidates"):
        open_ranked("mine", RankedConfig("mmeb", ""), tmp_path)


def test_an_id_that_is_there_twice_is_refused(fruit):
    folder, judge = fruit
    with (folder / "corpus.jsonl").open("a") as lines:
        lines.write('{"_id": "d1", "text": "again"}\n')
    with pytest.raises(SourceError, match=r"corpus.jsonl row 4: `_id` 'd1' is that of an earlier row"):
        judge("q0\td0\t1")


@pytest.mark.parametrize("name", ["fruit", "things", "VOC2007"])
def test_another_picture_in_a_folder_is_other_data(own_sets, mmeb_eval_root, tmp_path, name):
    """Of another size, or written at another time."""
    own = name != "VOC2007"
    root = shutil.copytree(own_sets.parent if own else mmeb_eval_root, tmp_path / "copy")
    config = load_config(RankedFile, own_sets).sets[name] if own else RankedConfig("mmeb", "")
    places = {"fruit": "fruit/boat.png", "things": "things/hill/1.png", "VOC2007": "images/VOC2007/image_2.png"}
    path, sources = root / places[name], []
    for change in (lambda: None, lambda: None, lambda: os.utime(path, (1, 1)), lambda: path.write_bytes(b"other")):
        change()
        sources.append(open_ranked(name, config, root).source)
    assert sources[0] == sources[1] and len(set(sources)) == 3


def test_a_set_says_what_its_queries_begin_with_and_whose_words_these_are(own_sets, mmeb_eval_root, tmp_path):
    fruit = opened(own_sets)["fruit"]
    assert (fruit.instruction, fruit.prompts) == ("Find a document:", "the sets' own file")
    one = open_ranked("GQA", RankedConfig("mmeb", ""), mmeb_eval_root)
    assert one.instruction == "Represent the given image with the following question:" and one.prompts == "MMEB-eval"
    own = open_ranked("GQA", RankedConfig("mmeb", "", instruction="Answer:"), mmeb_eval_root)
    assert (own.instruction, own.prompts) == ("Answer:", "the sets' own file")
    row = {"qry_inst": "<|image_1|>\nAnswer what is asked.\n", "qry_text": "what?", "qry_img_path": "", "tgt_inst": "",
           "tgt_text": ["a", "b"], "tgt_img_path": ["", ""]}  # fmt: skip
    (tmp_path / "GQA").mkdir()
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "GQA" / "test-00000-of-00001.parquet")
    two = open_ranked("GQA", RankedConfig("mmeb", ""), tmp_path)
    assert (two.instruction, two.prompts) == ("Answer what is asked.", "MMEB_Test_Instruct")
    assert two.queries[0].text == "Answer what is asked. what?"
