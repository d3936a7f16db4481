"""Embedding and search, against numpy and the model on single pairs."""

import logging
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from places import EXAMPLES
from tiny_collection import TEXTS, encoded, write_images, write_parquet

from trips_examples import search
from trips_examples.data.images import decode_image
from trips_examples.index_images import IndexArguments, embed_images
from trips_examples.indexing.finding import Finder
from trips_examples.indexing.sources import find_images
from trips_examples.indexing.table import fingerprint_of, load_model, open_table


def embed(checkpoint: str, uri: str, *places):
    """Add images to a table, as `index_images.py` does."""
    model, processor = load_model(checkpoint)
    table = open_table(uri, fingerprint_of(model, processor), model.config.projection_dim)
    args = IndexArguments(checkpoint, uri, ["images"], batch_size=7, rows_per_commit=16)
    embed_images(table, find_images([str(place) for place in places]), model, processor, args)


@pytest.fixture(scope="module")
def collection(checkpoint, tmp_path_factory):
    """Return a table of 20 files, 20 rows with images, and a broken image."""
    folder = tmp_path_factory.mktemp("collection")
    write_images(folder / "images", range(20))
    (folder / "images/broken.png").write_bytes(encoded(1)[:100])
    write_parquet(folder / "rows.parquet", range(20, 40))
    uri = str(folder / "t.lance")
    embed(checkpoint, uri, folder / "images", folder / "rows.parquet")
    return folder, uri


@pytest.fixture(scope="module")
def finder(checkpoint, collection) -> Finder:
    return Finder(collection[1], checkpoint)


def image_of(source: str) -> PIL.Image.Image:
    """Return an image of the collection. The first row has the image number 20."""
    if " row " in source:
        number = 19 + int(source.rpartition(" ")[2])
    else:
        number = int(Path(source).stem)
    return decode_image(encoded(number))


def test_the_nearest_are_those_of_numpy(finder):
    rows = finder.table.to_table(filter="error IS NULL")
    vectors = np.stack(rows["vector"].to_numpy())
    texts = finder.describe_texts(TEXTS)
    for query, row in zip(texts.embeds.numpy(), finder.nearest(texts.embeds, 5)):
        similarities = vectors @ query
        order = np.argsort(-similarities, kind="stable")[:5]
        assert [each.source for each in row] == rows["source"].take(order).to_pylist()
        assert [each.similarity for each in row] == pytest.approx(similarities[order].tolist(), abs=1e-5)
    for number in (3, 33):
        image = decode_image(encoded(number))
        ((best, *_),) = finder.nearest(finder.evaluator.index_images([image]), 3)
        assert image_of(best.source).tobytes() == image.tobytes()
        assert best.similarity == pytest.approx(1, abs=1e-5)
        assert best.score is None


@torch.no_grad()
def test_the_order_after_matching_is_that_of_pairs_one_by_one(finder):
    texts = finder.describe_texts(TEXTS)
    found = finder.nearest(texts.embeds, 8)
    ranked = finder.rerank(texts, found)
    assert ranked != found
    temperature = finder.model.temp().item()
    for text, before, after in zip(TEXTS, found, ranked):
        expected = []
        for each in before:
            inputs = finder.processor(images=image_of(each.source), text=text, return_tensors="pt")
            logits = finder.model.match(**inputs).itm_logits[0]
            log_odds = logits[1] - logits[0]
            score = log_odds.item() + each.similarity / temperature
            expected.append((score, log_odds.sigmoid().item(), each.source))
        expected.sort(reverse=True)
        for each, (score, match, source) in zip(after, expected, strict=True):
            assert each.source == source
            assert each.score == pytest.approx(score, abs=1e-3)
            assert each.match == pytest.approx(match, abs=1e-3)


def test_images_that_are_gone_are_left_out_and_named(checkpoint, tmp_path, caplog):
    write_images(tmp_path / "images", range(3))
    uri = str(tmp_path / "t.lance")
    embed(checkpoint, uri, tmp_path / "images")
    (tmp_path / "images/1.png").unlink()
    finder = Finder(uri, checkpoint)
    texts = finder.describe_texts(TEXTS[:1])
    found = finder.nearest(texts.embeds, 4)
    with caplog.at_level(logging.WARNING):
        (ranked,) = finder.rerank(texts, found)
    assert len(found[0]) == 3
    assert {each.source for each in ranked} == {f"{tmp_path}/images/0.png", f"{tmp_path}/images/2.png"}
    assert f"{tmp_path}/images/1.png" in caplog.text


def test_a_search_in_a_table_without_images_says_so(checkpoint, tmp_path):
    model, processor = load_model(checkpoint)
    uri = str(tmp_path / "t.lance")
    open_table(uri, fingerprint_of(model, processor), model.config.projection_dim)
    picture = tmp_path / "found.png"
    for query in ("--text=a", f"--image={EXAMPLES / 'scene.png'}"):
        with pytest.raises(ValueError, match="no image"):
            search.main([f"--model={checkpoint}", f"--table={uri}", f"--picture={picture}", query])
    assert not picture.exists()
