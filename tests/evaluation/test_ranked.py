"""Sets to score: what is read of MMEB, of BEIR's layout and of folders of classes, and what is refused."""

import pytest

from cocoa_jax.config import load_config
from cocoa_jax.data.readers.ranked import RankedConfig, RankedFile, open_ranked
from cocoa_jax.data.sources import SourceError


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
    import shutil

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


def test_a_judgement_of_an_unknown_document_is_refused(own_sets, tmp_path):
    import shutil

    shutil.copytree(own_sets.parent / "fruit", tmp_path / "fruit")
    (tmp_path / "fruit" / "qrels" / "test.tsv").write_text("q0\td9\t1\n")
    with pytest.raises(SourceError, match=r"test.tsv line 1: 'q0\\td9\\t1'"):
        open_ranked("mine", RankedConfig("beir", "fruit"), tmp_path)
