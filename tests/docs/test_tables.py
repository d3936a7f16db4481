"""Tables and figure of the evidence are those of the rows."""

import json
import re

import figure
import pytest
import tables
from documents import Document


DECIMAL = re.compile(r"(?<![\w.])\d[\d,]*\.\d+")
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


# Decimals of README and evidence that are no results: the paper's, releases, and operations over those of another row.
NO_ROW = {"2403.07883", "3.11", "1.45", "1.74", "76.23", "75.23", "75.92", "0.57", "0.84"}


def test_decimals_of_readme_and_evidence_stand_in_a_line_of_the_appendix():
    known = {*NO_ROW}
    for name in tables.TABLES:
        for line in tables.lines_of(name):
            known.update(DECIMAL.findall(" ".join(line.values())))
    for path in tables.PAGES[:2]:
        texts = [token.content for token in Document(path).tokens if token.type == "text"]
        assert set(DECIMAL.findall(" ".join(texts))) <= known


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


def test_the_figure_is_drawn_from_the_rows(pictures, tmp_path):
    figure.draw(tables.read("pictures"), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000


def test_a_selection_that_is_new_in_the_rows_is_drawn(tmp_path):
    rows = tables.read("vlm_methods")
    new = [{**row, "selection": "another"} for row in rows if row["selection"] == "FastV"]
    figure.draw_selections(rows, tmp_path / "old.png")
    figure.draw_selections(rows + new, tmp_path / "new.png")
    assert (tmp_path / "old.png").read_bytes() != (tmp_path / "new.png").read_bytes()
