"""The page of a study: tables from pieces between the marks, and what people wrote around them stays."""

import dataclasses

import pytest

from cocoa_jax.evaluation.tasks import TASKS
from cocoa_jax.study import report
from cocoa_jax.study.compare import difference
from cocoa_jax.study.design import Question
from cocoa_jax.study.pieces import read_results, write_result
from cocoa_jax.study.report import BEGIN, END, SIDES, write_report


@pytest.fixture
def run(tmp_path, made):
    folder = tmp_path / "run"
    for seed in (0, 1):
        write_result(folder, f"bare-{seed}", made("bare", seed, 1e-3, 0.2, recipe="bidirectional"))
        write_result(folder, f"cocoa-{seed}", made("cocoa", seed, 1e-3, 0.6))
    for arm in ("longer", "cut"):
        write_result(folder, f"{arm}-0", made(arm, 0, 1e-3, 0.5))
    for rate, accuracy in ((1e-3, 0.9), (2e-3, 0.1)):
        write_result(folder, f"search-cocoa-{rate:g}", made("cocoa", 0, rate, accuracy, search=True))
    return folder


def test_a_report_has_tables_and_plots(run, study, tmp_path):
    page = write_report(study, run, tmp_path / "docs")
    text = page.read_text()
    assert "| chance | - | 2.0 | 2.0 | 2.0 | 2.0 | 2.0 | 2.0 |" in text  # the pieces hold no classification
    assert "### Equal steps" in text and "### Later" in text
    question = text.split("### Equal steps")[1].split("### ")[0]
    scores, gains = (line for line in question.splitlines() if line.startswith("| all three"))
    assert " ± " in scores and "**+" in gains  # 0.6 against 0.2: a clear difference
    assert "| cocoa | **" in text  # the better rate, in bold
    rates = text.split("| recipe | 0.001 | 0.002 | chosen |")[1].splitlines()
    assert rates[2] == "| chance | 2.0 | 2.0 |  |"
    sides = text.split("| less the first |")[1].splitlines()[2]
    assert sides.startswith("| all three | **+") and sides.count("**+") == 4  # no task is picture to picture
    assert "Not all of its 3 seeds are there for: cocoa, cut." in text
    for plot in ("steps", "compute", "late", "against-compute"):
        assert f"study/{plot}.svg" in text and (tmp_path / "docs" / "study" / f"{plot}.svg").stat().st_size > 5000
    assert read_results(tmp_path / "docs" / "study").keys() == read_results(run).keys()


def test_where_the_pieces_come_from_and_which_are_stale(run, study, tmp_path):
    first = write_report(study, run, tmp_path / "docs").read_text().split(BEGIN)[1].strip().splitlines()[0]
    assert first.startswith(
        "8 pieces by the program's versions `111111111111` (8); 5 are stale (made with other settings"
    )
    assert first.endswith(": search-cocoa-0.001, search-cocoa-0.002, cocoa-0, cocoa-1, cut-0.")


def sides(text, question):
    """The second table of a question: its cells by the name of the row and of the column."""
    lines = text[text.index("| less the first", text.index(f"### {question}")) :].split("\n\n")[0].splitlines()
    head, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in (lines[0], *lines[2:]))
    return {row[0]: dict(zip(head, row, strict=True)) for row in rows}


def test_a_column_leaves_small_tasks_out(run, study, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "LEAST", 17)
    cell = sides(write_report(study, run, tmp_path).read_text(), "Equal steps")["all three"][
        "tasks of 17 queries or more"
    ]
    arms = report.by_arm(read_results(run))
    large, whole = (difference(arms["cocoa"], arms["bare"], least=least) for least in (17, 0))
    assert cell.startswith(f"**{100 * large.mean:+.1f} ({100 * large.low:+.1f} to ")
    assert large.mean != pytest.approx(whole.mean, abs=1e-3)


def test_pairs_that_a_question_names_are_compared(run, study, tmp_path):
    pairs = (("cocoa", "longer"), ("bare", "cocoa"))
    questions = {"all": Question("All", ("bare", "cocoa", "longer"), 1, pairs=pairs)}
    rows = sides(write_report(dataclasses.replace(study, questions=questions), run, tmp_path).read_text(), "All")
    assert list(rows) == ["all three", "longer", "all three **less** longer", "bare **less** all three"]
    arms = report.by_arm(read_results(run))
    for (one, other), row in zip(pairs, list(rows.values())[2:], strict=True):
        found = difference(arms[one], arms[other])
        assert f"{100 * found.mean:+.1f} ({100 * found.low:+.1f} to {100 * found.high:+.1f}" in row["all"]
    (run / "pieces" / "longer-0.json").unlink()  # not made yet
    rows = sides(write_report(dataclasses.replace(study, questions=questions), run, tmp_path).read_text(), "All")
    assert list(rows) == ["all three", "bare **less** all three"]


def test_every_task_is_on_one_side():
    assert sorted(name for names in SIDES.values() for name in names) == sorted(TASKS)


def test_a_question_of_which_one_arm_is_there_is_left_out(run, study, tmp_path):
    (run / "pieces" / "cut-0.json").unlink()
    assert "### Later" not in write_report(study, run, tmp_path / "docs").read_text()


@pytest.mark.parametrize(
    ("accuracies", "said"),
    [
        ({1e-3: 0.9, 2e-3: 0.1, 4e-3: 0.1}, "0.001 (**the lowest tried**)"),
        ({1e-3: 0.1, 2e-3: 0.9, 4e-3: 0.1}, "0.002"),
        ({1e-3: 0.1, 2e-3: 0.1, 4e-3: 0.9}, "0.004 (**the highest tried**)"),
        ({1e-3: 0.1, 2e-3: 0.9}, "0.002 (**the highest tried**); without 0.004"),
        # Tried once more by hand, in a folder that is reported by a study of fewer rates: no edge any more.
        ({5e-4: 0.1, 1e-3: 0.9, 2e-3: 0.1, 4e-3: 0.1}, "0.001"),
    ],
)
def test_the_chosen_rate_is_told_and_whether_it_is_an_edge(study, tmp_path, made, accuracies, said):
    study = dataclasses.replace(study, rates=(1e-3, 2e-3, 4e-3))
    for rate, accuracy in accuracies.items():
        write_result(tmp_path / "run", f"search-cocoa-{rate:g}", made("cocoa", 0, rate, accuracy, search=True))
    text = write_report(study, tmp_path / "run", tmp_path / "docs").read_text()
    assert next(line for line in text.splitlines() if line.startswith("| cocoa |")).endswith(f"| {said} |")


def test_what_people_wrote_stays_and_the_tables_are_replaced(run, study, tmp_path):
    page = write_report(study, run, tmp_path)
    page.write_text(page.read_text().replace(BEGIN, f"Nothing holds.\n\n{BEGIN}") + "\nThe end.\n")
    before = page.read_text()
    write_report(study, tmp_path / "study", tmp_path)  # from the pieces that were copied
    assert page.read_text() == before
    page.write_text(before.replace(END, ""))
    with pytest.raises(ValueError, match=r"must hold .* once"):
        write_report(study, run, tmp_path)


def test_a_folder_without_pieces_is_refused(study, tmp_path):
    with pytest.raises(ValueError, match="holds no pieces"):
        write_report(study, tmp_path, tmp_path)
