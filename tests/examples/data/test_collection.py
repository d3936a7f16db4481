"""The images of a collection as rows: each once, with a source of its own, or with its error."""

import pytest
from archives import write_tar
from tiny_collection import encoded, write_images

from trips_examples.data.collection import find_images, rows_of


def rows(*places, image_root=None):
    shards = find_images([str(place) for place in places], image_root)
    return [row for shard in shards for row in rows_of(shard)]


def test_a_folder_has_its_image_files_and_those_of_its_folders(tmp_path, monkeypatch):
    write_images(tmp_path / "a", [1])
    write_images(tmp_path / "a/b", [2])
    (tmp_path / "a/notes.txt").write_text("no image")
    found = rows(tmp_path / "a")
    for row, path in zip(found, (f"{tmp_path}/a/1.png", f"{tmp_path}/a/b/2.png"), strict=True):
        assert row["source"] == path
        assert row["images"] == [path]
    monkeypatch.chdir(tmp_path)
    assert rows("a", "a/b", tmp_path) == found  # under any spelling of the path, and each once
    assert rows("a/*.png", "a/b/2.png") == found


def test_rows_may_name_files_and_be_broken(tmp_path):
    write_images(tmp_path, [1])
    (tmp_path / "rows.jsonl").write_text('{"image": "1.png"}\n{"image": \n{"caption": "none"}\n')
    first, second, third = rows(tmp_path / "rows.jsonl")
    assert first["source"] == str(tmp_path / "1.png") and first["images"] == [first["source"]]
    assert first["error"] is None
    assert second["source"] == f"{tmp_path}/rows.jsonl row 2"
    assert "broken JSON" in second["error"]
    assert third["images"] == []
    assert "no image" in third["error"]


def test_paths_of_rows_are_relative_to_a_root_and_an_image_of_several_rows_is_given_once(tmp_path):
    images = write_images(tmp_path / "images", [1, 2])
    file = tmp_path / "train.jsonl"
    lines = [f'{{"image": "{number}.png", "question": "?", "answer": "a"}}' for number in (1, 1, 2, 1)]
    file.write_text("\n".join(lines))
    first, second = rows(file, image_root=str(images))
    assert first["images"] == [str(images / "1.png")]
    assert second["images"] == [str(images / "2.png")]
    with pytest.raises(FileNotFoundError, match="nowhere"):
        find_images([str(file)], "nowhere")


def test_shards_may_be_torn_and_use_a_name_twice(tmp_path):
    files = {"a.png": encoded(1), "b.png": encoded(2), "c.txt": b"no image", "./a.png": encoded(3)}
    whole = write_tar(tmp_path / "0.tar", files)
    (tmp_path / "1.tar").write_bytes(whole.read_bytes()[:1000])
    found = rows(tmp_path / "{0..1}.tar")
    assert len({row["source"] for row in found}) == len(found)
    assert [row["source"] for row in found if row["images"]][:2] == [f"{whole}/a", f"{whole}/b"]
    assert f"{whole}/c" in [row["source"] for row in found if row["error"]]
    assert found[-1]["source"].startswith(f"{tmp_path}/1.tar")
    assert "broken tar file" in found[-1]["error"]


def test_every_file_of_a_folder_is_a_row_or_named(tmp_path, caplog):
    write_images(tmp_path / "deep", [1])
    for name in ("a.HEIC", "b.jp2", "c.avif", "d.tif", "deep/e.txt", "Thumbs.db", "f"):
        (tmp_path / name).touch()
    (shard,) = find_images([str(tmp_path)])
    found = [row["source"].removeprefix(f"{tmp_path}/") for row in rows_of(shard)]
    assert found == ["a.HEIC", "b.jp2", "c.avif", "d.tif", "deep/1.png"]
    assert all(name in caplog.text for name in ("3 files", "deep/e.txt", "Thumbs.db", "f"))
