"""Atomic writing of files."""

from trips_examples.training.files import write_json_lines, write_whole


def test_write_whole_makes_the_folder(tmp_path):
    write_whole(tmp_path / "a" / "b.json", "{}")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.json"]


def test_json_lines_keep_unicode(tmp_path):
    write_json_lines(tmp_path / "rows.jsonl", ({"answer": answer} for answer in ("Café", "a\nb")))
    assert (tmp_path / "rows.jsonl").read_text(encoding="utf-8") == '{"answer": "Café"}\n{"answer": "a\\nb"}\n'
