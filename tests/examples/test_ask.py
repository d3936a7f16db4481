"""`examples/ask.py` as a user runs it, and the checkpoint that comes with the project."""

import sys

import pytest
import torch
from PIL import Image
from places import EXAMPLES
from programs import output_of

from modeling_trips import TripsConfig, TripsForQuestionAnswering, TripsForVisualGrounding, TripsProcessor
from trips_examples import ask
from trips_examples.data.busy_scenes import KINDS, busy_records
from trips_examples.data.images import read_image


@pytest.fixture(scope="module")
def model():
    return TripsForQuestionAnswering.from_pretrained(ask.CHECKPOINT).eval()


@pytest.fixture(scope="module")
def processor():
    return TripsProcessor.from_pretrained(ask.CHECKPOINT)


@pytest.mark.slow
def test_answers_draws_and_compares_without_any_option(tmp_path):
    printed = output_of(sys.executable, EXAMPLES / "ask.py", cwd=tmp_path, variables={"HF_HUB_OFFLINE": "1"})
    for question in ask.QUESTIONS:
        assert printed.count(f"  {question} ") == 1
    assert printed.count(f" {ask.SAME_WEIGHTS}: ") == len(ask.QUESTIONS)
    assert "unpruned: " not in printed
    assert "1 of 144 patches after layer 2" in printed
    assert printed.count(" times as fast") == 2
    with Image.open(tmp_path / "outputs/kept_patches.png") as picture:  # the original and a panel per question
        assert picture.width > 1000
        assert len(picture.convert("RGB").getcolors(10**6)) > 20


def test_images_that_are_none_are_named(tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match="--image .*notes.txt: "):
        ask.main(["--image", str(tmp_path / "notes.txt")])


def test_a_checkpoint_with_another_head_is_refused(tmp_path):
    TripsForVisualGrounding(TripsConfig.from_preset("tiny")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="TripsForVisualGrounding"):
        ask.main(["--model", str(tmp_path)])


def test_asks_a_model_that_keeps_all_patches(tmp_path, capsys):
    """About an image of another size and mode. There are no kept patches, and nothing to compare."""
    Image.new("RGBA", (150, 90), "teal").save(tmp_path / "picture.png")
    unpruned = TripsForQuestionAnswering.from_pretrained(ask.CHECKPOINT, schedule="unpruned")
    unpruned.save_pretrained(tmp_path / "unpruned")
    TripsProcessor.from_pretrained(ask.CHECKPOINT).save_pretrained(tmp_path / "unpruned")
    options = ["--image", str(tmp_path / "picture.png"), "--question", "is there a circle?"]
    ask.main([*options, "--model", str(tmp_path / "unpruned"), "--picture", str(tmp_path / "kept.png")])
    printed = capsys.readouterr().out
    assert printed.count("  is there a circle? ") == 1
    assert "It keeps" not in printed
    assert "rate" not in printed
    assert not (tmp_path / "kept.png").exists()


def test_the_shipped_checkpoint_is_small_and_holds_no_code():
    assert sum(path.stat().st_size for path in ask.CHECKPOINT.iterdir()) < 5_000_000
    assert {path.suffix for path in ask.CHECKPOINT.iterdir()} == {".json", ".safetensors", ".md"}
    for path in ask.CHECKPOINT.glob("*.json"):
        assert "auto_map" not in path.read_text()


def test_the_code_of_its_card_loads_it_whole_in_float32():
    (block,) = (ask.CHECKPOINT / "README.md").read_text().split("```python\n")[1:]
    namespace = {}
    exec(compile(block.split("```")[0], "README.md", "exec"), namespace)
    assert namespace["model"].dtype == torch.float32
    _, report = TripsForQuestionAnswering.from_pretrained(ask.CHECKPOINT, output_loading_info=True)
    assert not any(report[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))


KEPT = [[[127], [100]]]  # by selection layer and question
FIRST_TOKENS = [[138, 160, 123], [128, 170, 174]]
LOGITS = [[9.638316, 3.043677, 2.622042], [9.99985, 2.138674, 1.588511]]


@torch.no_grad()
def test_the_shipped_checkpoint_computes_what_it_did_when_it_was_made(model, processor):
    questions = ["what mark is on the red circle?", "what color is the cross?"]
    image = Image.open(EXAMPLES / "scene.png")
    inputs = processor(images=image, text=questions, image_index=[0, 0], return_tensors="pt")
    start = torch.full((2, 1), model.config.decoder_start_token_id)
    output = model(**inputs, decoder_input_ids=start)
    assert [layer.kept_indices.tolist() for layer in output.selection] == KEPT
    best = output.logits[:, 0].topk(3)
    assert best.indices.tolist() == FIRST_TOKENS
    torch.testing.assert_close(best.values, torch.tensor(LOGITS), rtol=0, atol=1e-4)
    assert processor.post_process_answers(model.generate(**inputs)) == ["dot", "purple"]


def test_the_shipped_checkpoint_answers_93_percent_of_each_kind_of_questions(model, processor):
    records = list(busy_records("vqa", "test", 60))
    images = {record["image_id"]: read_image(record) for record in records}
    inputs = processor(
        images=list(images.values()),
        text=[record["question"] for record in records],
        image_index=[list(images).index(record["image_id"]) for record in records],
        return_tensors="pt",
    )
    answers = processor.post_process_answers(model.generate(**inputs))
    for kind in KINDS:
        right = [answer == record["answer"] for answer, record in zip(answers, records) if record["kind"] == kind]
        assert len(right) == 120 and sum(right) >= 0.93 * len(right), kind
