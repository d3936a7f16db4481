"""Answers of a vision-language model to questions about images, against `generate` by hand."""

import json

import pytest
import torch
from json_files import read_json
from strange_pictures import noise
from tiny_vlm_processors import make_llava_processor, save_tiny_vlm
from tiny_vlms import BY_NAME
from transformers import AutoModelForImageTextToText, AutoProcessor

from modeling_trips.hosts import prune_inputs
from trips_examples.metrics.generation import VisionLanguageModel, encode


PLACEHOLDERS = {"llava": "<image> ", "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|> "}
OPTIONS = {"max_new_tokens": 6}
QUESTIONS = ["what color is it ?", "which one is the same ?", "what is it ?"]
each_family = pytest.mark.parametrize("family", PLACEHOLDERS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    families = ("llava", "qwen2_5_vl", "idefics3", "paligemma")
    return {family: save_tiny_vlm(family, tmp_path_factory.mktemp(family)) for family in families}


@pytest.fixture(scope="module")
def images():
    """Return the images of three questions, of different sizes."""
    return [noise(40, 40), noise(64, 30), noise(48, 48)]


@each_family
@pytest.mark.parametrize("keep_rate", [None, 0.25])
@torch.no_grad()
def test_answers_match_generate_with_and_without_selection(family, keep_rate, folders, images):
    """Each question alone, with a prompt written by hand."""
    processor = AutoProcessor.from_pretrained(folders[family])
    model = AutoModelForImageTextToText.from_pretrained(folders[family]).eval()
    expected = []
    for question, image in zip(QUESTIONS, images):
        prompt = f"<s>{PLACEHOLDERS[family]}{question} "
        inputs = processor(text=prompt, images=image, return_tensors="pt")
        if keep_rate is not None:
            inputs = prune_inputs(model, inputs, keep_rate=keep_rate)
        (tokens,) = model.generate(**inputs, **OPTIONS, do_sample=False)
        answer = processor.decode(tokens[inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        expected.append(answer.strip())
    assert len(set(expected)) == 3
    vlm = VisionLanguageModel(folders[family], keep_rate=keep_rate)
    assert vlm.answer(images, QUESTIONS, **OPTIONS) == expected
    for image, question, answer in zip(images, QUESTIONS, expected):
        assert vlm.answer([image], [question], **OPTIONS) == [answer]


@each_family
def test_visual_tokens_are_counted(family, folders, images):
    def count(vlm):
        vlm.answer(images, QUESTIONS, **OPTIONS)
        return vlm.visual_tokens_per_image

    # Images of 40 x 40, 64 x 30 and 48 x 48 pixels, in units of 8 x 8.
    whole = 64 if family == "llava" else pytest.approx((5 * 5 + 8 * 4 + 6 * 6) / 3)
    quarter = 16 if family == "llava" else pytest.approx((7 + 8 + 9) / 3)
    assert count(VisionLanguageModel(folders[family])) == whole
    assert count(VisionLanguageModel(folders[family], "2:image:0.25")) == quarter
    assert count(VisionLanguageModel(folders[family], "2:image:0.5", keep_rate=0.25)) == quarter


def test_prompt_without_a_chat_template(folders, images, tmp_path):
    folder = save_tiny_vlm("llava", tmp_path / "plain", make_llava_processor(chat_template=None))
    vlm = VisionLanguageModel(folder)
    for answers, end in (((), ""), (["a cat"], "\na cat")):
        encoded = encode(vlm.processor, images[1:2], QUESTIONS[1:2], answers)
        expected = vlm.processor(text=f"<image>{QUESTIONS[1]}{end}", images=images[1])["input_ids"]
        assert encoded["input_ids"].tolist() == expected
    assert all(VisionLanguageModel(folders["paligemma"]).answer(images[:1], QUESTIONS[:1], **OPTIONS))


@pytest.mark.parametrize(
    "family, size", [("llava", {"shortest_edge": 16}), ("paligemma", {"height": 16, "width": 16})]
)
@torch.no_grad()
def test_lower_resolution_interpolates_position_embeddings(family, size, folders, images):
    vlm = VisionLanguageModel(folders[family])
    whole = encode(vlm.processor, images[:1], QUESTIONS[:1])
    vlm.lower_resolution(visual_tokens=16)
    reduced = encode(vlm.processor, images[:1], QUESTIONS[:1])
    assert whole["input_ids"].shape[1] - reduced["input_ids"].shape[1] == 64 - 16
    inputs = vlm.processor.image_processor(
        images[:1], size=size, crop_size={"height": 16, "width": 16}, return_tensors="pt"
    )
    pixels = inputs["pixel_values"]
    assert torch.equal(reduced["pixel_values"], pixels)
    tower = AutoModelForImageTextToText.from_pretrained(folders[family]).eval().model.vision_tower
    expected = tower(pixels, interpolate_pos_encoding=True).last_hidden_state
    assert torch.equal(vlm.model.model.vision_tower(pixels).last_hidden_state, expected)
    vlm.answer(images[:1], QUESTIONS[:1], **OPTIONS)
    assert vlm.visual_tokens_per_image == 16


def test_lower_resolution_of_images_of_any_size(folders):
    vlm = VisionLanguageModel(folders["qwen2_5_vl"])
    vlm.lower_resolution(visual_tokens=20)
    asked = [noise(64, 64), noise(64, 32), noise(16, 24)]
    grids = encode(vlm.processor, asked, QUESTIONS)["image_grid_thw"]
    # 8 x 8 units become 4 x 4, and 4 x 8 become 3 x 7. The small image does not change.
    assert (grids[:, 1:] // 2).tolist() == [[4, 4], [3, 7], [3, 2]]
    for visual_tokens, expected in ((16, 1), (79, 1), (80, 5), (160, 10)):  # a tile has 16 tokens
        vlm = VisionLanguageModel(folders["idefics3"])
        vlm.lower_resolution(visual_tokens)
        vlm.answer([noise(100, 100)], QUESTIONS[:1], **OPTIONS)
        assert vlm.visual_tokens_per_image == 16 * expected
    for family in ("llava_next", "gemma3", "smolvlm", "internvl"):
        vlm.model = BY_NAME[family].make()
        with pytest.raises(ValueError, match=type(vlm.model).__name__):
            vlm.lower_resolution(visual_tokens=15)


def test_code_and_pickles_of_a_checkpoint_are_not_loaded(tmp_path):
    folder = save_tiny_vlm("llava", tmp_path / "foreign")
    config = read_json(folder / "config.json")
    reference = f"{tmp_path}--foreign.Foreign"
    config["model_type"] = "foreign"
    config["auto_map"] = {"AutoConfig": reference, "AutoModelForImageTextToText": reference}
    (tmp_path / "foreign.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError):
        VisionLanguageModel(folder)
    assert not (tmp_path / "ran").exists()

    folder = save_tiny_vlm("llava", tmp_path / "pickled")
    (folder / "model.safetensors").unlink()
    torch.save(BY_NAME["llava"].make().state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(OSError):
        VisionLanguageModel(folder)
