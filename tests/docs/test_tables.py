"""`docs/tables.py` and `docs/draw_accuracy.py`: tables and figure agree with the rows."""

import re

import draw_accuracy
import PIL.Image
import pytest
import tables
from places import ROOT


@pytest.fixture
def page(tmp_path, monkeypatch):
    """Return a document with one table, made from the repository's rows."""
    page = tmp_path / "page.md"
    page.write_text("Before.\n\n<!-- table: statements -->\n<!-- end -->\n\nAfter.\n")
    monkeypatch.setattr(tables, "documents", lambda: [page])
    monkeypatch.setattr(tables, "DOCS", tmp_path / "docs")
    return page


def test_the_tables_of_the_documents_are_those_of_the_rows():
    assert tables.outdated() == []


def test_every_table_is_in_a_document():
    placed = {name for page in tables.documents() for name in re.findall(tables.TABLE, page.read_text())}
    assert placed == tables.TABLES.keys()


def test_a_changed_cell_is_found_and_written_again(page):
    with pytest.raises(SystemExit):
        tables.main(["--check"])
    tables.main([])
    text = page.read_text()
    tables.main(["--check"])
    assert "76.2 ± 1.2" in text and text.startswith("Before.") and text.endswith("After.\n")
    page.write_text(text.replace("76.2", "86.2"))
    with pytest.raises(SystemExit, match="page.md"):
        tables.main(["--check"])
    tables.main([])
    assert page.read_text() == text


def test_an_unknown_table_is_named(page):
    page.write_text("<!-- table: nothing -->\n<!-- end -->\n")
    with pytest.raises(ValueError, match="nothing"):
        tables.main([])


def test_differences_are_paired_by_seed():
    baseline = [{"seed": seed, "score": score} for seed, score in enumerate((0.5, 0.6, 0.7))]
    rows = [{"seed": seed, "score": score} for seed, score in ((2, 0.8), (0, 0.6), (1, 0.71))]
    assert tables.difference(rows, baseline, "score") == "+10.3 ± 0.6 (p < 0.01)"
    assert tables.difference(rows[:2], baseline, "score") == ""


def test_a_schedule_is_read_from_a_command():
    command = "run_vqa.py --keep_rate 0.5 --selection_layers 2 4 --keep_rate 0.7 0.3 --selection_guidance image text"
    row = {"variant": "any", "options": command.split()}
    assert tables.method(row) == "`2:image:0.7,4:text:0.3`, with supervision"
    row["options"] += ["--selection_loss_weight", "0"]
    assert tables.method(row) == "`2:image:0.7,4:text:0.3`, without supervision"
    row["options"] += ["--keep_rate", "1.0"]
    assert tables.method(row) == "unpruned baseline"


def test_the_figures_are_drawn(tmp_path):
    draw_accuracy.main(["--output_dir", str(tmp_path)])
    for name in ("accuracy_at_equal_information.png", "accuracy_against_time.png", "accuracy_against_epochs.png"):
        with PIL.Image.open(tmp_path / name) as drawn, PIL.Image.open(ROOT / "docs" / name) as kept:
            assert drawn.size == kept.size
