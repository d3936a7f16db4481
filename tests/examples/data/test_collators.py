"""The batches of the examples: sampling by image, collating with shared images and weighted answers, augmentation."""

import io
from itertools import islice, product

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset, DatasetDict
from safetensors.torch import save_file
from transformers import BlipImageProcessor, CLIPImageProcessor, DeiTImageProcessor

from modeling_trips import TripsConfig, TripsForQuestionAnswering, TripsProcessor
from trips_examples.data.collators import ImageGroupedSampler, flip_and_shift, without_long_texts
from trips_examples.data.scenes import easy_vqa_records, scene_records
from trips_examples.data.task_collators import VqaCollator
from trips_examples.data.tasks import TASKS
from trips_examples.data.vocabulary import EMBEDDED_WORDS, train_wordpiece_tokenizer
from trips_examples.training.files import write_whole
from trips_examples.training.guard import LossGuard, last_good_checkpoint
from trips_examples.training.models import load_model, make_processor
from trips_examples.training.options import DataArguments, ModelArguments, TripsTrainingArguments
from trips_examples.training.runs import checkpoint_to_resume, parse_arguments
from trips_examples.training.trainer import ImageGroupedTrainer


QUESTIONS = ["what color is it?", "is it red?", "what shape is it?"]
ANSWERS = ["red", "yes", "no", "circle"]


@pytest.fixture(scope="module")
def processor():
    return make_processor(train_wordpiece_tokenizer([*QUESTIONS, *ANSWERS]), TripsConfig.from_preset("tiny"))


def encoded(color: str) -> dict:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (64, 64), color).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def row(image_id: str, question: int, answers: list[str], color: str = "red") -> dict:
    return {
        "image": encoded(color),
        "image_id": image_id,
        "question": QUESTIONS[question],
        "answers": answers,
        "source": f"toy row {image_id}-{question}",
    }


def test_sampler_draws_each_row_once_and_keeps_groups_of_an_image_together():
    image_ids = [f"image {i % 7}" for i in range(40)]
    order = list(ImageGroupedSampler(image_ids, group_size=3))
    assert sorted(order) == list(range(40))
    # Images 0 to 4 have 6 rows, 5 and 6 have 5: two groups each, so that the image changes at most 13 times.
    changes = sum(image_ids[a] != image_ids[b] for a, b in zip(order, order[1:]))
    assert changes <= 13


