"""Tables and figure of the evidence are those of the rows."""

import json
import re
import shlex
import subprocess
from functools import partial
from pathlib import Path

import figure
import pytest
import tables
from documents import Document, numbers_of
from places import ROOT


SCHEDULES = {"unpruned": 1.0, "6:text:0.0625": 0.5, "9:text:0.25": 0.8}


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """Put rows into `pictures.json`: three seeds of each schedule, of which the pruned ones are a point behind."""
    rows = []
    for schedule, operations in SCHEDULES.items():
        is_unpruned = schedule == "unpruned"
        for seed in (1, 2, 3):
            row = {
                "contestant": "unpruned" if is_unpruned else "text",
                "schedule": schedule,
                "patches": 64 if is_unpruned else 4,
                "operations_1": operations,
                "operations_5": operations,
                "test_accuracy": (90 + seed - (0 if is_unpruned else 1)) / 100,
                "seed": seed,
            }
            rows.append(row)
    shared = {"pictures": "cards", "pixels": 112, "precision": "float32", "steps": 1250, "unpruned_steps": 750}
    (tmp_path / "pictures.json").write_text(json.dumps({"shared": shared, "rows": rows}))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)


def test_the_tables_on_the_pages_are_those_of_the_rows():
    for path in tables.PAGES:
        page = path.read_text(encoding="utf-8")
        assert tables.rewrite(re.sub(r"\d+\.\d ± ", "0.0 ± ", page, count=1)) == page


def test_all_lines_stand_in_the_appendix_and_all_excerpts_on_the_evidence_page():
    readme, evidence, appendix = [tables.MARKER.findall(path.read_text(encoding="utf-8")) for path in tables.PAGES]
    assert set(appendix) == tables.TABLES.keys()
    assert {*readme, *evidence} == tables.SETTINGS["excerpts"].keys()
    lines = {name: tables.lines_of(name) for name in tables.TABLES}
    for excerpt in tables.SETTINGS["excerpts"].values():
        table = lines[excerpt["table"]]
        for wanted in excerpt["lines"]:
            found = [line for line in table if wanted.items() <= line.items()]
            assert found, wanted


README, EVIDENCE, APPENDIX = [Document(path) for path in tables.PAGES]
PAPER = {"40", "1.45", "1.74", "76.23", "75.23", "75.92"}  # results of the paper
NO_RESULTS = {"95"}  # 95% interval


def numbers_of_rows():
    """Return the numbers of all lines of the appendix, and of its code."""
    known = set()
    for name in tables.TABLES:
        for line in tables.lines_of(name):
            known.update(numbers_of(" ".join(line.values())))
    return known.union(*(numbers_of(block) for block in APPENDIX.blocks("python")))


def test_numbers_of_the_evidence_page_stand_in_rows_and_those_of_a_claim_in_its_table():
    claims = EVIDENCE.sections(in_tables=False)
    cells = EVIDENCE.sections(in_tables=True)
    known = numbers_of_rows()
    introduction, *sections = claims
    assert set(numbers_of(claims[introduction])) <= known
    for section in sections:
        assert set(numbers_of(claims[section])) <= set(numbers_of(cells[section]))
    assert set(numbers_of(" ".join(cells.values()))) <= known | PAPER | NO_RESULTS


def test_a_result_of_the_readme_stands_in_the_section_that_it_leads_to():
    claims = EVIDENCE.sections(in_tables=False)
    cells = EVIDENCE.sections(in_tables=True)
    results = re.findall(r"^\| \[([^]]+)\]\(docs/evidence.md#([\w-]+)\)(.*)$", README.text, re.MULTILINE)
    assert results
    for name, section, line in results:
        others = re.sub(r"\]\(\S+\)", "]", line)
        assert set(numbers_of(f"{name} {others}")) <= set(numbers_of(claims[section] + cells[section]))


TAKES_A_PATH = {"--model", "--model_name_or_path", "--resume_from_checkpoint", "--train_file"}


def test_paths_in_commands_of_rows_are_explained_or_ship():
    explained = {"examples", "last"}
    for span in APPENDIX.code_spans:
        explained.add(re.sub(r"\d+", "", span.partition("/")[0]))
    for path in tables.RESULTS.glob("*.json"):
        for row in tables.read(path.stem):
            words = shlex.split(row.get("command", ""))
            for option, word in zip(words, words[1:]):
                assert not Path(word).is_absolute(), words
                if option in TAKES_A_PATH:
                    assert re.sub(r"\d+", "", word.partition("/")[0]) in explained, words


def has_in_git(name):
    return subprocess.run(["git", "cat-file", "-e", name], cwd=ROOT, capture_output=True).returncode == 0


def test_scripts_of_rows_and_pages_are_in_the_commit_that_they_name():
    wanted = set()
    for path in tables.RESULTS.glob("*.json"):
        for row in tables.read(path.stem):
            scripts = [word for word in shlex.split(row.get("command", "")) if word.endswith(".py")]
            for script in scripts[:1]:  # a variable may stand before it
                commit = row.get("script_commit", row["git_commit"])
                wanted.add((commit, script))
    for page in (README, EVIDENCE):
        for span in page.code_spans:
            wanted.update(re.findall(r"^git show (\w+):(\S+)$", span))
    here = [(commit, script) for commit, script in wanted if has_in_git(commit)]
    if not here:
        pytest.skip("Needs the history of the repository.")
    for commit, script in here:
        assert has_in_git(f"{commit}:{script}"), (commit, script)


def test_a_line_is_compared_with_the_unpruned_baseline_which_comes_first(pictures):
    unpruned, few, many = tables.lines_of("pictures")
    assert unpruned["Schedule"] == "unpruned"
    assert unpruned["Test"] == "92.0 ± 1.0"
    assert unpruned["Difference"] == ""
    assert few["Baseline"] == "unpruned"
    assert few["Its result"] == "92.0 ± 1.0"
    assert few["Difference"] == "-1.0"
    assert many["Operations, 1 text"] == "0.80"
    assert many["Runs"] == "3"
    assert "Text sensitivity" not in few  # no row has it


BUSY = figure.rows_with("marks", figure.BUSY_SCENES)
EMOJI = figure.rows_with("pictures", figure.EMOJI_SCENES)
STEPS = figure.rows_with("pictures", figure.PICTURES)
METHODS = tables.read("vlm_methods")


@pytest.mark.parametrize(
    "draw, rows, more",
    [
        (
            partial(figure.draw_every_rate, emoji_scenes=EMOJI),
            BUSY,
            [{**row, "accuracy_color": 0.9} for row in BUSY if row["patches"] == 36],
        ),
        (
            partial(figure.draw_every_rate, BUSY),
            EMOJI,
            [{**row, "test_accuracy": 0.9} for row in EMOJI if row["patches"] == 4],
        ),
        (figure.draw_steps, STEPS, [{**row, "steps": 5000} for row in STEPS]),
        (figure.draw_selections, METHODS, [{**row, "selection": "new"} for row in METHODS]),
    ],
    ids=["busy scenes", "emoji scenes", "steps", "selections"],
)
def test_figures_show_the_rows(tmp_path, draw, rows, more):
    draw(rows, path=tmp_path / "old.png")
    draw(rows + more, path=tmp_path / "new.png")
    assert (tmp_path / "old.png").read_bytes() != (tmp_path / "new.png").read_bytes()
