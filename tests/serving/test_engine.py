"""The engine in this process: batches of requests give the library's results for single requests."""

import asyncio
import threading
from dataclasses import dataclass, replace

import PIL.Image
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from random_checkpoint import save_random_checkpoint
from safetensors.torch import load_file, save_file
from starlette.exceptions import HTTPException
from strange_pictures import bomb, encoded
from tiny_retrieval import images, make_model


pytest.importorskip("granian")

from modeling_trips import (  # noqa: E402
    SelectionSchedule,
    TripsForConditionalGeneration,
    TripsForQuestionAnswering,
    TripsForRetrieval,
    TripsForVisualGrounding,
    TripsImageToTextPipeline,
    TripsProcessor,
    TripsVisualQuestionAnsweringPipeline,
)
from trips_serving.engine import Batcher, Engine, ImageCaches, Item, num_bytes  # noqa: E402
from trips_serving.settings import Settings  # noqa: E402


TEXTS = ["what color is it?", "is it a red or a teal shape, or no shape?", "shape"]
IMAGES = [PIL.Image.effect_noise((80, 70), 60).convert(mode) for mode in ("RGB", "L")]
IMAGES[1] = IMAGES[1].rotate(90)


def save(folder, model_class, **fields):
    return str(save_random_checkpoint(folder, model_class, TEXTS, **fields))


def make_items(engine: Engine, name: str, pairs, top_k=1) -> list[Item]:
    tokens = engine.prepare_texts("texts", TEXTS)
    images = [engine.find_image(encoded(image)) for image in IMAGES]
    for image in images:
        if image.states is None:
            engine.decode("image", image)
    items = []
    for image, text in pairs:
        place = {name: row for name, row in (("image", image), ("text", text)) if row is not None}
        parts = (None, None) if text is None else (TEXTS[text], tokens[text])
        items.append(Item(name, None if image is None else images[image], *parts, top_k, place))
    return items


PAIRS = [(0, 0), (1, 2), (0, 1), (1, 0), (0, 0)]
SCHEDULES = [
    {"selection_layers": [2, 3], "keep_rate": 0.5},
    {"selection_layers": [1, 3], "keep_rate": 0.5, "selection_guidance": ["image", "text"]},
]


@pytest.mark.parametrize("fields", SCHEDULES)
@torch.no_grad()
def test_matching_and_features(tmp_path, fields):
    engine = Engine(Settings(model=save(tmp_path, TripsForRetrieval, **fields)))
    assert set(engine.endpoints) == {"match", "features"}
    model = TripsForRetrieval.from_pretrained(tmp_path).eval()
    processor = TripsProcessor.from_pretrained(tmp_path)
    alone = []
    for image, text in PAIRS:
        inputs = processor(images=IMAGES[image], text=TEXTS[text], return_tensors="pt")
        probabilities = model.match(**inputs).itm_logits.softmax(-1)
        alone.append(probabilities[0, 1].item())
    for _ in range(2):  # from pixels, then from the cache
        items = make_items(engine, "match", PAIRS)
        found = engine.compute(items)
        assert [one["score"] for one in found] == pytest.approx(alone, abs=1e-4)
        assert [(one["image"], one["text"]) for one in found] == PAIRS
    assert all(item.image.pixel_values is None for item in items)

    pairs = [(0, None), (1, None)], [(None, 1), (None, 0)]
    found = [one for kind in pairs for one in engine.compute(make_items(engine, "features", kind))]
    images = model.get_image_features(**processor(images=IMAGES, return_tensors="pt")).pooler_output
    texts = model.get_text_features(**processor(text=TEXTS, return_tensors="pt")).pooler_output
    for one, row in zip(found, (images[0], images[1], texts[1], texts[0])):
        torch.testing.assert_close(torch.tensor(one["features"]), row, atol=1e-4, rtol=1e-3)
    assert [sorted(one) for one in found] == [["features", "image"]] * 2 + [["features", "text"]] * 2


def test_captions(tmp_path):
    engine = Engine(Settings(model=save(tmp_path, TripsForConditionalGeneration)))
    pipeline = TripsImageToTextPipeline(
        model=TripsForConditionalGeneration.from_pretrained(tmp_path),
        processor=TripsProcessor.from_pretrained(tmp_path),
    )
    expected = [pipeline(IMAGES[image], prompt=TEXTS[text])[0]["generated_text"] for image, text in PAIRS]
    assert engine.compute(make_items(engine, "caption", PAIRS)) == expected and len(set(expected)) > 1


