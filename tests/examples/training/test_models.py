"""The start model and processor of a run."""

import copy

import pytest
import torch
from PIL import Image
from random_checkpoint import save_random_checkpoint
from torch.testing import assert_close
from toy_pairs import write_parts
from transformers import BlipImageProcessor, CLIPImageProcessor, DeiTImageProcessor

from modeling_trips import (
    TripsConfig,
    TripsForQuestionAnswering,
    TripsForVisualGrounding,
    TripsProcessor,
)
from trips_examples.data.vocabulary import train_tokenizer
from trips_examples.training.models import load_start, make_model, make_processor
from trips_examples.training.options import ModelArguments


@pytest.fixture(scope="module")
def processor():
    return make_processor(train_tokenizer(["is it red?"]), TripsConfig.from_preset("tiny"))


@pytest.mark.parametrize("image_processor", [CLIPImageProcessor, DeiTImageProcessor, BlipImageProcessor])
def test_another_image_size_shows_the_whole_image(image_processor, processor, tmp_path):
    """The center crop of the checkpoint's processor is off."""
    save_random_checkpoint(tmp_path, TripsForQuestionAnswering, ["is it red?"])
    TripsProcessor(image_processor(), processor.tokenizer).save_pretrained(tmp_path)
    args = ModelArguments(model=str(tmp_path), image_size=96)
    _, loaded = load_start(args)
    image = Image.new("RGB", (300, 200), "black")
    image.paste("white", (0, 0, 150, 100))  # a quarter
    pixels = loaded(images=image, text="red", return_tensors="pt")["pixel_values"][0, 0]
    assert pixels.shape == (96, 96)
    assert (pixels > 0).float().mean() == pytest.approx(0.25, abs=0.02)


def test_images_are_resized_to_the_size_of_the_model(processor):
    config = TripsConfig(vision_config={"image_size": [32, 64], "patch_size": [8, 8]})
    wide = make_processor(processor.tokenizer, config)
    inputs = wide(images=Image.new("RGB", (40, 30)), text="red", return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 32, 64)
    assert wide.patch_size == 8
    config = TripsConfig(vision_config={"image_size": 64, "patch_size": [8, 16]})
    with pytest.raises(ValueError, match="`patch_size`"):
        make_processor(processor.tokenizer, config)


@pytest.mark.filterwarnings("error:.*max_length")
def test_the_truncation_of_a_tokenizer_is_no_limit_of_the_model(processor, tmp_path):
    """MiniLM's tokenizer has it."""
    tokenizer = copy.deepcopy(processor.tokenizer)
    tokenizer.init_kwargs |= {"max_length": 4, "truncation_side": "right"}
    tokenizer.save_pretrained(tmp_path)
    _, loaded = load_start(ModelArguments(preset="tiny", tokenizer=str(tmp_path)))
    assert loaded(text=["is it red?"] * 2, return_tensors="pt")["input_ids"].shape[1] > 4


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    arguments = write_parts(tmp_path_factory.mktemp("parts"))
    return dict(argument.removeprefix("--").split("=") for argument in arguments)


def start_from(parts, **options):
    args = ModelArguments(**parts, schedule="3:text:0.5", num_fusion_layers=1, image_size=48, **options)
    torch.manual_seed(0)
    return make_model(TripsForQuestionAnswering, args, *load_start(args))


def test_frozen_layers_need_no_backward_pass(parts):
    ids = torch.tensor([[2, 5, 6, 3]])
    pixel_values = torch.randn(1, 3, 48, 48)
    free = start_from(parts)
    expected = free(input_ids=ids, pixel_values=pixel_values, labels=ids).loss

    frozen = start_from(parts, freeze_vision_layers=2)
    tower = frozen.base_model.vision_model
    needs_gradient = []

    def note_input(layer, args):
        needs_gradient.append(args[0].requires_grad)

    for layer in tower.layers:
        layer.register_forward_pre_hook(note_input)
    loss = frozen(input_ids=ids, pixel_values=pixel_values, labels=ids).loss
    assert loss.item() == expected.item()
    assert needs_gradient == [False, False, False]
    loss.backward()
    for parameter in (*tower.embeddings.parameters(), *tower.layers[:2].parameters()):
        assert parameter.grad is None
    for parameter in tower.layers[2].parameters():
        assert parameter.grad is not None


@pytest.mark.parametrize("num_layers", [1, 3])
def test_missing_decoder_starts_from_the_text_encoder(num_layers, processor, tmp_path):
    sizes = {
        "text_config": {"num_hidden_layers": 2, "vocab_size": len(processor.tokenizer)},
        "decoder_config": {"num_hidden_layers": num_layers},
    }
    TripsForVisualGrounding(TripsConfig.from_preset("tiny", **sizes)).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    args = ModelArguments(model=str(tmp_path))
    model = make_model(TripsForQuestionAnswering, args, *load_start(args))
    text = model.model.text_model
    decoder = model.decoder
    words = decoder.embeddings.word_embeddings.weight
    assert model.lm_head.decoder.weight is words
    assert_close(words, text.embeddings.word_embeddings.weight)
    uppermost = text.encoder.layer[-num_layers:]
    for layer, source in zip(decoder.encoder.layer, uppermost):
        weights = layer.state_dict()
        for name, weight in source.state_dict().items():
            assert_close(weights[name], weight)
    # Fields of the checkpoint are not overwritten.
    torch.nn.init.ones_(decoder.encoder.layer[0].output.dense.weight)
    model.save_pretrained(tmp_path)
    again = make_model(TripsForQuestionAnswering, args, *load_start(args))
    assert (again.decoder.encoder.layer[0].output.dense.weight == 1).all()


def test_starting_another_task_names_new_and_unused_parts(tmp_path, caplog, capfd):
    save_random_checkpoint(tmp_path, TripsForQuestionAnswering, ["is it red?"])
    caplog.set_level("INFO")
    args = ModelArguments(model=str(tmp_path))
    make_model(TripsForVisualGrounding, args, *load_start(args))
    assert "new: box_head" in caplog.text
    assert "left out: decoder" in caplog.text
    assert "UNEXPECTED" not in caplog.text + capfd.readouterr().err
