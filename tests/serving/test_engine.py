"""The engine without a process: batches of many requests give what the library gives for each alone."""

import PIL.Image
import pytest
import torch
from random_checkpoint import save_random_checkpoint
from strange_pictures import encoded


pytest.importorskip("bentoml")

from modeling_trips import (  # noqa: E402
    TripsForConditionalGeneration,
    TripsForQuestionAnswering,
    TripsForRetrieval,
    TripsForVisualGrounding,
    TripsImageToTextPipeline,
    TripsProcessor,
    TripsVisualQuestionAnsweringPipeline,
)
from trips_serving.engine import Engine  # noqa: E402
from trips_serving.errors import RequestError  # noqa: E402
from trips_serving.requests import Item  # noqa: E402
from trips_serving.settings import Settings, read_schedules  # noqa: E402


TEXTS = ["what color is it?", "is it a red or a teal shape, or no shape?", "shape"]
IMAGES = [PIL.Image.effect_noise((80, 70), 60).convert(mode) for mode in ("RGB", "L")]
IMAGES[1] = IMAGES[1].rotate(90)


def save(folder, model_class, **fields):
    return str(save_random_checkpoint(folder, model_class, TEXTS, **fields))


def make_items(engine: Engine, pairs, schedule="default", top_k=1) -> list[Item]:
    texts = engine.prepare_texts(TEXTS)
    pictures = [engine.prepare_image(encoded(image), schedule) for image in IMAGES]
    return [
        Item(
            None if image is None else pictures[image],
            None if text is None else TEXTS[text],
            None if text is None else texts[text],
            schedule,
            top_k,
            {name: index for name, index in (("image", image), ("text", text)) if index is not None},
        )
        for image, text in pairs
    ]


PAIRS = [(0, 0), (1, 2), (0, 1), (1, 0), (0, 0)]
SCHEDULES = [
    {"selection_layers": [2, 3], "keep_rate": 0.5},
    {"selection_layers": [1, 3], "keep_rate": 0.5, "selection_guidance": ["image", "text"]},
    {"selection_layers": [2], "keep_rate": 0.5, "selection_guidance": "image"},
    {
        "selection_layers": [1, 3],
        "keep_rate": 0.9,
        "selection_guidance": ["image", "text"],
        "selection_mode": "mass",
        "selection_mass": 0.7,
    },
]


@pytest.mark.parametrize("fields", SCHEDULES)
@torch.no_grad()
def test_matching_and_features(tmp_path, fields):
    engine = Engine(Settings(model=save(tmp_path, TripsForRetrieval, **fields)))
    assert set(engine.endpoints) == {"match", "features"}
    model, processor = TripsForRetrieval.from_pretrained(tmp_path).eval(), TripsProcessor.from_pretrained(tmp_path)
    alone = [
        model.match(**processor(images=IMAGES[image], text=TEXTS[text], return_tensors="pt")).itm_logits.softmax(-1)
        for image, text in PAIRS
    ]
    for _ in range(2):  # from pixels, then from the cache
        items = make_items(engine, PAIRS)
        found = engine.match(items)
        assert [one["score"] for one in found] == pytest.approx([float(score[0, 1]) for score in alone], abs=1e-4)
        assert [(one["image"], one["text"]) for one in found] == PAIRS
    assert all(item.picture.pixel_values is None for item in items) and len(engine.cache) == len(IMAGES)

    found = engine.features(make_items(engine, [(0, None), (None, 1), (1, None), (None, 0)]))
    images = model.get_image_features(**processor(images=IMAGES, return_tensors="pt")).pooler_output
    texts = model.get_text_features(**processor(text=TEXTS, return_tensors="pt")).pooler_output
    for one, row in zip(found, (images[0], texts[1], images[1], texts[0])):
        torch.testing.assert_close(torch.tensor(one["features"]), row, atol=1e-4, rtol=1e-3)
    assert [sorted(one) for one in found] == [["features", "image"], ["features", "text"]] * 2


def test_captions(tmp_path):
    engine = Engine(Settings(model=save(tmp_path, TripsForConditionalGeneration)))
    pipeline = TripsImageToTextPipeline(
        model=TripsForConditionalGeneration.from_pretrained(tmp_path),
        processor=TripsProcessor.from_pretrained(tmp_path),
    )
    expected = [pipeline(IMAGES[image], prompt=TEXTS[text])[0]["generated_text"] for image, text in PAIRS]
    assert engine.caption(make_items(engine, PAIRS)) == expected and len(set(expected)) > 1


def test_answers_of_several_schedules_in_one_batch(tmp_path):
    """One copy of the weights; each item by its own schedule; an image is computed once for each."""
    folder = save(tmp_path, TripsForQuestionAnswering, selection_layers=[2], keep_rate=0.5)
    engine = Engine(Settings(model=folder, schedules=read_schedules("full=;few=1:image:0.5,3:text:0.2")))
    fields = {
        "default": {},
        "full": {"keep_rate": 1.0},
        "few": {"selection_layers": [1, 3], "selection_guidance": ["image", "text"], "keep_rate": [0.5, 0.2]},
    }
    items, expected = [], []
    for name, changes in fields.items():
        model = TripsForQuestionAnswering.from_pretrained(folder, **changes)
        pipeline = TripsVisualQuestionAnsweringPipeline(model=model, processor=TripsProcessor.from_pretrained(folder))
        for top_k in (1, 2):
            items += make_items(engine, PAIRS, name, top_k)
            expected += [pipeline(IMAGES[image], TEXTS[text], top_k=top_k) for image, text in PAIRS]
    mixed = list(range(0, len(items), 2)) + list(range(1, len(items), 2))
    found = engine.answer([items[position] for position in mixed])
    for position, answers in zip(mixed, found):
        assert [one["answer"] for one in answers] == [one["answer"] for one in expected[position]]
        scores = [one["score"] for one in expected[position]]
        assert [one["score"] for one in answers] == pytest.approx(scores, abs=1e-4)
    assert len(engine.cache) == len(IMAGES) * len(fields)


def test_what_the_model_cannot_take_is_refused(tmp_path):
    engine = Engine(Settings(model=save(tmp_path / "model", TripsForQuestionAnswering)))
    with pytest.raises(RequestError, match="tokens"):
        engine.prepare_texts(["shape " * 1000])
    with pytest.raises(RequestError, match="fewer than one patch"):
        engine.prepare_image(encoded(PIL.Image.new("RGB", (2, 90))), "default")
    with pytest.raises(ValueError, match="cannot be served"):
        Engine(Settings(model=save(tmp_path / "other", TripsForVisualGrounding)))
    with pytest.raises(Exception, match="selection_layers"):
        Engine(Settings(model=str(tmp_path / "model"), schedules=read_schedules("deep=99:text:0.5")))
    with pytest.raises(ValueError, match="A schedule is layers"):
        Engine(Settings(model=str(tmp_path / "model"), schedules=read_schedules("deep=2:text:much")))
