"""
Pre-training as a user runs it: batches, the trainer's teacher and learning rates, metrics, resuming after a kill from
files and from a stream, two processes, and a start from a vision tower and a text encoder.
"""

import io
import json
import os
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path

import datasets
import PIL.Image
import psutil
import pytest
import torch
from datasets import Dataset
from places import ROOT
from safetensors.torch import load_file
from transformers import AutoModel, BertConfig, BertModel, ViTConfig, ViTImageProcessor, ViTModel

from modeling_trips import TripsConfig, TripsForPreTraining, TripsForRetrieval, TripsProcessor
from trips_examples import run_pretraining
from trips_examples.data.pretraining import PretrainingCollator
from trips_examples.data.task_collators import number_of
from trips_examples.data.vocabulary import train_wordpiece_tokenizer
from trips_examples.run_pretraining import PretrainingDataArguments, load_pairs
from trips_examples.training.models import make_processor
from trips_examples.training.pretraining import PretrainingArguments, PretrainingTrainer


SCRIPT = str(ROOT / "examples" / "run_pretraining.py")
COLORS = ["red", "blue", "green", "white", "black", "yellow"]
CAPTIONS = ["a {} picture", "all of it is {}", "{} from the left to the right"]
OPTIONS = [
    "--per_device_train_batch_size=6",
    "--per_device_eval_batch_size=9",
    "--learning_rate=1e-3",
    "--lr_scheduler_type=constant",
    "--auto_bf16=False",
    "--queue_size=40",
    "--disable_tqdm=True",
]


def encoded(color: str) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (64, 64), color).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece_tokenizer([caption.format(color) for caption in CAPTIONS for color in COLORS])


@pytest.fixture(scope="module")
def processor(tokenizer):
    return make_processor(tokenizer, TripsConfig.from_preset("tiny"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer) -> Path:
    """Six images with three captions each: as rows of a file, and in three tar shards. A tokenizer, too."""
    folder = tmp_path_factory.mktemp("data")
    pairs = [(color, caption.format(color)) for color in COLORS for caption in CAPTIONS]
    for color in COLORS:
        (folder / f"{color}.png").write_bytes(encoded(color))
    rows = [json.dumps({"image": f"{color}.png", "caption": caption}) for color, caption in pairs]
    (folder / "pairs.jsonl").write_text("\n".join(rows))
    for shard in range(3):
        with tarfile.open(folder / f"pairs-{shard}.tar", "w") as tar:
            for number, (color, caption) in enumerate(pairs[shard::3]):
                files = {"png": encoded(color), "txt": caption.encode(), "json": json.dumps({"url": color}).encode()}
                for suffix, content in files.items():
                    info = tarfile.TarInfo(f"{shard}{number}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def files(folder) -> list[str]:
    return [f"--train_file={folder / 'pairs.jsonl'}", f"--validation_file={folder / 'pairs.jsonl'}"]


@pytest.fixture(scope="module")
def stream(folder) -> list[str]:
    return [
        f"--train_shards={folder}/pairs-{{0..2}}.tar",
        "--shuffle_buffer=4",
        f"--tokenizer_name={folder / 'tokenizer'}",
        "--do_eval=False",
    ]


@pytest.fixture(scope="module")
def parts(tmp_path_factory, tokenizer) -> list[str]:
    """Options that name a ViT and a BERT, untrained."""
    folder = tmp_path_factory.mktemp("parts")
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48}
    torch.manual_seed(0)
    ViTModel(ViTConfig(num_hidden_layers=3, image_size=32, patch_size=8, **sizes)).save_pretrained(folder / "vit")
    ViTImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]).save_pretrained(folder / "vit")
    text = BertConfig(vocab_size=len(tokenizer), num_hidden_layers=2, max_position_embeddings=40, **sizes)
    BertModel(text).save_pretrained(folder / "bert")
    tokenizer.save_pretrained(folder / "bert")
    return [f"--vision_model_name_or_path={folder / 'vit'}", f"--text_model_name_or_path={folder / 'bert'}"]


