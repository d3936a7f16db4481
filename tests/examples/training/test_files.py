"""Atomic writing of files."""

from trips_examples.training.files import write_json_lines, write_whole


def test_a_written_file_is_whole_and_its_folder_is_made(tmp_path):
    write_whole(tmp_path / "a" / "b.json", "{}")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.json"]


def test_rows_are_lines_of_json_with_letters_as_they_are(tmp_path):
    write_json_lines(tmp_path / "rows.jsonl", ({"answer": answer} for answer in ("Café", "a\nb")))
    assert (tmp_path / "rows.jsonl").read_text(encoding="utf-8") == '{"answer": "Café"}\n{"answer": "a\\nb"}\n'
