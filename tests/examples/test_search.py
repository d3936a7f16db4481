"""`search.py`: the features of photos, kept for the next search, and their order, against single pairs."""

import shutil

import pytest
import torch
from archives import write_tar
from json_files import read_json
from PIL import Image
from places import EXAMPLES
from tiny_collection import TEXTS, encoded, save_model, write_images, write_parquet

from modeling_trips import TripsForRetrieval, TripsProcessor
from trips_examples import search
from trips_examples.data import collection
from trips_examples.data.images import decode_image


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Return a folder of 8 files, of which one is broken, 8 rows with images and 8 files in a shard."""
    folder = tmp_path_factory.mktemp("collection")
    write_images(folder / "images", range(8))
    (folder / "images/0.png").write_bytes(encoded(0)[:100])
    write_parquet(folder / "rows.parquet", range(8, 16))
    write_tar(folder / "shard.tar", {f"{number}.png": encoded(number) for number in range(16, 24)})
    return folder


def found_by(checkpoint, folder, *options):
    """Search, and return the rows."""
    output = folder / "found.json"
    places = [folder / "images", folder / "rows.parquet", folder / "shard.tar"]
    files = ["--picture", folder / "found.png", "--output_json", output]
    search.main(list(map(str, ["--model", checkpoint, "--images", *places, *files, *options])))
    return read_json(output)


def image_of(source):
    name = source.rpartition("/")[2]
    number = 7 + int(name.rpartition(" ")[2]) if " row " in name else int(name.removesuffix(".png"))
    return decode_image(encoded(number))


@torch.no_grad()
def test_texts_find_the_best_of_all_pairs(checkpoint, photos, capsys):
    rows = found_by(checkpoint, photos, "--text", *TEXTS, "--k", 23)
    assert "23 images, 1 that cannot be used" in capsys.readouterr().out
    assert Image.open(photos / "found.png").width > 900
    model = TripsForRetrieval.from_pretrained(checkpoint).eval()
    processor = TripsProcessor.from_pretrained(checkpoint)
    for text in TEXTS:
        own = [row for row in rows if row["query"] == text]
        assert [row["rank"] for row in own] == list(range(1, 24))
        expected = []
        for row in own:
            inputs = processor(images=image_of(row["source"]), text=text, return_tensors="pt")
            outputs = model.match(**inputs)
            logits = outputs.itm_logits[0]
            image = model.get_image_features(inputs["pixel_values"]).pooler_output[0]
            query = model.get_text_features(inputs["input_ids"], inputs["attention_mask"]).pooler_output[0]
            similarity = (image @ query).item()
            log_odds = (logits[1] - logits[0]).item()
            expected.append(
                (log_odds + similarity / model.temp().item(), similarity, torch.tensor(log_odds).sigmoid())
            )
        expected.sort(reverse=True)
        for row, (score, similarity, match) in zip(own, expected):
            assert row["score"] == pytest.approx(score, abs=1e-3)
            assert row["similarity"] == pytest.approx(similarity, abs=1e-4)
            assert row["match"] == pytest.approx(match.item(), abs=1e-3)


def test_a_photo_finds_itself_and_its_features_are_kept(checkpoint, photos, monkeypatch):
    found_by(checkpoint, photos, "--text", *TEXTS)
    decoded = []
    decode = search.decode_untrusted_image
    for module in (search, collection):
        monkeypatch.setattr(module, "decode_untrusted_image", lambda *args: decoded.append(args) or decode(*args))
    query = photos / "images/3.png"
    first, *others = found_by(checkpoint, photos, "--image", query, "--k", 2)
    assert first["source"] == str(query) and first["similarity"] == pytest.approx(1, abs=1e-5)
    assert "match" not in first and len(others) == 1
    assert len(decoded) == 3  # the query, and two to draw: the search before kept the features of all
    shutil.copyfile(photos / "images/4.png", query)
    names = {row["source"] for row in found_by(checkpoint, photos, "--image", query, "--k", 2)}
    assert names == {str(query), str(photos / "images/4.png")}  # a changed file is embedded anew


def test_without_a_usable_photo_nothing_is_drawn(checkpoint, tmp_path):
    write_images(tmp_path / "images", [0])
    (tmp_path / "images/0.png").write_bytes(b"no image")
    words = [f"--model={checkpoint}", "--images", str(tmp_path / "images"), f"--picture={tmp_path / 'found.png'}"]
    with pytest.raises(ValueError, match="no image"):
        search.main([*words, f"--image={EXAMPLES / 'scene.png'}"])
    assert not (tmp_path / "found.png").exists()


def test_a_sheet_has_rows_of_four(tmp_path):
    pictures = [Image.new("RGB", (240, 100), "red")] * 5
    search.write_sheet(pictures, ["a long title " * 20] * 5, tmp_path / "sheet.png")
    sheet = Image.open(tmp_path / "sheet.png").convert("RGB")
    width, height = sheet.size
    for row, column, is_filled in ((0.25, 0.125, True), (0.25, 0.875, True), (0.8, 0.125, True), (0.8, 0.875, False)):
        area = sheet.crop(
            (
                round((column - 0.05) * width),
                round((row - 0.2) * height),
                round((column + 0.05) * width),
                round((row + 0.2) * height),
            )
        )
        assert ((255, 0, 0) in area.getdata()) == is_filled
