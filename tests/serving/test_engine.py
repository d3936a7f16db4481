"""The engine in this process: batches of requests give the library's results for single requests."""

import asyncio
import threading
from dataclasses import dataclass, replace

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from random_checkpoint import save_random_checkpoint
from safetensors.torch import load_file, save_file
from starlette.exceptions import HTTPException
from strange_pictures import encoded
from tiny_retrieval import images, make_model


pytest.importorskip("granian")

from modeling_trips import (  # noqa: E402
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


pytestmark = pytest.mark.usefixtures("no_grad")
TEXTS = ["what color is it?", "is it a red or a teal shape, or no shape?", "shape"]
IMAGES = [Image.effect_noise((80, 70), 60).convert("RGB"), Image.effect_noise((70, 80), 60)]


def save(folder, model_class, **fields):
    return str(save_random_checkpoint(folder, model_class, TEXTS, **fields))


def make_items(engine, name, pairs, top_k=1, keep_rate=None):
    tokens = engine.prepare_texts("texts", TEXTS)
    images = [engine.find_image("image", encoded(image), keep_rate=keep_rate) for image in IMAGES]
    for image in images:
        if image.states is None:
            engine.decode(image)
    items = []
    for image, text in pairs:
        item = Item(name, top_k=top_k)
        if image is not None:
            item = replace(item, image=images[image], place={"image": image})
        if text is not None:
            item = replace(item, text=TEXTS[text], tokens=tokens[text], place={**item.place, "text": text})
        items.append(item)
    return items


PAIRS = [(0, 0), (1, 2), (0, 1), (1, 0), (0, 0)]


def match_alone(model, processor):
    """Return the score of each pair, computed in a batch of its own."""
    scores = []
    for image, text in PAIRS:
        inputs = processor(images=IMAGES[image], text=TEXTS[text], return_tensors="pt")
        probabilities = model.match(**inputs).itm_logits.softmax(-1)
        scores.append(probabilities[0, 1].item())
    return scores


@pytest.mark.parametrize("schedule", ["2:text:0.5,3:text:0.5", "1:image:0.5,3:text:0.5"])
def test_matching_and_features(tmp_path, schedule):
    engine = Engine(Settings(model=save(tmp_path, TripsForRetrieval, schedule=schedule)))
    assert set(engine.endpoints) == {"match", "features"}
    model = TripsForRetrieval.from_pretrained(tmp_path).eval()
    processor = TripsProcessor.from_pretrained(tmp_path)
    expected = match_alone(model, processor)
    for _ in range(2):  # from pixels, then from the cache
        items = make_items(engine, "match", PAIRS)
        found = engine.compute(items)
        assert [one["score"] for one in found] == pytest.approx(expected, abs=1e-4)
        assert [(one["image"], one["text"]) for one in found] == PAIRS
    assert all(item.image.pixel_values is None for item in items)

    images = model.get_image_features(**processor(images=IMAGES, return_tensors="pt"))
    texts = model.get_text_features(**processor(text=TEXTS, return_tensors="pt"))
    for part, pairs, expected in (("image", [(0, None), (1, None)], images), ("text", [(None, 0), (None, 1)], texts)):
        found = engine.compute(make_items(engine, "features", pairs))
        for one, row in zip(found, expected.pooler_output):
            assert one.keys() == {part, "features"}
            torch.testing.assert_close(torch.tensor(one["features"]), row, atol=1e-4, rtol=1e-3)


def test_captions(tmp_path):
    engine = Engine(Settings(model=save(tmp_path, TripsForConditionalGeneration)))
    pipeline = TripsImageToTextPipeline(
        model=TripsForConditionalGeneration.from_pretrained(tmp_path),
        processor=TripsProcessor.from_pretrained(tmp_path),
    )
    captions = engine.compute(make_items(engine, "caption", PAIRS))
    for (image, text), caption in zip(PAIRS, captions, strict=True):
        assert pipeline(IMAGES[image], prompt=TEXTS[text]) == [{"generated_text": caption}]
    assert len(set(captions)) > 1


def pipeline_of(folder, **fields):
    model = TripsForQuestionAnswering.from_pretrained(folder, **fields).eval()
    return TripsVisualQuestionAnsweringPipeline(model=model, processor=TripsProcessor.from_pretrained(folder))


def check_answers(found, pipeline, **options):
    for (image, text), answers in zip(PAIRS, found, strict=True):
        expected = pipeline(IMAGES[image], TEXTS[text], **options)
        assert [one["answer"] for one in answers] == [one["answer"] for one in expected]
        scores = [one["score"] for one in expected]
        assert [one["score"] for one in answers] == pytest.approx(scores, abs=1e-4)


@pytest.mark.parametrize("schedule", [None, "unpruned", "1:image:0.5,3:text:0.2"])
def test_answers_of_a_schedule(tmp_path, schedule):
    folder = save(tmp_path, TripsForQuestionAnswering, schedule="2:text:0.5")
    engine = Engine(Settings(model=folder, schedule=schedule))
    pipeline = pipeline_of(folder, **({} if schedule is None else {"schedule": schedule}))
    for top_k in (1, 2):
        items = make_items(engine, "answer", PAIRS, top_k)
        check_answers(engine.compute(items), pipeline, top_k=top_k)
        assert all((item.image.states is not None) == (top_k == 2) for item in items)  # cached by the first round


@pytest.mark.parametrize(
    "schedule", ["2:text:0.2", "1:image:0.5", "1:image:0.5,3:text:0.2", "1:image:0.5,2:image:0.5"]
)
def test_kept_patches_are_those_of_the_library_in_one_pass(tmp_path, schedule):
    folder = save(tmp_path, TripsForQuestionAnswering)
    engine = Engine(Settings(model=folder, schedule=schedule))
    passes = []
    engine.model.model.fusion_model.register_forward_hook(lambda *args: passes.append(args))
    model = TripsForQuestionAnswering.from_pretrained(folder, schedule=schedule).eval()
    processor = TripsProcessor.from_pretrained(folder)
    sizes = [(image.height, image.width) for image in IMAGES]
    for states in ("computed", "cached"):
        items = []
        for item, (image, _) in zip(make_items(engine, "answer", PAIRS), PAIRS):
            assert (item.image.states is not None) == (states == "cached")
            item.image.size = sizes[image]
            items.append(replace(item, kept_patches=True))
        passes.clear()
        found = engine.compute(items)
        assert len(passes) == 1
        for (image, text), answers in zip(PAIRS, found, strict=True):
            inputs = processor(images=IMAGES[image], text=TEXTS[text], return_tensors="pt")
            kept = model.model(**inputs).selection[-1].kept_indices
            (boxes,) = processor.patch_boxes(kept, [sizes[image]])
            assert len(boxes) > 0
            assert answers[0]["kept_patches"] == boxes.tolist()


@pytest.mark.parametrize("schedule", ["2:text:0.5", "1:image:0.5"])
def test_keep_rates_of_requests(tmp_path, schedule):
    folder = save(tmp_path, TripsForQuestionAnswering, schedule=schedule)
    engine = Engine(Settings(model=folder, keep_rates="0.1,1"))
    pipeline = pipeline_of(folder)
    for rate in (0.1, 1.0, None, 0.1):  # the last one from the cache
        items = make_items(engine, "answer", PAIRS, top_k=2, keep_rate=rate)
        items = [replace(item, keep_rate=rate) for item in items]
        check_answers(engine.compute(items), pipeline, top_k=2, keep_rate=rate)
    assert all(item.image.pixel_values is None for item in items)
    assert len({item.kind for item in (*items, *make_items(engine, "answer", PAIRS, top_k=2))}) == 2


def test_keep_rates_need_one_selection_layer(tmp_path):
    folder = save(tmp_path, TripsForQuestionAnswering, schedule="1:image:0.5,2:text:0.5")
    with pytest.raises(ValueError, match="keep_rate"):
        Engine(Settings(model=folder, keep_rates="0.5"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("model"), TripsForQuestionAnswering)


@pytest.fixture(scope="module")
def engine(folder):
    return Engine(Settings(model=folder, max_pixels=10_000))


def test_long_texts_raise(engine):
    with pytest.raises(HTTPException) as refused:
        engine.prepare_texts("questions", ["shape", "shape " * 65])
    assert refused.value.status_code == 422
    assert refused.value.detail.startswith("questions.1: ")


@pytest.mark.parametrize(
    "data, status",
    [
        (b"", 422),
        (encoded(Image.new("RGB", (40, 40)), "PPM"), 415),
        (encoded(Image.new("RGB", (101, 100))), 413),
    ],
)
def test_bad_images_raise(engine, data, status):
    with pytest.raises(HTTPException) as refused:
        engine.decode(engine.find_image("images.1", data))
    assert refused.value.status_code == status
    assert refused.value.detail.startswith("images.1: ")


def test_failing_item_does_not_affect_others(engine):
    items = make_items(engine, "answer", PAIRS)
    expected = engine.compute(items)
    tokens = items[0].tokens
    unknown_ids = [10**6] * len(tokens["input_ids"])
    broken = replace(items[0], tokens={**tokens, "input_ids": unknown_ids})
    found = engine.compute([items[0], broken, *items[1:]])
    failed = found.pop(1)
    assert isinstance(failed, HTTPException)
    assert failed.status_code == 500
    for answers, expected_answers in zip(found, expected, strict=True):
        assert [one["answer"] for one in answers] == [one["answer"] for one in expected_answers]


WEIGHT = "decoder.embeddings.LayerNorm.weight"


def change_a_weight(folder):
    weights = load_file(f"{folder}/model.safetensors")
    weights[WEIGHT].fill_(3e38)
    save_file(weights, f"{folder}/model.safetensors", {"format": "pt"})


def add_a_token(folder):
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
    with pytest.raises(StrictDataclassError, match="schedule"):
        Engine(Settings(model=folder, schedule="99:text:0.5"))
    with pytest.raises(ValueError, match="fast"):
        Engine(Settings(model=folder, schedule="fast=5:text:0.3"))


@pytest.mark.slow
def test_exported_model_matches_the_library(tmp_path):
    pytest.importorskip("openvino")
    from modeling_trips.export import export_model

    folder = save(tmp_path / "model", TripsForRetrieval)
    model = TripsForRetrieval.from_pretrained(folder).eval()
    processor = TripsProcessor.from_pretrained(folder)
    export = str(tmp_path / "export")
    export_model(model, export)
    processor.save_pretrained(export)
    engine = Engine(Settings(model=export))
    expected = match_alone(model, processor)
    for _ in range(2):  # from pixels, then from the cache
        found = engine.compute(make_items(engine, "match", PAIRS))
        assert [one["score"] for one in found] == pytest.approx(expected, abs=1e-4)
    for fields in ({"schedule": "unpruned"}, {"dtype": "bfloat16"}, {"device": "cuda"}):
        with pytest.raises(ValueError):
            Engine(Settings(model=export, **fields))


# The cache of image states, and batches


def test_cache_evicts_the_least_recently_used():
    states = make_model().model.encode_images(images()[:1])
    size = num_bytes(states)
    cache = ImageCaches(3 * size)
    for key in range(3):
        cache.put(key, states)
    assert cache.get(0) is states
    cache.put(3, states)
    assert [cache.get(key) is not None for key in range(4)] == [True, False, True, True]
    assert cache.bytes == 3 * size
    cache.put(3, states)
    assert cache.bytes == 3 * size
    nothing = ImageCaches(size - 1)
    nothing.put(0, states)
    assert nothing.get(0) is None
    assert nothing.bytes == 0


@dataclass
class Number:
    value: int
    kind: str = "a"


def run(compute, max_size, requests):
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

    def compute(items):
        batches.append(items)
        return [item.value**2 for item in items]

    async def requests(batcher):
        submitted = []
        for row in range(8):
            kind = "ab"[row % 2]
            items = [Number(3 * row + column, kind) for column in range(3)]
            submitted.append(batcher.submit(items))
        return await asyncio.gather(*submitted)

    found = run(compute, 4, requests)
    assert sum(found, []) == [value**2 for value in range(24)]
    assert len(batches) == 6
    for batch in batches:
        assert len(batch) <= 4
        assert len({item.kind for item in batch}) == 1


def test_failed_item_fails_its_request_alone():
    async def requests(batcher):
        first = batcher.submit([Number(1), Number(0)])
        second = batcher.submit([Number(2)])
        return await asyncio.gather(first, second, return_exceptions=True)

    failed, answered = run(lambda items: [item.value or ValueError("zero") for item in items], 10, requests)
    assert isinstance(failed, ValueError)
    assert answered == [2]


def test_cancelled_request_is_not_computed():
    computed = []
    release = threading.Event()

    def compute(items):
        release.wait(10)
        computed.extend(item.value for item in items)
        return computed[-len(items) :]

    async def requests(batcher):
        tasks = [asyncio.create_task(batcher.submit([Number(value)])) for value in range(3)]
        await asyncio.sleep(0.1)  # item 0 is being computed
        tasks[1].cancel()
        release.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    first, cancelled, last = run(compute, 1, requests)
    assert isinstance(cancelled, asyncio.CancelledError)
    assert first == [0]
    assert last == [2]
    assert computed == [0, 2]
