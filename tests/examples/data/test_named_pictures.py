"""Named images: cleaning of names, reading of lists and folders, and splits."""

import json

import PIL.Image
import PIL.PngImagePlugin
import pytest
from named_pictures import NAMES, SIZES, write_pictures

from trips_examples.data.faults import BadRows
from trips_examples.data.pictures import MAX_PER_NAME, clean_name, load_picture, read_pictures, split_of


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("The Fire_Engine (2)-v01", "fire engine"),
        ("a an owl", "owl"),
        ("hamburger_and_", "hamburger"),
        ("Äpfel/rot", "äpfel rot"),
        ("star_85pt07step", "star"),
        ("of the", ""),
        ("one two three four five", ""),
    ],
)
def test_a_name_is_its_words(text, name):
    assert clean_name(text) == name


def test_a_list_gives_names_and_what_can_be_seen(tmp_path):
    pictures = read_pictures([write_pictures(tmp_path)])
    assert [picture.name for picture in pictures] == NAMES
    assert pictures[0].visible == (5, 7, 45, 17) and pictures[0].size == SIZES["bar"]
    shown = load_picture(pictures[1], 100)
    assert shown.size == SIZES["card"] and shown.getcolors() == [(24 * 30, (255, 0, 0, 255))]
    assert load_picture(pictures[1], 15).size == (12, 15)


def save_png(path, color, title=None, author=None, size=(8, 8)):
    info = PIL.PngImagePlugin.PngInfo()
    for key, value in (("Title", title), ("Author", author)):
        if value is not None:
            info.add_text(key, value)
    path.parent.mkdir(exist_ok=True)
    PIL.Image.new("RGB", size, color).save(path, pnginfo=info)


def test_a_folder_names_pictures_by_their_titles_or_files(tmp_path, caplog):
    save_png(tmp_path / "animals" / "owl_karl_bartel_01.png", "brown", author="Karl Bartelsen")
    save_png(tmp_path / "animals" / "x17.png", "gray", title="Gray mouse")
    save_png(tmp_path / "animals" / "17.png", "pink")
    for color in ("red", "blue", "green", "white"):  # a title that four images share names a collection
        save_png(tmp_path / "tools" / f"{color}_saw.png", color, title="My tools")
    pictures = read_pictures([tmp_path])
    names = {picture.path.rpartition("/")[2]: picture.name for picture in pictures}
    assert names.pop("owl_karl_bartel_01.png") == "owl" and names.pop("x17.png") == "gray mouse"
    assert set(names.values()) == {"red saw", "blue saw", "green saw", "white saw"}
    assert "1 of 7" in caplog.text


def test_equal_files_and_too_many_of_a_name_count_once(tmp_path):
    for number in range(MAX_PER_NAME + 2):
        save_png(tmp_path / f"owl_{number}.png", (number, 0, 0))
    save_png(tmp_path / "zebra.png", (0, 0, 0))  # same content as owl_0
    assert [picture.name for picture in read_pictures([tmp_path])] == ["owl"] * MAX_PER_NAME


def test_what_is_wrong_with_a_list_is_told_by_row(tmp_path):
    file = write_pictures(tmp_path)
    PIL.Image.new("RGBA", (9, 9)).save(tmp_path / "nothing.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    rows = [
        {"image": "absent.png", "name": "cat"},
        {"image": "broken.png", "name": "cow"},
        {"image": "nothing.png", "name": "air"},
        {"image": "red_bar.png", "name": "17"},
        {"image": "red_bar.png"},
    ]
    bad = tmp_path / "bad.jsonl"
    bad.write_text(file.read_text() + "\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError) as error:
        read_pictures([bad])
    message = str(error.value)
    assert "5 of the 17 rows of bad.jsonl cannot be used" in message and "--skip_bad_rows" in message
    for row, fault in (
        (13, "missing image"),
        (14, "unreadable image"),
        (15, "image that is all transparent"),
        (16, "name without 1 to 4 words ('17')"),
        (17, "no name"),
    ):
        assert f"bad.jsonl row {row}: {fault}" in message
    assert [picture.name for picture in read_pictures([bad], BadRows(skip=True))] == NAMES


def test_a_folder_without_pictures_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=str(tmp_path)):
        read_pictures([tmp_path])


def test_a_name_alone_decides_its_split():
    names = [f"thing {number}" for number in range(2000)]
    splits = [split_of(name, {"validation": 0.2, "test": 0.1}) for name in names]
    assert 340 < splits.count("validation") < 460 and 160 < splits.count("test") < 240
    alone = [split_of(name, {"validation": 0.2}) for name in names]
    # The test split only takes names from training.
    assert all(one == other for one, other in zip(splits, alone) if one != "test")
    assert {other for one, other in zip(splits, alone) if one == "test"} == {"train"}
    # Fixed, because names that change their split would leak.
    assert (split_of("owl", {"validation": 0.5}), split_of("apple", {"validation": 0.5})) == ("validation", "train")