@pytest.mark.parametrize("schedule", [None, "unpruned", "1:image:0.5,3:text:0.2"])
def test_answers_of_a_schedule(tmp_path, schedule):
    folder = save(tmp_path, TripsForQuestionAnswering, selection_layers=[2], keep_rate=0.5)
    engine = Engine(Settings(model=folder, schedule=schedule))
    changes = {} if schedule is None else SelectionSchedule.parse(schedule).config_fields
    model = TripsForQuestionAnswering.from_pretrained(folder, **changes)
    pipeline = TripsVisualQuestionAnsweringPipeline(model=model, processor=TripsProcessor.from_pretrained(folder))
    for top_k in (1, 2):
        items = make_items(engine, "answer", PAIRS, top_k)
        found = engine.compute(items)
        assert all((item.image.states is not None) == (top_k == 2) for item in items)  # cached by the first round
        for (image, text), answers in zip(PAIRS, found):
            expected = pipeline(IMAGES[image], TEXTS[text], top_k=top_k)
            assert [one["answer"] for one in answers] == [one["answer"] for one in expected]
            scores = [one["score"] for one in expected]
            assert [one["score"] for one in answers] == pytest.approx(scores, abs=1e-4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("model"), TripsForQuestionAnswering)


@pytest.fixture(scope="module")
def engine(folder):
    return Engine(Settings(model=folder, max_pixels=10_000))


def test_long_texts_raise(engine):
    for length in (65, 1000):
        with pytest.raises(HTTPException) as refused:
            engine.prepare_texts("questions", ["shape", "shape " * length])
        assert refused.value.status_code == 422 and refused.value.detail.startswith("questions.1: ")


@pytest.mark.parametrize(
    "data, status",
    [
        (b"", 422),
        (encoded(PIL.Image.new("RGB", (40, 40)), "TIFF"), 415),
        (encoded(PIL.Image.effect_noise((60, 60), 50))[:-200], 422),
        (encoded(PIL.Image.new("RGB", (101, 100))), 413),
        (bomb(2**31 - 1, 2**31 - 1), 413),
        (b"GIF89a\x01\0\x01\0\0\0\0" + b"!\xfe" + (b"\xff" + b"x" * 255) * 300 + b"\0", 422),
    ],
)
def test_bad_images_raise(engine, data, status):
    with pytest.raises(HTTPException) as refused:
        engine.decode("images.1", engine.find_image(data))
    assert refused.value.status_code == status and refused.value.detail.startswith("images.1: ")


def test_failing_item_does_not_affect_others(engine):
    items = make_items(engine, "answer", PAIRS)
    expected = engine.compute(items)
    tokens = items[0].tokens
    unknown_ids = [10**6] * len(tokens["input_ids"])
    broken = replace(items[0], tokens={**tokens, "input_ids": unknown_ids})
    found = engine.compute([items[0], broken, *items[1:]])
    failed = found.pop(1)
    assert isinstance(failed, HTTPException) and failed.status_code == 500
    for answers, expected_answers in zip(found, expected, strict=True):
        assert [one["answer"] for one in answers] == [one["answer"] for one in expected_answers]


WEIGHT = "decoder.embeddings.LayerNorm.weight"


def change_a_weight(folder: str):
    weights = load_file(f"{folder}/model.safetensors")
    weights[WEIGHT].fill_(3e38)
    save_file(weights, f"{folder}/model.safetensors", {"format": "pt"})


def add_a_token(folder: str):
    processor = TripsProcessor.from_pretrained(folder)
    processor.tokenizer.add_tokens(["zebra"])
    processor.save_pretrained(folder)