def test_sampler_order_depends_on_seed_and_epoch_alone():
    image_ids = [str(i // 4) for i in range(32)]
    first, second = (ImageGroupedSampler(image_ids, 2, seed=3) for _ in range(2))
    assert list(first) == list(second)
    first.set_epoch(1)
    assert list(first) != list(second)
    second.set_epoch(1)
    assert list(first) == list(second)
    assert list(ImageGroupedSampler(image_ids, 2, seed=4)) != list(ImageGroupedSampler(image_ids, 2, seed=3))


def test_collator_computes_an_image_once_for_all_of_its_questions(processor):
    rows = [row("a", 0, ["red"], "red"), row("b", 1, ["no"], "blue"), row("a", 2, ["circle"], "red")]
    batch = VqaCollator(processor)(rows)
    assert batch["image_index"].tolist() == [0, 1, 0]
    assert batch["pixel_values"].shape == (2, 3, 64, 64)
    red, blue = batch["pixel_values"].mean(dim=(2, 3))
    assert red[0] > red[2] and blue[2] > blue[0]
    assert batch["input_ids"].shape[0] == 3


def test_training_labels_are_the_distinct_answers_with_their_shares(processor):
    rows = [row("a", 0, ["red", "red", "yes", "red"]), row("b", 1, ["no"])]
    batch = VqaCollator(processor, training=True)(rows)
    vocabulary = processor.tokenizer.get_vocab()
    end = processor.tokenizer.sep_token_id
    assert batch["labels"].tolist() == [[vocabulary[word], end] for word in ("red", "yes", "no")]
    assert batch["text_index"].tolist() == [0, 0, 1]
    assert batch["loss_weights"].tolist() == [0.75, 0.25, 1.0]


def test_evaluation_label_is_the_most_common_answer(processor):
    batch = VqaCollator(processor)([row("a", 0, ["yes", "red", "red"])])
    assert batch["labels"][0, 0] == processor.tokenizer.get_vocab()["red"]
    assert "text_index" not in batch and "loss_weights" not in batch


def test_errors_name_the_row(processor):
    bad = row("a", 0, ["red"])
    bad["image"]["bytes"] = bad["image"]["bytes"][:60]
    with pytest.raises(ValueError, match="toy row a-0.*cannot read the image"):
        VqaCollator(processor)([bad])
    long = {**row("a", 0, ["red"]), "question": "red " * 100}
    with pytest.raises(ValueError, match=r"text\[1\].*toy row b-1, toy row a-0"):
        VqaCollator(processor)([row("b", 1, ["no"]), long])


def test_flip_and_shift_moves_the_image_by_at_most_an_eighth_and_repeats_its_border():
    image = PIL.Image.new("RGB", (64, 32), "white")
    image.putpixel((32, 16), (0, 0, 0))
    places = set()
    for seed in range(30):
        torch.manual_seed(seed)
        moved = np.asarray(flip_and_shift(image).convert("L"))
        assert moved.shape == (32, 64)
        (y,), (x,) = np.where(moved == 0)
        assert (moved == 255).sum() == 64 * 32 - 1
        assert abs(y - 16) <= 4 and min(abs(x - 32), abs(x - 31)) <= 8
        places.add((y, x))
    assert len(places) > 15


def test_resuming_from_the_last_checkpoint_needs_one(tmp_path):
    args = TripsTrainingArguments(output_dir=str(tmp_path), resume_from_checkpoint="last")
    with pytest.raises(ValueError, match="no checkpoint in"):
        checkpoint_to_resume(args)
    for step in (2, 10, 11):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if step != 11:  # the run was killed while it wrote this one
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").touch()
    assert checkpoint_to_resume(args) == str(tmp_path / "checkpoint-10")


def test_a_new_run_leaves_the_checkpoints_of_another_alone(tmp_path):
    options = ["--output_dir", str(tmp_path), "--report_to=none"]
    (tmp_path / "checkpoint-3").mkdir()  # the beginning of one counts for nothing
    parse_arguments(options, TripsTrainingArguments, description="")
    (tmp_path / "checkpoint-3" / "trainer_state.json").touch()
    with pytest.raises(ValueError, match="holds checkpoints: .* --resume_from_checkpoint last, or .* --output_dir"):
        parse_arguments(options, TripsTrainingArguments, description="")
    for more in (["--resume_from_checkpoint=last"], ["--do_train=False"]):
        parse_arguments([*options, *more], TripsTrainingArguments, description="")


@pytest.mark.parametrize("image_processor", [CLIPImageProcessor, DeiTImageProcessor, BlipImageProcessor])
def test_another_image_size_shows_the_whole_image(image_processor, processor, tmp_path):
    """Also where the checkpoint's processor would cut out the middle."""
    config = TripsConfig.from_preset("tiny", text_config={"vocab_size": len(processor.tokenizer)})
    TripsForQuestionAnswering(config).save_pretrained(tmp_path)
    TripsProcessor(image_processor(), processor.tokenizer).save_pretrained(tmp_path)
    args = ModelArguments(model_name_or_path=str(tmp_path), image_size=96)
    _, loaded = load_model(TripsForQuestionAnswering, args, [])
    image = PIL.Image.new("RGB", (300, 200), "black")
    image.paste("white", (0, 0, 150, 100))  # a quarter
    pixels = loaded(images=image, text="red", return_tensors="pt")["pixel_values"][0, 0]
    assert pixels.shape == (96, 96)
    assert (pixels > 0).float().mean() == pytest.approx(0.25, abs=0.02)


def test_a_written_file_is_whole_and_its_folder_is_made(tmp_path):
    write_whole(tmp_path / "a" / "b.json", "{}")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.json"]


def test_questions_that_do_not_fit_are_found_before_training(processor, caplog):
    questions = ["is it red?", "red " * 62, "red " * 63]  # 64 tokens fit, with [CLS] and [SEP]
    rows = Dataset.from_dict({"question": questions, "source": ["a row 1", "a row 2", "a row 3"]})
    data = DatasetDict(train=rows.select([0]), validation=rows)
    with pytest.raises(ValueError, match=r"1 of 3 questions .* 64 tokens: a row 3 \(65 tokens\)"):
        without_long_texts(data, "question", processor, skip=False)
    kept = without_long_texts(data, "question", processor, skip=True)
    assert kept["train"]["source"] == ["a row 1"] and kept["validation"]["source"] == ["a row 1", "a row 2"]
    assert "1 of 3 questions" in caplog.text


@pytest.mark.parametrize("option", [{"label_smoothing_factor": 0.1}, {"predict_with_generate": False}])
def test_options_that_would_be_ignored_are_refused(option, tmp_path):
    with pytest.raises(ValueError, match=f"--{next(iter(option))}"):
        TripsTrainingArguments(output_dir=str(tmp_path), **option)


def test_rotated_photos_are_upright_before_they_are_augmented(processor):
    # Stored red on the left and blue on the right; orientation 6 turns that to red above and blue below, which no
    # sideways flip changes.
    image = PIL.Image.new("RGB", (64, 64), "red")
    image.paste("blue", (32, 0, 64, 64))
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=exif)
    rows = [{**row("a", 0, ["red"]), "image": {"bytes": buffer.getvalue(), "path": None}}]
    collator = VqaCollator(processor, training=True, augment=True)
    for seed in range(8):
        torch.manual_seed(seed)
        red, _, blue = collator(rows)["pixel_values"][0]
        assert (red[:20] > blue[:20]).all() and (red[-20:] < blue[-20:]).all()


# ---------------------------------------------------------------------------------------------------------------------
# Losses that are no numbers


def save_weights(folder, value: float):
    folder.mkdir(parents=True)
    save_file({"fine": torch.ones(2), "weight": torch.tensor([1.0, value])}, folder / "model.safetensors")


def test_the_last_good_checkpoint_is_the_latest_before_the_step_with_finite_weights(tmp_path):
    assert last_good_checkpoint(tmp_path, before=10) is None
    save_weights(tmp_path / "checkpoint-9", 1.0)
    save_weights(tmp_path / "checkpoint-10", float("nan"))
    save_weights(tmp_path / "checkpoint-12", 1.0)
    assert last_good_checkpoint(tmp_path, before=11) == tmp_path / "checkpoint-9"  # 10 as text is before 9
    assert last_good_checkpoint(tmp_path, before=12) == tmp_path / "checkpoint-9"
    assert last_good_checkpoint(tmp_path, before=13) == tmp_path / "checkpoint-12"
    assert last_good_checkpoint(tmp_path, before=9) is None


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), -float("inf")])
def test_the_guard_names_step_rows_and_checkpoint_of_a_loss_that_is_no_number(loss, tmp_path):
    guard = LossGuard(Accelerator(cpu=True), tmp_path)
    save_weights(tmp_path / "checkpoint-6", 1.0)
    guard.watch(torch.tensor(1e30), 6, ["a row 1"])
    with pytest.raises(FloatingPointError) as error:
        guard.watch(torch.tensor(loss), 7, ["a row 2", "b row 3"])
    assert f"step 7 is {loss} for the rows a row 2, b row 3." in str(error.value)
    assert f"--resume_from_checkpoint {tmp_path / 'checkpoint-6'} " in str(error.value)
    with pytest.raises(FloatingPointError, match="There is no good checkpoint"):
        LossGuard(Accelerator(cpu=True), tmp_path / "empty").watch(torch.tensor(loss), 1, [])


