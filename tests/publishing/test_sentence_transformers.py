"""Published retrieval checkpoints load in Sentence Transformers."""

import re
from pathlib import Path

import PIL.Image
import pytest
import torch
from huggingface_hub import ModelCard
from random_checkpoint import save_random_checkpoint

from modeling_trips import TripsForQuestionAnswering, TripsForRetrieval, TripsProcessor
from modeling_trips.publishing import CardArguments, build_repository


library = pytest.importorskip("sentence_transformers")

TEXTS = ["a teal picture", "a red one", "a picture of a red and teal shape"]
IMAGES = [PIL.Image.new("RGB", (70, 50), color) for color in ("teal", "red")]


def publish_as(kind: str, tmp_path: Path, model_class=TripsForRetrieval, **fields) -> Path:
    folder = save_random_checkpoint(tmp_path / "checkpoint", model_class, TEXTS, **fields)
    target = tmp_path / kind
    build_repository(target, folder, "ada/finder", CardArguments(), sentence_transformers=kind)
    return target


def model_and_inputs(folder: Path):
    model, processor = TripsForRetrieval.from_pretrained(folder).eval(), TripsProcessor.from_pretrained(folder)
    return model, processor(images=IMAGES, return_tensors="pt"), processor(text=TEXTS, return_tensors="pt")


@torch.no_grad()
def test_features_of_texts_and_images(tmp_path):
    folder = publish_as("SentenceTransformer", tmp_path)
    encoder = library.SentenceTransformer(str(folder), device="cpu")
    model, images, texts = model_and_inputs(folder)
    of_texts, of_images = encoder.encode(TEXTS, convert_to_tensor=True), encoder.encode(IMAGES, convert_to_tensor=True)
    torch.testing.assert_close(of_texts, model.get_text_features(**texts).pooler_output, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(of_images, model.get_image_features(**images).pooler_output, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(encoder.similarity(of_texts, of_images), of_texts @ of_images.T)
    assert encoder.get_embedding_dimension() == model.config.projection_dim


@torch.no_grad()
def test_matching_scores_pairs_and_ranks_images(tmp_path):
    folder = publish_as("CrossEncoder", tmp_path)
    matcher = library.CrossEncoder(str(folder), device="cpu")
    model, images, texts = model_and_inputs(folder)
    pairs = [(text, image) for text in range(len(TEXTS)) for image in range(len(IMAGES))]
    index = {
        "text_index": torch.tensor([pair[0] for pair in pairs]),
        "image_index": torch.tensor([pair[1] for pair in pairs]),
    }
    expected = model.match(**texts, **images, **index).itm_logits.softmax(-1)[:, 1]
    found = matcher.predict([(TEXTS[text], IMAGES[image]) for text, image in pairs], convert_to_tensor=True)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert len(set(found.tolist())) > 2
    flipped = matcher.predict([(IMAGES[image], TEXTS[text]) for text, image in pairs], convert_to_tensor=True)
    torch.testing.assert_close(flipped, expected, atol=1e-5, rtol=1e-4)
    best = matcher.rank(TEXTS[0], IMAGES)
    assert [one["corpus_id"] for one in best] == expected[:2].argsort(descending=True).tolist()


@pytest.mark.parametrize(
    ("kind", "task", "printed"),
    [
        ("SentenceTransformer", "feature-extraction", r"tensor\(\[\[ *-?\d+\.\d+, *-?\d+\.\d+\]\]\)"),
        ("CrossEncoder", "text-ranking", r"\[\d\.\d+ *\d\.\d+\]"),
    ],
)
def test_card_names_the_library(kind, task, printed, tmp_path, capsys):
    folder = publish_as(kind, tmp_path)
    card = ModelCard.load(folder / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("sentence-transformers", task)
    assert {"sentence-transformers", task, "custom_code"} <= {*card.data.tags}
    code, other = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    assert "AutoProcessor" in other
    capsys.readouterr()
    exec(code.replace('"ada/finder"', repr(str(folder))), {})
    assert re.fullmatch(printed, capsys.readouterr().out.strip())


def test_unsupported_models_raise(tmp_path):
    with pytest.raises(ValueError, match="TripsForQuestionAnswering"):
        publish_as("CrossEncoder", tmp_path / "head", model_class=TripsForQuestionAnswering)
    with pytest.raises(ValueError, match="Encoder"):
        publish_as("Encoder", tmp_path / "kind")
    with pytest.raises(ValueError, match="itm_weight"):
        publish_as("CrossEncoder", tmp_path / "weight", itm_weight=0.0)
    publish_as("SentenceTransformer", tmp_path / "other", itm_weight=0.0)
