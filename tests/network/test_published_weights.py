"""Published checkpoints in TRIPS give the outputs of their source without selection."""

import pytest
import torch
from albef_reference import BASE, Albef
from transformers import AutoModelForImageTextToText, AutoProcessor, BlipForQuestionAnswering, ViltForQuestionAnswering

from modeling_trips.conversion.files import read_weights
from modeling_trips.conversion.published import convert_published
from modeling_trips.hosts import (
    apply_patch_selection,
    prune_inputs,
    record_patch_selection,
    remove_patch_selection,
)


pytestmark = pytest.mark.network

ALBEF = "https://storage.googleapis.com/sfr-pcl-data-research/ALBEF/"
QUESTION = "how many cats are there?"
CLOSE = {"atol": 2e-3, "rtol": 2e-3}


def answer_of(model, processor, image):
    inputs = processor(images=image, text=[QUESTION], return_tensors="pt")
    return processor.post_process_answers(model.generate(**inputs, max_new_tokens=5))[0]


@torch.no_grad()
@pytest.mark.parametrize(
    ("file", "model_class"),
    [
        ("ALBEF_4M.pth", "TripsForPreTraining"),
        ("ALBEF.pth", "TripsForPreTraining"),
        ("flickr30k.pth", "TripsForRetrieval"),
        ("mscoco.pth", "TripsForRetrieval"),
        ("refcoco.pth", "TripsForRetrieval"),
        ("vqa.pth", "TripsForQuestionAnswering"),
    ],
)
def test_albef(file, model_class, download, two_cats):
    path = download(ALBEF + file)
    model, processor, report = convert_published(str(path), keep_rate=1.0)
    assert type(model).__name__ == model_class
    new = ("decoder.", "lm_head.") if model_class == "TripsForPreTraining" else ()
    assert all(name.startswith(new) for name in report.new) if new else not report.new
    model.eval()
    albef = Albef(read_weights(path), BASE)
    inputs = processor(images=two_cats, text=[QUESTION], return_tensors="pt")
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    outputs = model.model(**inputs)
    image_states = outputs.vision_model_output.last_hidden_state
    torch.testing.assert_close(image_states, albef.image_states(inputs["pixel_values"]), **CLOSE)
    torch.testing.assert_close(outputs.last_hidden_state, albef.fused_states(**inputs), **CLOSE)
    if model_class == "TripsForQuestionAnswering":
        assert answer_of(model, processor, two_cats) in {"2", "two"}


@torch.no_grad()
def test_albef_with_selection_keeps_seven_in_ten_tokens_twice(download, two_cats):
    model, processor, _ = convert_published(str(download(ALBEF + "vqa.pth")), selection_layers=[5, 10], keep_rate=0.7)
    inputs = processor(images=two_cats, text=[QUESTION], return_tensors="pt")
    first, second = (
        model.eval()
        .model(**{name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")})
        .selection
    )
    # 24 x 24 patches; the second layer selects among the remaining ones and the fused token.
    assert (first.kept_indices.shape[1], second.kept_indices.shape[1]) == (404, 284)
    assert answer_of(model, processor, two_cats)


@torch.no_grad()
def test_blip(two_cats):
    name = "Salesforce/blip-vqa-base"
    blip, own = BlipForQuestionAnswering.from_pretrained(name).eval(), AutoProcessor.from_pretrained(name)
    model, processor, report = convert_published(name, keep_rate=1.0)
    assert not report.new
    theirs = own(images=two_cats, text=QUESTION, return_tensors="pt")
    ours = processor(images=two_cats, text=[QUESTION], return_tensors="pt")
    assert (ours["pixel_values"] - theirs["pixel_values"]).abs().mean() < 0.05
    states = blip.vision_model(ours["pixel_values"]).last_hidden_state
    model.eval()
    outputs = model.model(pixel_values=ours["pixel_values"], input_ids=ours["input_ids"])
    torch.testing.assert_close(outputs.vision_model_output.last_hidden_state, states, **CLOSE)
    expected = own.decode(blip.generate(**theirs)[0], skip_special_tokens=True)
    assert answer_of(model, processor, two_cats) == expected == "2"


@torch.no_grad()
def test_vilt(two_cats):
    name = "dandelin/vilt-b32-finetuned-vqa"
    vilt, own = ViltForQuestionAnswering.from_pretrained(name).eval(), AutoProcessor.from_pretrained(name)
    inputs = own(two_cats, QUESTION, return_tensors="pt")
    expected = vilt(**inputs).logits
    assert vilt.config.id2label[expected.argmax(-1).item()] == "2"
    apply_patch_selection(vilt, "5:text:0.7,10:text:0.7")
    with record_patch_selection(vilt) as kept:
        pruned = vilt(**inputs).logits
    assert len(kept) == 2 and pruned.isfinite().all() and not torch.equal(pruned, expected)
    remove_patch_selection(vilt)
    torch.testing.assert_close(vilt(**inputs).logits, expected, **CLOSE)  # ViLT shuffles the patches

    model, processor, report = convert_published(name, keep_rate=1.0)
    assert not report.new
    square = processor(images=two_cats.resize((384, 384)), text=[QUESTION], return_tensors="pt")
    names = ("input_ids", "attention_mask", "pixel_values")
    states = model.eval()(**{name: square[name] for name in names}).last_hidden_state
    theirs = vilt.vilt(**{name: square[name] for name in names}).last_hidden_state
    torch.testing.assert_close(states, theirs[:, : states.shape[1]], **CLOSE)


@torch.no_grad()
def test_a_generative_model(two_cats):
    name = "HuggingFaceTB/SmolVLM-256M-Instruct"
    model, processor = AutoModelForImageTextToText.from_pretrained(name).eval(), AutoProcessor.from_pretrained(name)
    content = [{"type": "image", "image": two_cats}, {"type": "text", "text": "What animals are in the image?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    options = {"max_new_tokens": 20, "do_sample": False}

    def answer(inputs):
        length = inputs["input_ids"].shape[1]
        return processor.batch_decode(model.generate(**inputs, **options)[:, length:], skip_special_tokens=True)[0]

    expected = answer(inputs)
    assert "cat" in expected.lower()
    num_visual = (inputs["input_ids"] == model.config.image_token_id).sum().item()
    pruned = prune_inputs(model, inputs, keep_rate=0.5)
    assert inputs["input_ids"].shape[1] - pruned["input_ids"].shape[1] == num_visual // 2
    assert answer(pruned).strip()

    apply_patch_selection(model, "6:image:0.5")
    with record_patch_selection(model) as kept:
        model(**inputs)
    assert len(kept) == 1 and answer(inputs).strip()
    remove_patch_selection(model)
    assert answer(inputs) == expected