def test_gradients_that_are_no_numbers_are_found_at_the_next_loss_and_their_checkpoint_is_not_good(tmp_path):
    """The loss of step 1 is fine, its gradient is not: the weights of checkpoint-1 are no numbers."""

    class Root(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x, labels):
            return {"loss": (self.weight * x).abs().sqrt().sum()}

        def unused_parameters(self):
            return []

    rows = [{"image_ids": ["a", "b"], "x": 1.0, "source": f"row {i}"} for i in range(4)]
    args = TripsTrainingArguments(
        output_dir=str(tmp_path), max_steps=4, save_steps=1, per_device_train_batch_size=1, auto_bf16=False
    )

    def collator(rows):
        x = torch.tensor([row["x"] for row in rows])
        return {"x": x, "labels": x, "sources": [row["source"] for row in rows]}

    trainer = ImageGroupedTrainer(Root(), args, train_dataset=Dataset.from_list(rows), train_collator=collator)
    with pytest.raises(FloatingPointError, match=r"step 2 is nan for the rows row \d\. There is no good checkpoint"):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]


# ---------------------------------------------------------------------------------------------------------------------
# Options


def test_embedded_tasks_share_a_vocabulary_that_has_all_of_their_words():
    tokenizer = train_wordpiece_tokenizer(DataArguments().vocabulary({}, "question"))
    assert {word for word in EMBEDDED_WORDS if len(tokenizer.tokenize(word)) > 1} == set()
    texts = {"a picture of "}
    for record in easy_vqa_records("train"):
        texts |= {record["question"], record["answer"]}
    for task, grid in product(TASKS, (2, 3)):
        for record in islice(scene_records(task, "train", 60, grid), 200):
            columns = {"question", "answer", "statement", "expression"} & record.keys()
            texts |= {record[column] for column in columns} | set(record.get("captions", []))
    assert len(texts) > 500
    tokens = tokenizer.tokenize(" ".join(texts))
    assert not [token for token in tokens if token.startswith("##") or token == "[UNK]"]


def test_a_tokenizer_for_own_data_is_trained_on_their_texts():
    rows = Dataset.from_list(
        [{"question": "is it?", "answers": ["yes", "no"]}, {"question": "why?", "answers": ["so"]}]
    )
    args = DataArguments(train_file="train.json")
    texts = ["is it?", "why?", "yes", "no", "so"]
    assert list(args.vocabulary(DatasetDict(train=rows), "question", "answers")) == texts
    assert list(args.vocabulary(DatasetDict(validation=rows), "question", "answers")) == texts


@pytest.mark.parametrize(
    ("task", "options", "side"),
    [
        ("vqa", {}, None),
        ("vqa", {"dataset_name": "easy_vqa_scenes"}, 128),
        ("captions", {}, 128),
        ("nlvr2", {}, 64),
        ("nlvr2", {"grid": 3}, 192),
        ("grounding", {"grid": 4}, 256),
        ("grounding", {"train_file": "train.json"}, None),
        ("captions", {"dataset_name": "someone/captions"}, None),
    ],
)
def test_scenes_are_read_at_their_own_size(task, options, side):
    arguments = DataArguments(**options)
    assert arguments.scene_size(task) == side
    assert arguments.half_scene_size(task) == (None if side is None else side / 2)
