"""`examples/run_captioning.py`: batches with shared images, and options."""

import pytest
import torch
from toy_pairs import encoded
from toy_tasks import OPTIONS, write_task
from transformers import GenerationConfig

from modeling_trips import TripsConfig, TripsForConditionalGeneration
from trips_examples import run_captioning
from trips_examples.data.collators import CaptionCollator
from trips_examples.data.vocabulary import train_tokenizer
from trips_examples.training.models import make_processor


CAPTIONS = ["all is red here", "all is blue", "a red image"]


@pytest.fixture(scope="module")
def processor():
    tokenizer = train_tokenizer([*CAPTIONS, "a picture of"])
    return make_processor(tokenizer, TripsConfig.from_preset("tiny"))


def row(color, caption):
    return {
        "image": {"bytes": encoded(color), "path": None},
        "image_id": color,
        "caption": caption,
        "source": f"toy row {caption}",
    }


ROWS = [row("red", CAPTIONS[0]), row("blue", CAPTIONS[1]), row("red", CAPTIONS[2])]


def test_captions_of_an_image_share_its_prompt_in_training(processor):
    batch = CaptionCollator(processor, training=True, prompt="a picture of ")(ROWS)
    prompts = processor.tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
    assert prompts == ["a picture of", "a picture of"]  # one for each image
    assert batch["text_index"].tolist() == [0, 1, 0]
    assert "image_index" not in batch
    assert processor.post_process_answers(batch["labels"].clamp(min=0)) == CAPTIONS
    assert batch["pixel_values"].shape[0] == 2


def test_sharing_leaves_the_loss_as_it_is(processor):
    config = TripsConfig.from_preset("tiny", text_config={"vocab_size": len(processor.tokenizer)})
    model = TripsForConditionalGeneration(config).eval()
    shared = CaptionCollator(processor, training=True, prompt="a picture of ")(ROWS)
    alone = CaptionCollator(processor, prompt="a picture of ")(ROWS)
    assert alone["input_ids"].shape[0] == 3
    assert alone["image_index"].tolist() == [0, 1, 0]
    shared.pop("sources")
    alone.pop("sources")
    torch.testing.assert_close(model(**shared).loss, model(**alone).loss)


def test_beam_options_stay_with_the_checkpoint(tmp_path):
    options = [
        "--max_steps=1",
        "--do_eval=False",
        "--generation_num_beams=2",
        "--length_penalty=0.5",
        "--generation_max_length=6",
        f"--output_dir={tmp_path / 'out'}",
    ]
    run_captioning.main([*write_task("captions", tmp_path), *OPTIONS, *options])
    config = GenerationConfig.from_pretrained(tmp_path / "out")
    assert config.num_beams == 2
    assert config.length_penalty == 0.5
    assert config.max_new_tokens == 6
