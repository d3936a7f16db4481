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


CAPTIONS = ["all is red here", "a red image", "all is blue"]


@pytest.fixture(scope="module")
def processor():
    return make_processor(train_tokenizer([*CAPTIONS, "a picture of"]), TripsConfig.from_preset("tiny"))


def row(color: str, caption: str) -> dict:
    image = {"bytes": encoded(color), "path": None}
    return {"image": image, "image_id": color, "caption": caption, "source": f"toy row {caption}"}


ROWS = [row("red", CAPTIONS[0]), row("blue", CAPTIONS[2]), row("red", CAPTIONS[1])]


def test_captions_of_an_image_share_its_prompt_in_training(processor):
    batch = CaptionCollator(processor, training=True, prompt="a picture of ")(ROWS)
    words = [processor.tokenizer.decode(ids, skip_special_tokens=True) for ids in batch["input_ids"]]
    assert words == ["a picture of"] * 2  # one for each image
    assert batch["text_index"].tolist() == [0, 1, 0] and "image_index" not in batch
    assert processor.post_process_answers(batch["labels"].clamp(min=0)) == [CAPTIONS[0], CAPTIONS[2], CAPTIONS[1]]
    assert batch["pixel_values"].shape[0] == 2


def test_sharing_leaves_the_loss_as_it_is(processor):
    config = TripsConfig.from_preset("tiny", text_config={"vocab_size": len(processor.tokenizer)})
    model = TripsForConditionalGeneration(config).eval()
    shared = CaptionCollator(processor, training=True, prompt="a picture of ")(ROWS)
    alone = CaptionCollator(processor, prompt="a picture of ")(ROWS)
    assert alone["input_ids"].shape[0] == 3 and alone["image_index"].tolist() == [0, 1, 0]
    losses = [model(**{k: v for k, v in batch.items() if k != "sources"}).loss for batch in (shared, alone)]
    torch.testing.assert_close(*losses)


def test_beam_options_stay_with_the_checkpoint(tmp_path):
    options = [*write_task("captions", tmp_path), *OPTIONS, "--max_steps=1", f"--output_dir={tmp_path / 'out'}"]
    beams = ["--generation_num_beams=2", "--length_penalty=0.5", "--generation_max_length=6"]
    run_captioning.main([*options, *beams, "--do_eval=False"])
    config = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (config.num_beams, config.length_penalty, config.max_new_tokens) == (2, 0.5, 6)