def command(data: list[str], output_dir: Path, *options: str) -> list[str]:
    return [SCRIPT, *data, *OPTIONS, f"--output_dir={output_dir}", *options]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def run(*words: str) -> str:
    """Runs Python with these arguments and returns what it printed; shows its errors if it fails."""
    result = subprocess.run([sys.executable, *words], env=environment(), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def assert_equal(folder: Path, expected: Path, *names: str):
    for name in names:
        weights, weights_expected = load_file(folder / name), load_file(expected / name)
        assert weights.keys() == weights_expected.keys()
        for key, weight in weights_expected.items():
            torch.testing.assert_close(weights[key], weight, rtol=0, atol=0, msg=f"{name}: {key}")


# ---------------------------------------------------------------------------------------------------------------------
# Batches


def make_rows(count: int, caption: str = "{} from the left to the right") -> list[dict]:
    return [
        {
            "image": {"bytes": encoded(COLORS[number % 6]), "path": None},
            "image_id": COLORS[number % 6],
            "caption": caption.format(COLORS[number % 6]),
            "source": f"toy row {number}",
        }
        for number in range(count)
    ]


def test_a_batch_says_which_images_are_the_same(processor):
    rows = make_rows(8)
    batch = PretrainingCollator(processor)(rows)
    assert batch["pixel_values"].shape == (6, 3, 64, 64)
    assert batch["image_index"].tolist() == [0, 1, 2, 3, 4, 5, 0, 1]
    assert batch["image_ids"].tolist() == [number_of(color) for color in COLORS]
    assert batch["sources"][7] == "toy row 7" and "position" not in batch
    rows[-1]["position"] = (1, "where the stream is")
    assert PretrainingCollator(processor)(rows)["position"] == (1, "where the stream is")


def test_words_are_masked_at_the_rates_of_bert_and_special_tokens_never(processor):
    tokenizer = processor.tokenizer
    changed = Counter()
    for start in range(60):
        rows = [{**row, "source": f"{start} {row['source']}"} for row in make_rows(50)]
        batch = PretrainingCollator(processor)(rows)
        ids, masked, labels = batch["input_ids"], batch["mlm_input_ids"], batch["mlm_labels"]
        special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
        chosen = labels != -100
        assert not (chosen & special).any() and torch.equal(labels[chosen], ids[chosen])
        assert torch.equal(masked[~chosen], ids[~chosen])
        changed["words"] += int((~special).sum())
        changed["chosen"] += int(chosen.sum())
        changed["mask"] += int((masked[chosen] == tokenizer.mask_token_id).sum())
        changed["kept"] += int((masked[chosen] == ids[chosen]).sum())
    assert changed["chosen"] / changed["words"] == pytest.approx(0.15, abs=0.01)
    assert changed["mask"] / changed["chosen"] == pytest.approx(0.8, abs=0.03)
    assert changed["kept"] / changed["chosen"] == pytest.approx(0.1, abs=0.03)  # and a few drawn as themselves


def test_what_is_drawn_depends_on_the_seed_and_the_rows_alone(processor):
    rows = make_rows(20)
    batches = []
    for seed, order in ((0, rows), (0, rows), (1, rows), (0, rows[::-1])):
        torch.manual_seed(len(batches))
        before = torch.get_rng_state()
        batches.append(PretrainingCollator(processor, training=True, augment=True, seed=seed)(order))
        assert torch.equal(torch.get_rng_state(), before)  # training draws from it
    for name in ("mlm_input_ids", "labels", "pixel_values"):
        assert torch.equal(batches[0][name], batches[1][name])
    assert not torch.equal(batches[0]["mlm_labels"], batches[2]["mlm_labels"])
    assert not torch.equal(batches[0]["mlm_labels"], batches[3]["mlm_labels"].flip(0))


def test_a_cut_caption_is_a_prompt_and_what_follows(processor):
    tokenizer = processor.tokenizer
    cuts = Counter()
    for start in range(20):
        rows = [{**row, "source": f"{start} {row['source']}"} for row in make_rows(30)] + make_rows(1, "a {}")
        batch = PretrainingCollator(processor)(rows)
        for ids, prompt, mask, labels in zip(
            batch["input_ids"], batch["prompt_input_ids"], batch["prompt_attention_mask"], batch["labels"]
        ):
            whole = tokenizer.decode(ids, skip_special_tokens=True).split()
            prompt, labels = prompt[mask.bool()].tolist(), labels[labels != -100].tolist()
            assert prompt == tokenizer(tokenizer.decode(prompt, skip_special_tokens=True))["input_ids"]
            assert labels[-1] == tokenizer.sep_token_id
            beginning, rest = tokenizer.decode(prompt[1:-1]).split(), tokenizer.decode(labels[:-1]).split()
            assert beginning and rest and beginning + rest == whole
            cuts[len(whole), len(beginning)] += 1
    # "red from the left to the right" has seven words: every cut happens, about as often.
    assert {cut for length, cut in cuts if length == 7} == set(range(1, 7))
    assert min(cuts[7, cut] for cut in range(1, 7)) > 60 and cuts[2, 1] == 20


def test_a_caption_of_one_word_is_not_cut(processor):
    batch = PretrainingCollator(processor)(make_rows(2, "{}") + make_rows(1))
    assert (batch["labels"][:2] == -100).all() and (batch["labels"][2] != -100).any()
    assert torch.equal(batch["prompt_input_ids"][:2, :3], batch["input_ids"][:2, :3])


def test_objectives_that_are_off_have_no_inputs(processor):
    batch = PretrainingCollator(processor, masks_words=False, cuts_captions=False)(make_rows(2))
    assert not {"mlm_input_ids", "mlm_labels", "prompt_input_ids", "labels"} & batch.keys()


def test_a_streamed_data_set_has_splits(tmp_path, monkeypatch):
    """A local folder stands in for a data set on the Hub."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for split in ("train", "validation"):
        features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
        pairs = {"image": [{"bytes": encoded("red"), "path": None}], "caption": [split]}
        Dataset.from_dict(pairs, features=features).to_parquet(tmp_path / "pairs" / f"{split}-0.parquet")
    args = PretrainingArguments(output_dir=str(tmp_path / "out"), max_steps=1, do_eval=False, use_cpu=True)
    for split in (None, "validation"):
        source = PretrainingDataArguments(dataset_name=str(tmp_path / "pairs"), streaming=True, train_split=split)
        _, stream = load_pairs(source, args)
        assert next(iter(stream))["caption"] == (split or "train")


# ---------------------------------------------------------------------------------------------------------------------
# The trainer


def make_trainer(processor, folder: Path, rows: list[dict] | None = None, **options) -> PretrainingTrainer:
    torch.manual_seed(0)
    config_fields = options.pop("config_fields", {})
    config = TripsConfig.from_preset(
        "tiny", text_config={"vocab_size": len(processor.tokenizer)}, projection_dim=16, **config_fields
    )
    defaults = {"per_device_train_batch_size": 4, "auto_bf16": False, "queue_size": 16, "report_to": "none"}
    defaults["teacher_start_steps"] = 0
    return PretrainingTrainer(
        model=TripsForPreTraining(config),
        args=PretrainingArguments(output_dir=str(folder), disable_tqdm=True, **{**defaults, **options}),
        train_dataset=Dataset.from_list(make_rows(20) if rows is None else rows),
        train_collator=PretrainingCollator(processor, training=True),
        processing_class=processor,
    )


def test_the_teacher_follows_each_step_of_the_optimizer(processor, tmp_path):
    options = {"max_steps": 3, "save_strategy": "no", "momentum": 0.75, "gradient_accumulation_steps": 2}
    trainer = make_trainer(processor, tmp_path, **options)
    name, parameter = next(iter(trainer.model.named_parameters()))
    history, expected = [], parameter.detach().clone()
    original = trainer.teacher.update

    def update(model, momentum):
        history.append(dict(model.named_parameters())[name].detach().clone())
        original(model, momentum)

    trainer.teacher.update = update
    trainer.train()
    assert len(history) == 3 and not torch.equal(history[0], history[2])
    for value in history:
        expected = 0.75 * expected + 0.25 * value
    torch.testing.assert_close(dict(trainer.teacher.model.named_parameters())[name], expected)


def test_the_teacher_gains_weight_over_an_epoch(processor, tmp_path):
    trainer = make_trainer(processor, tmp_path, max_steps=1, gradient_accumulation_steps=2)
    assert trainer.epoch_steps == 3  # 20 rows in batches of 4, two of which are a step

    def weights() -> list[float]:
        found = []
        for trainer.state.global_step in range(7):
            found.append(trainer.current_teacher_weight())
        return found

    assert weights() == pytest.approx([0, 0.4 / 3, 0.8 / 3, 0.4, 0.4, 0.4, 0.4])
    trainer.args.teacher_start_steps, trainer.args.teacher_ramp_steps = None, 2
    assert weights() == pytest.approx([0, 0, 0, 0, 0.2, 0.4, 0.4])
    trainer.args.teacher_ramp_steps = 0
    assert weights() == pytest.approx([0, 0, 0, 0.4, 0.4, 0.4, 0.4])


def test_a_teacher_that_has_yet_to_take_part_is_the_model(processor, tmp_path):
    options = {"max_steps": 3, "save_strategy": "no", "warmup_steps": 0, "teacher_start_steps": 2}
    trainer = make_trainer(processor, tmp_path, **options)
    seen, forward = [], trainer.teacher.forward

    def watched(*args):
        weights = zip(trainer.teacher.model.parameters(), trainer.model.parameters())
        seen.append((trainer.state.global_step, all(torch.equal(*pair) for pair in weights)))
        return forward(*args)

    trainer.teacher.forward = watched
    trainer.train()
    assert seen == [(2, True)]  # it was asked in the third step alone
    assert not torch.equal(trainer.teacher.model.itm_head.weight, trainer.model.itm_head.weight)
    assert (trainer.teacher.texts.ids != -1).sum() == 4


def test_the_vision_tower_has_a_learning_rate_of_its_own(processor, tmp_path):
    trainer = make_trainer(processor, tmp_path, max_steps=1, learning_rate=1e-4, vision_learning_rate=1e-5)
    optimizer = trainer.create_optimizer()
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    rates, decays = {}, {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names.pop(id(parameter))  # each is in one group
            rates[name], decays[name] = group["lr"], group["weight_decay"]
    assert not names
    assert all(rate == (1e-5 if "vision_model." in name else 1e-4) for name, rate in rates.items())
    plain = make_trainer(processor, tmp_path, max_steps=1)
    names = {id(parameter): name for name, parameter in plain.model.named_parameters()}
    for group in plain.create_optimizer().param_groups:
        for parameter in group["params"]:
            assert decays[names[id(parameter)]] == group["weight_decay"] and group["lr"] == plain.args.learning_rate


def test_the_queue_holds_a_tenth_of_the_captions_and_at_least_a_batch(processor, tmp_path):
    trainer = make_trainer(processor, tmp_path, max_steps=1, queue_size=None)
    assert trainer.queue_size == len(trainer.teacher.images.ids) == 4
    trainer.train_dataset = range(300)
    assert trainer.queue_size == 30
    trainer.train_dataset = range(4_000_000)
    assert trainer.queue_size == 65536


@pytest.mark.parametrize("off", ["itc_weight", "prefix_lm_weight"])
def test_parameters_of_objectives_that_are_off_are_frozen(processor, tmp_path, off):
    options = {"max_steps": 1, "warmup_steps": 0, "save_strategy": "no"}
    trainer = make_trainer(processor, tmp_path, config_fields={off: 0.0}, **options)
    frozen = {name for name, parameter in trainer.model.named_parameters() if not parameter.requires_grad}
    start = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    same = {name for name, value in trainer.model.named_parameters() if torch.equal(value, start[name])}
    assert frozen and frozen == same


def test_each_objective_is_logged(processor, tmp_path):
    trainer = make_trainer(processor, tmp_path, max_steps=4, logging_steps=2, save_strategy="no")
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2
    for entry in logs:
        parts = [entry[name] for name in ("itc_loss", "itm_loss", "mlm_loss", "prefix_lm_loss")]
        assert sum(parts) == pytest.approx(entry["loss"], rel=1e-3)
        assert entry["teacher_weight"] == pytest.approx(0.4 * min(1, entry["step"] / 5))


def test_without_a_teacher_there_is_no_file_of_it(processor, tmp_path):
    trainer = make_trainer(processor, tmp_path, max_steps=1, save_steps=1, momentum_teacher=False)
    trainer.train()
    assert trainer.teacher is None and not list(tmp_path.rglob("momentum.safetensors"))
    only_matching = {"itc_weight": 0.0, "mlm_weight": 0.0}
    assert make_trainer(processor, tmp_path, max_steps=1, config_fields=only_matching).teacher is None


# ---------------------------------------------------------------------------------------------------------------------
# The script


@pytest.mark.slow
def test_learns_the_toy_data_and_leaves_a_model_for_other_scripts(files, tmp_path):
    metrics = run_pretraining.main(
        command(files, tmp_path, "--max_steps=100", "--per_device_train_batch_size=18", "--save_steps=50")[1:]
    )
    chance = {"features_i2t_r1": 1 / 6, "features_t2i_r1": 1 / 6, "itm_accuracy": 0.5}
    assert metrics["eval_chance_r1"] == pytest.approx(1 / 6)
    for name, value in chance.items():
        assert metrics[f"eval_{name}"] > value + 0.3, (name, metrics)
    for name in ("mlm", "prefix_lm"):
        assert metrics[f"eval_{name}_accuracy"] > metrics[f"eval_{name}_majority"] + 0.2, metrics
    assert json.loads((tmp_path / "eval_results.json").read_text())["eval_samples"] == 18

    # The teacher and its queues are in the checkpoints, not in the model that is published.
    assert {path.parent.name for path in tmp_path.rglob("momentum*.safetensors")} == {
        "checkpoint-50",
        "checkpoint-100",
    }
    assert (
        load_file(tmp_path / "model.safetensors").keys()
        == load_file(tmp_path / "checkpoint-100/model.safetensors").keys()
    )
    processor = TripsProcessor.from_pretrained(tmp_path)
    model, info = TripsForRetrieval.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    image = PIL.Image.new("RGB", (64, 64), "green")
    texts = [CAPTIONS[0].format(color) for color in COLORS]
    inputs = processor(images=image, text=texts, image_index=[0] * 6, return_tensors="pt")
    inputs.pop("image_index")
    assert model.eval()(**inputs).logits_per_image.argmax() == COLORS.index("green")


def test_a_stream_of_shards(stream, folder, tmp_path):
    validation = [f"--validation_file={folder / 'pairs.jsonl'}", "--do_eval=True"]
    options = ["--max_steps=4", "--save_steps=2", "--logging_steps=2", "--prefix_lm_weight=0", "--itm_weight=0.5"]
    options += ["--teacher_start_steps=0"]
    metrics = run_pretraining.main(command(stream, tmp_path, *validation, *options)[1:])
    assert "eval_itm_accuracy" in metrics and "eval_prefix_lm_accuracy" not in metrics
    config = TripsForPreTraining.from_pretrained(tmp_path).config
    assert (config.itc_weight, config.itm_weight, config.prefix_lm_weight) == (1.0, 0.5, 0.0)
    state = json.loads((tmp_path / "checkpoint-4/stream_0.json").read_text())
    assert state["num_batches"] == 4 and [position["seen"] for position in state["positions"]] == [24]
    log = json.loads((tmp_path / "checkpoint-4/trainer_state.json").read_text())["log_history"]
    assert [entry["pairs"] for entry in log if "loss" in entry] == [12, 24]
    # The queue knows the images of a stream by their addresses.
    teacher = load_file(tmp_path / "checkpoint-4/momentum.safetensors")
    assert set(teacher["texts.ids"].tolist()) == {-1, *map(number_of, COLORS)}


def test_from_a_vision_tower_and_a_text_encoder(files, parts, tmp_path):
    options = ["--selection_layers", "2", "--keep_rate", "0.5", "--image_size=48", "--max_steps=1"]
    options += ["--learning_rate=0", "--attn_implementation=eager"]
    run_pretraining.main(command(files, tmp_path / "out", *parts, *options, "--save_strategy=no")[1:])
    model = TripsForPreTraining.from_pretrained(tmp_path / "out")
    vision, text = (AutoModel.from_pretrained(option.partition("=")[2]) for option in parts)
    words = text.embeddings.word_embeddings.weight
    assert torch.equal(model.model.vision_model.embeddings.cls_token, vision.embeddings.cls_token)
    assert torch.equal(model.model.text_model.embeddings.word_embeddings.weight, words)
    assert torch.equal(model.lm_head.decoder.weight, words)
    assert model.config.vision_config.selection_schedule == {2: 0.5} and model.config.vision_config.image_size == 48
    processor = TripsProcessor.from_pretrained(tmp_path / "out")
    assert processor.image_processor.image_mean == (0.1, 0.2, 0.3)
    assert processor.image_processor.size == {"height": 48, "width": 48}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--train_shards=a.tar"], "no end: say with --max_steps"),
        (["--train_shards=a.tar", "--max_steps=1"], "nothing to evaluate on: give --validation_file"),
        (["--train_shards=a.tar", "--max_steps=1", "--do_eval=False"], "no files a.tar: mend --train_shards"),
        (["--train_shards=a.tar", "--train_file=b.jsonl"], "leave --train_file and --streaming out"),
        (["--streaming"], "give --dataset_name"),
        (["--vision_model_name_or_path=a"], "go together: give both"),
        (["--vision_model_name_or_path=a", "--text_model_name_or_path=b", "--model_name_or_path=c"], "a whole model"),
        (["--momentum=1.5"], r"--momentum must be in \[0, 1\]"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run_pretraining.main([*options, f"--output_dir={tmp_path}"])


def test_something_has_to_be_learnt_and_a_stream_needs_a_tokenizer(files, stream, tmp_path):
    off = [f"--{name}=0" for name in run_pretraining.OBJECTIVES]
    with pytest.raises(ValueError, match="nothing to learn: give one of itc_weight"):
        run_pretraining.main(command(files, tmp_path, *off)[1:])
    without = [option for option in stream if "tokenizer" not in option]
    with pytest.raises(ValueError, match="give --tokenizer_name"):
        run_pretraining.main(command(without, tmp_path, "--max_steps=1")[1:])


def test_help_explains_each_option():
    output = run(SCRIPT, "--help")
    for option in ("--train_shards", "--queue_size", "--vision_learning_rate", "--mlm_weight", "--teacher_ramp_steps"):
        assert option in output


# ---------------------------------------------------------------------------------------------------------------------
# Kills and processes


# Any free port.
RENDEZVOUS = ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
TWO_PROCESSES = ["-m", "torch.distributed.run", "--nproc_per_node=2", *RENDEZVOUS]


def killed_and_resumed(words: list[str], folder: Path) -> str:
    """Kills a run with its workers after its first whole checkpoint, resumes it, and returns what that printed."""
    process = subprocess.Popen([sys.executable, *words], env=environment(), stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not (folder / "checkpoint-4/trainer_state.json").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    # torchrun gives its processes sessions of their own: they do not die with it.
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:
        member.kill()
    psutil.wait_procs(family)
    assert not (folder / "model.safetensors").exists()
    return run(*words, "--resume_from_checkpoint=last")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "launch", "options"),
    [
        ("files", [], []),
        ("files", TWO_PROCESSES, ["--per_device_train_batch_size=3", "--ddp_find_unused_parameters=False"]),
        ("stream", [], ["--dataloader_num_workers=2"]),
        ("stream", TWO_PROCESSES, ["--per_device_train_batch_size=3", "--ddp_find_unused_parameters=False"]),
    ],
    ids=["files", "files in two processes", "stream with two workers", "stream in two processes"],
)
def test_killed_and_resumed_ends_as_a_run_left_alone(source, launch, options, request, tmp_path):
    """Weights, the teacher's weights and its queues; masks, cuts and hard negatives are drawn in between."""
    data = request.getfixturevalue(source)
    options = [*options, "--max_steps=12", "--save_steps=4", "--do_eval=False", "--logging_steps=1"]
    run(*launch, *command(data, tmp_path / "alone", *options))
    printed = killed_and_resumed([*launch, *command(data, tmp_path / "killed", *options)], tmp_path / "killed")
    assert 0 < printed.count("'loss'") <= 8  # it went on, and did not begin again
    last = ("model.safetensors", "checkpoint-12/model.safetensors", "checkpoint-12/momentum.safetensors")
    assert_equal(tmp_path / "killed", tmp_path / "alone", *last)
    queue = load_file(tmp_path / "alone" / last[-1])["texts.ids"]
    assert (queue != -1).all()  # 72 texts went through a queue of 40


@pytest.mark.slow
def test_two_processes_evaluate_as_one(files, tmp_path):
    """18 captions in batches of 3: one that is filled up for the last process would draw other masks."""
    run_pretraining.main(command(files, tmp_path / "model", "--max_steps=1", "--do_eval=False")[1:])
    options = [f"--model_name_or_path={tmp_path / 'model'}", "--do_train=False", "--per_device_eval_batch_size=3"]
    one = run_pretraining.main(command(files, tmp_path / "one", *options)[1:])
    run(*TWO_PROCESSES, *command(files, tmp_path / "two", *options))
    two = json.loads((tmp_path / "two/eval_results.json").read_text())
    assert one.keys() == two.keys() and "eval_itm_accuracy" in one and "eval_features_i2t_r1" in one
    two.pop("epoch"), one.pop("epoch")
    assert two == pytest.approx(one)


STAND_INS = {
    "scontrol": "echo 127.0.0.1",
    "srun": """pids=()
for node in 0 1; do
    SLURM_NODEID=$node "$@" & pids+=($!)
done
for pid in "${pids[@]}"; do wait "$pid"; done""",
}


@pytest.mark.slow
def test_the_slurm_script_trains_on_two_nodes(folder, parts, tmp_path):
    """Two "nodes" on this machine, with stand-ins for SLURM's commands; its other options are those of the script."""
    for name, code in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\nset -e\n{code}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_ID": "9725"}
    slurm |= {"SLURM_CPUS_PER_TASK": "1", "DATA": str(folder)}
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    options = [f"--train_shards={folder}/pairs-{{0..2}}.tar", "--shuffle_buffer=4", *parts, "--image_size=32"]
    options += ["--selection_layers", "2", "--max_steps=2", "--warmup_steps=0", "--per_device_train_batch_size=3"]
    options += ["--dataloader_num_workers=0", "--use_cpu=True", "--auto_bf16=False", "--logging_steps=1"]
    script = ROOT / "examples/configs/slurm_multi_node.sh"
    for step in (2, 4):  # the second time it goes on
        result = subprocess.run(
            ["bash", script, *options, f"--max_steps={step}", "--save_steps=2", "--disable_tqdm=True"],
            cwd=ROOT,
            env={**environment(), **slurm, "PATH": path, "OUTPUT_DIR": str(tmp_path / "out"), "GPUS_PER_NODE": "1"},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr[-5000:]
        assert result.stdout.count("'loss'") == 4  # each node says it
    states = [json.loads((tmp_path / f"out/checkpoint-4/stream_{rank}.json").read_text()) for rank in (0, 1)]
    assert [state["num_processes"] for state in states] == [2, 2]
    assert [position["seen"] for state in states for position in state["positions"]] == [12, 12]


@pytest.mark.slow
def test_queues_hold_what_all_processes_saw(files, tmp_path):
    """One step of two processes with three texts each leaves the queues that one process with all six leaves."""
    # No augmentation, dropout or hard negatives: nothing is drawn but the order, which is the same.
    options = ["--max_steps=1", "--save_steps=1", "--do_eval=False", "--itm_weight=0", "--mlm_weight=0"]
    options += ["--teacher_start_steps=0"]
    run_pretraining.main(command(files, tmp_path / "one", *options)[1:])
    halves = ["--per_device_train_batch_size=3", "--ddp_find_unused_parameters=False"]
    run(*TWO_PROCESSES, *command(files, tmp_path / "two", *options, *halves))
    for part in ("images", "texts"):
        found = []
        for name in ("one", "two"):
            queue = load_file(tmp_path / name / "checkpoint-1/momentum.safetensors")
            ids, features = queue[f"{part}.ids"], queue[f"{part}.features"]
            pairs = sorted(zip(ids.tolist(), features[:, 0].tolist()))[-int((ids != -1).sum()) :]
            # Processes that have the same image bring one each.
            found.append(sorted(dict(pairs).items()) if part == "images" else pairs)
        assert len(found[0]) > 1 and [image for image, _ in found[0]] == [image for image, _ in found[1]]
        assert [value for _, value in found[0]] == pytest.approx([value for _, value in found[1]], abs=1e-4)


@pytest.mark.slow
def test_a_whole_teacher_follows_a_model_that_fsdp_shards(files, tmp_path):
    options = ["--max_steps=1", "--do_eval=False", "--warmup_steps=0", "--momentum=0.25", "--save_steps=1"]
    run_pretraining.main(command(files, tmp_path / "start", *options, "--learning_rate=0")[1:])
    launch = ["-m", "accelerate.commands.launch", f"--config_file={ROOT / 'examples/configs/fsdp2.yaml'}"]
    launch += ["--num_processes=2", "--main_process_port=0", str(ROOT / "tests/fsdp_on_cpu.py")]
    options += [f"--model_name_or_path={tmp_path / 'start'}", "--per_device_train_batch_size=3", "--use_cpu=True"]
    run(*launch, *command(files, tmp_path / "out", *options))
    start, end = (load_file(tmp_path / name / "model.safetensors") for name in ("start", "out"))
    teacher = load_file(tmp_path / "out/checkpoint-1/momentum.safetensors")
    assert not torch.equal(start["itm_head.weight"], end["itm_head.weight"])
    names = [name for name in start if f"model.{name}" in teacher and not name.endswith("num_batches_tracked")]
    assert len(names) > 50
    for name in names:
        is_statistic = name.rpartition(".")[2].startswith("running_")  # copied, not averaged
        expected = end[name] if is_statistic else 0.25 * start[name] + 0.75 * end[name]
        torch.testing.assert_close(teacher[f"model.{name}"], expected, rtol=1e-4, atol=1e-5, msg=name)
