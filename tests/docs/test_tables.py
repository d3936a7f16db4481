"""`docs/tables.py`: the tables agree with the rows."""

import re

import pytest
import tables


@pytest.fixture
def page(tmp_path, monkeypatch):
    """Return a document with one table, made from the repository's rows."""
    page = tmp_path / "page.md"
    page.write_text("Before.\n\n<!-- table: demo_runs -->\n<!-- end -->\n\nAfter.\n")
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
    cell = re.search(r"\| (\d+\.\d) \|", text)
    assert cell and text.startswith("Before.") and text.endswith("After.\n")
    page.write_text(f"{text[: cell.start(1)]}1.25{text[cell.end(1) :]}")
    with pytest.raises(SystemExit, match="page.md"):
        tables.main(["--check"])
    tables.main([])
    assert page.read_text() == text


def test_an_unknown_table_is_named(page):
    page.write_text("<!-- table: nothing -->\n<!-- end -->\n")
    with pytest.raises(ValueError, match="nothing"):
        tables.main([])


def test_a_gap_is_the_mean_paired_difference_with_its_standard_error():
    """By hand: differences 10, 10 and 11 points; deviation 0.577, standard error 0.577 / sqrt(3) = 0.333."""
    baseline = [{"seed": seed, "test_accuracy": score} for seed, score in enumerate((0.5, 0.6, 0.7))]
    rows = [{"seed": seed, "test_accuracy": score} for seed, score in ((2, 0.81), (0, 0.6), (1, 0.7))]
    found = tables.paired_by_seed(rows, baseline, "test_accuracy")
    assert found.mean == pytest.approx(31 / 3) and found.standard_error == pytest.approx(1 / 3)
    assert tables.paired_by_seed(rows[:2], baseline, "test_accuracy") is None


def test_gaps_have_intervals_and_corrected_p_values():
    """By hand: the differences above, t = 31; and 10, 20 and 30 points, t = 3.46, whose p is the largest of two."""
    scores = {"gate": (0.6, 0.7, 0.81), "one": (0.5, 0.6, 0.7), "other": (0.5, 0.5, 0.51)}
    runs = {name: [{"seed": seed, "mean": score} for seed, score in enumerate(of)] for name, of in scores.items()}
    gaps = tables.answer_gaps(runs, [("gate", "one"), ("gate", "other")])
    assert gaps["gate", "one"] == "+10.3 (+8.9 to +11.8; p < 0.01)"
    assert gaps["gate", "other"] == "+20.0 (-4.8 to +44.8; p = 0.07)"


def test_a_spread_has_the_deviation_of_the_sample():
    assert tables.spread([1.0, 2.0, 3.0]) == "2.0 ± 1.0"
    assert tables.spread([1.0]) == "1.0"


def test_times_are_those_of_the_baseline_in_the_same_setting():
    times = [
        {"checkpoint": f"{name}-seed0", "texts_per_image": texts, "forward_seconds": seconds}
        for name, texts, seconds in (
            ("unpruned", 1, 2.0),
            ("text-0.5", 1, 1.0),
            ("unpruned", 4, 3.0),
            ("text-0.5", 4, 6.0),
        )
    ]
    assert tables.seconds(times, "text 0.5", texts_per_image=1) == "0.50"
    assert tables.seconds(times, "text 0.5", texts_per_image=4) == "2.00"


def test_a_schedule_is_read_from_a_command():
    command = "run_vqa.py --keep_rate 0.5 --selection_layers 2 4 --keep_rate 0.7 0.3 --selection_guidance image text"
    row = {"variant": "any", "options": command.split()}
    assert tables.model_of(row) == "`2:image:0.7,4:text:0.3`"
    row["options"] += ["--keep_rate", "1.0", "--image_size", "48"]
    assert tables.model_of(row) == "unpruned"
    assert tables.model_of(row | {"variant": "fewer pixels 48"}) == "unpruned, 48 px"