DAMAGES = {
    "NaN scores": change_a_weight,
    "a tokenizer of another model": add_a_token,
    "a head without an endpoint": lambda folder: save(folder, TripsForVisualGrounding),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_broken_checkpoints_raise(tmp_path, name):
    folder = save(tmp_path, TripsForQuestionAnswering)
    DAMAGES[name](folder)
    with pytest.raises(ValueError):
        Engine(Settings(model=folder))


def test_schedule_of_other_layers_raises(folder):
    with pytest.raises(StrictDataclassError, match="selection_layers"):
        Engine(Settings(model=folder, schedule="99:text:0.5"))
    with pytest.raises(ValueError, match="fast"):
        Engine(Settings(model=folder, schedule="fast=5:text:0.3"))


@pytest.mark.slow
def test_exported_model_matches_the_library(tmp_path):
    pytest.importorskip("openvino")
    from modeling_trips.export import export_model

    folder, export = save(tmp_path / "model", TripsForRetrieval), str(tmp_path / "export")
    model, processor = TripsForRetrieval.from_pretrained(folder).eval(), TripsProcessor.from_pretrained(folder)
    export_model(model, export)
    processor.save_pretrained(export)
    engine = Engine(Settings(model=export))
    inputs = [processor(images=IMAGES[i], text=TEXTS[t], return_tensors="pt") for i, t in PAIRS]
    expected = [float(model.match(**one).itm_logits.softmax(-1)[0, 1]) for one in inputs]
    for _ in range(2):  # from pixels, then from the cache
        found = [one["score"] for one in engine.compute(make_items(engine, "match", PAIRS))]
        assert found == pytest.approx(expected, abs=1e-4)
    for fields in ({"schedule": "unpruned"}, {"dtype": "bfloat16"}, {"device": "cuda"}):
        with pytest.raises(ValueError):
            Engine(Settings(model=export, **fields))


# The cache of image states, and batches


@torch.no_grad()
def test_cache_evicts_the_least_recently_used():
    rows = [make_model().model.encode_images(image[None]) for image in images()]
    size = num_bytes(rows[0])
    cache = ImageCaches(3 * size)
    for key in range(3):
        cache.put(key, rows[key])
    assert cache.get(0) is rows[0]
    cache.put(3, rows[3])
    assert [cache.get(key) is not None for key in range(4)] == [True, False, True, True]
    assert cache.bytes == 3 * size
    cache.put(3, rows[3])
    assert cache.bytes == 3 * size
    nothing = ImageCaches(size - 1)
    nothing.put(0, rows[0])
    assert nothing.get(0) is None and nothing.bytes == 0


@dataclass
class Number:
    value: int
    kind: str = "a"


def run(compute, max_size: int, requests):
    """Return the results of `requests(batcher)`."""

    async def main():
        batcher = Batcher(compute, max_size)
        running = asyncio.create_task(batcher.run())
        try:
            return await requests(batcher)
        finally:
            running.cancel()

    return asyncio.run(main())


def test_requests_get_their_results_in_batches_of_one_kind():
    batches = []

    def compute(items: list[Number]) -> list[int]:
        batches.append(items)
        return [item.value**2 for item in items]

    async def requests(batcher: Batcher):
        asked = [[Number(3 * row + column, "ab"[row % 2]) for column in range(3)] for row in range(8)]
        return await asyncio.gather(*[batcher.submit(items) for items in asked])

    found = run(compute, 4, requests)
    assert [value for row in found for value in row] == [value**2 for value in range(24)]
    assert all(len(batch) <= 4 and len({item.kind for item in batch}) == 1 for batch in batches)
    assert len(batches) == 6


def test_failed_item_fails_its_request_alone():
    async def requests(batcher: Batcher):
        asked = [[Number(1), Number(0)], [Number(2)]]
        return await asyncio.gather(*[batcher.submit(items) for items in asked], return_exceptions=True)

    failed, answered = run(lambda items: [item.value or ValueError("zero") for item in items], 10, requests)
    assert isinstance(failed, ValueError) and answered == [2]


def test_cancelled_request_is_not_computed():
    computed, release = [], threading.Event()

    def compute(items: list[Number]) -> list[int]:
        release.wait(10)
        computed.extend(item.value for item in items)
        return computed[-len(items) :]

    async def requests(batcher: Batcher):
        tasks = [asyncio.create_task(batcher.submit([Number(value)])) for value in range(3)]
        await asyncio.sleep(0.1)  # item 0 is being computed
        tasks[1].cancel()
        release.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    first, cancelled, last = run(compute, 1, requests)
    assert (first, last) == ([0], [2]) and isinstance(cancelled, asyncio.CancelledError)
    assert computed == [0, 2]
