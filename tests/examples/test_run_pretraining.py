"""`examples/run_pretraining.py`: training on files and on a stream, and a model for other scripts."""

import pytest
from json_files import read_json
from PIL import Image
from safetensors.torch import load_file
from toy_pairs import CAPTIONS, COLORS, command

from modeling_trips import TripsForPreTraining, TripsForRetrieval, TripsProcessor
from trips_examples import run_pretraining
from trips_examples.data.collators import number_of
from trips_examples.training.pretraining import stream_positions


@pytest.mark.slow
def test_learns_the_toy_data_and_leaves_a_model_for_other_scripts(files, tmp_path):
    _, *options = command(files, tmp_path, "--max_steps=100", "--per_device_train_batch_size=18", "--save_steps=50")
    metrics = run_pretraining.main(options)
    assert metrics["eval_chance_r1"] == pytest.approx(1 / 6)
    for name in ("i2t_r1", "t2i_r1"):
        assert metrics[f"eval_features_{name}"] > 1 / 6 + 0.3, (name, metrics)
    for name, most in {"itc": 1.0, "itm": 0.5, "mlm": 1.5, "prefix_lm": 1.5}.items():  # chance: log 6, log 2, log 30
        assert metrics[f"eval_{name}_loss"] < most, metrics
    assert read_json(tmp_path / "eval_results.json")["eval_samples"] == 18

    # The teacher and its queues are in the checkpoints, not in the model that is published.
    teachers = {path.parent.name for path in tmp_path.rglob("momentum*.safetensors")}
    assert teachers == {"checkpoint-50", "checkpoint-100"}
    weights = load_file(tmp_path / "model.safetensors")
    assert weights.keys() == load_file(tmp_path / "checkpoint-100/model.safetensors").keys()
    processor = TripsProcessor.from_pretrained(tmp_path)
    model, info = TripsForRetrieval.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    image = Image.new("RGB", (64, 64), "green")
    texts = [CAPTIONS[0].format(color) for color in COLORS]
    inputs = processor(images=image, text=texts, image_index=[0] * 6, return_tensors="pt")
    inputs.pop("image_index")
    assert model.eval()(**inputs).logits_per_image.argmax() == COLORS.index("green")


def test_a_stream_of_shards(stream, folder, tmp_path):
    _, *options = command(
        stream,
        tmp_path,
        f"--validation_file={folder / 'pairs.jsonl'}",
        "--do_eval=True",
        "--max_steps=4",
        "--save_steps=2",
        "--logging_steps=2",
        "--prefix_lm_weight=0",
        "--itm_weight=0.5",
        "--teacher_start_steps=0",
    )
    metrics = run_pretraining.main(options)
    assert "eval_itm_loss" in metrics
    assert "eval_prefix_lm_loss" not in metrics
    config = TripsForPreTraining.from_pretrained(tmp_path).config
    assert config.itc_weight == 1.0
    assert config.itm_weight == 0.5
    assert config.prefix_lm_weight == 0.0
    state = read_json(tmp_path / "checkpoint-4/stream_0.json")
    (position,) = stream_positions(state["loader"])
    assert position["seen"] == 24
    log = read_json(tmp_path / "checkpoint-4/trainer_state.json")["log_history"]
    assert [entry["pairs"] for entry in log if "loss" in entry] == [12, 24]
    # URLs identify the images of a stream in the queue.
    teacher = load_file(tmp_path / "checkpoint-4/momentum.safetensors")
    assert set(teacher["texts.ids"].tolist()) == {-1, *map(number_of, COLORS)}
