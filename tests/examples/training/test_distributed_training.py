"""Training in several processes with each configuration of examples/configs gives the weights of one process."""

import re
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from clean_environment import make_environment
from json_files import read_json
from loading import read, write
from PIL import Image
from places import HELPERS, ROOT
from programs import output_of
from random_checkpoint import save_random_checkpoint
from safetensors.torch import load_file
from tiny_models import CASES, each_model
from torch.testing import assert_close
from toy_tasks import OPTIONS, write_task
from transformers.modeling_layers import GradientCheckpointingLayer

from modeling_trips import TripsForQuestionAnswering
from trips_examples import run_vqa


CONFIGS = ROOT / "examples" / "configs"


def load_config(name):
    return load_config_from_file(str(CONFIGS / f"{name}.yaml"))


def launch(name, *command, python=sys.executable):
    """Launch two CPU processes with a configuration from examples/configs, and return their output."""
    shim = [str(HELPERS / "fsdp_on_cpu.py")] if name == "fsdp2" else []
    options = [f"--config_file={CONFIGS / name}.yaml", "--num_processes=2", "--main_process_port=0"]
    launcher = [python, "-m", "accelerate.commands.launch", *options, *shim]
    return output_of(*launcher, *command, variables={"OMP_NUM_THREADS": "1"})


# ---------------------------------------------------------------------------------------------------------------------
# The files


def layers_to_wrap(case):
    """Return the layer names in fsdp2.yaml, or those that it adds on the command line for this case."""
    if case.fusion_type == "single_stream":
        said = re.search(r"--fsdp_transformer_layer_cls_to_wrap (\S+)", (CONFIGS / "fsdp2.yaml").read_text())
        return said[1].split(",")
    return load_config("fsdp2").fsdp_config["fsdp_transformer_layer_cls_to_wrap"].split(",")


@each_model
def test_fsdp_shards_only_layers(case):
    modules = list(case.make_model().modules())
    classes = {type(module).__name__: type(module) for module in modules}
    wrapped = tuple(classes[name] for name in layers_to_wrap(case))  # Accelerate refuses unknown names
    layers = [module for module in modules if isinstance(module, GradientCheckpointingLayer)]
    assert [module for module in modules if isinstance(module, wrapped)] == layers


# ---------------------------------------------------------------------------------------------------------------------
# Training


@pytest.mark.slow
@pytest.mark.parametrize("name, prefix", [("ddp", "DistributedDataParallel"), ("fsdp2", "FSDPTrips")])
def test_two_processes_train_every_model_as_one(name, prefix):
    """DDP does not look for unused parameters, so that a missing gradient would be an error."""
    printed = [line for line in launch(name, str(HELPERS / "train_cases.py")).splitlines() if line.startswith(prefix)]
    assert len(printed) == len(CASES)


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """Return options of run_vqa.py: two images with three questions each, and an untrained start model."""
    folder = tmp_path_factory.mktemp("data")
    rows = []
    for color in ("red", "blue"):
        Image.new("RGB", (64, 64), color).save(folder / f"{color}.png")
        rows.append({"image": f"{color}.png", "question": "what color is it?", "answer": color})
        rows.append({"image": f"{color}.png", "question": "is it red?", "answer": "yes" if color == "red" else "no"})
        rows.append({"image": f"{color}.png", "question": "is it blue?", "answer": "no" if color == "red" else "yes"})
    file = write(folder / "rows.jsonl", rows)
    texts = [f"{row['question']} {row['answer']}" for row in rows]
    # No BatchNorm, whose statistics differ between processes; a projection that unpruned steps do not use.
    vision = {"patch_embedding_type": "linear", "hidden_size": 32}
    fields = {"vision_config": vision, "initializer_range": 0.02}
    save_random_checkpoint(folder / "model", TripsForQuestionAnswering, texts, **fields)
    return [
        f"--model={folder / 'model'}",
        f"--train_file={file}",
        f"--validation_file={file}",
        "--max_steps=6",
        "--lr_scheduler_type=constant",
        "--bf16=False",
        "--adam_epsilon=1e-4",  # AdamW would amplify the rounding errors of zero gradients
        "--use_cpu=True",
        "--unpruned_share=0.5",
        "--activation_checkpointing=True",
        "--save_strategy=no",
        "--disable_tqdm=True",
    ]


@pytest.fixture(scope="module")
def one_process(options, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    run_vqa.main([*options, f"--output_dir={folder}", "--per_device_train_batch_size=6"])
    return folder


@pytest.fixture(scope="module")
def deepspeed_python():
    """Return an environment with DeepSpeed, because Accelerate imports it wherever it is installed."""
    return make_environment(ROOT / "build" / "deepspeed", ["deepspeed"], exclude_project=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["ddp", "fsdp2", *(pytest.param(name, marks=pytest.mark.release) for name in ("zero2", "zero3"))]
)
def test_two_processes_match_one_in_run_vqa(name, options, one_process, tmp_path, request):
    python = request.getfixturevalue("deepspeed_python") if name.startswith("zero") else sys.executable
    words = [*options, f"--output_dir={tmp_path}", "--per_device_train_batch_size=3"]
    launch(name, str(ROOT / "examples" / "run_vqa.py"), *words, python=python)
    weights, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path, one_process))
    start = load_file(Path(options[0].partition("=")[2]) / "model.safetensors")
    for key, weight in expected.items():
        assert not torch.equal(weight, start[key]), key
        assert_close(weights[key], weight, rtol=1e-4, atol=1e-5, msg=key)
    assert (tmp_path / "predictions.jsonl").read_text() == (one_process / "predictions.jsonl").read_text()
    # The checkpoint has the code of its class, also after wrapping.
    code = {path.name for path in one_process.glob("*.py")}
    assert code and code == {path.name for path in tmp_path.glob("*.py")}
    config, expected_config = (read_json(folder / "config.json") for folder in (tmp_path, one_process))
    for field in ("architectures", "auto_map", "custom_pipelines"):
        assert config[field] == expected_config[field]


@pytest.mark.slow
def test_a_process_without_regions_logs_the_losses_of_the_others(tmp_path):
    files = write_task("vqa", tmp_path)
    rows = read(tmp_path / "rows.jsonl")
    write(tmp_path / "rows.jsonl", [{**rows[0], "region": [8, 8, 24, 24]}, *rows[1:]])
    options = [*OPTIONS, "--per_device_train_batch_size=1", "--max_steps=4", "--logging_steps=1", "--do_eval=False"]
    options.append(f"--output_dir={tmp_path / 'run'}")
    launch("ddp", str(ROOT / "examples" / "run_vqa.py"), *files, *options)
    history = read_json(tmp_path / "run" / "trainer_state.json")["log_history"]
    assert any("selection_loss" in entry for entry in history)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_processes_resume_before_relevance_and_pruning_begin(name, options, tmp_path):
    """
    Scores learn in the last of three unpruned steps and in the pruned ones. A frozen layer is trained from then on,
    and does not decay before. The weights are those of one process.
    """
    script, saves = str(ROOT / "examples" / "run_vqa.py"), ["--save_strategy=steps", "--save_steps=2"]
    relevance = ["--schedule=2:text:0.5", "--relevance_share=0.34"]
    words = [*options, *relevance, "--freeze_vision_layers=2", "--weight_decay=1", "--do_eval=False"]
    run_vqa.main([*words, f"--output_dir={tmp_path / 'one'}", "--per_device_train_batch_size=6"])
    words += [*saves, "--save_total_limit=3", f"--output_dir={tmp_path}", "--per_device_train_batch_size=3"]
    launch(name, script, *words)
    expected = load_file(tmp_path / "model.safetensors")
    for key, weight in load_file(tmp_path / "one" / "model.safetensors").items():
        assert_close(expected[key], weight, rtol=1e-4, atol=1e-5, msg=key)
    launch(name, script, *words, f"--resume_from_checkpoint={tmp_path / 'checkpoint-2'}")
    weights = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(weights[key], weight) for key, weight in expected.items())


@pytest.mark.slow
def test_fsdp_resumes_what_learns_nothing(options, tmp_path):
    """The projection of a text that scores no layer."""
    words = [*options, "--schedule=2:image:0.5", "--unpruned_share=0", "--relevance_share=0", "--weight_decay=1"]
    words += ["--do_eval=False", "--save_strategy=steps", "--save_steps=3", "--save_total_limit=3"]
    words += ["--per_device_train_batch_size=3", f"--output_dir={tmp_path}"]
    script = str(ROOT / "examples" / "run_vqa.py")
    launch("fsdp2", script, *words)
    expected = load_file(tmp_path / "model.safetensors")
    launch("fsdp2", script, *words, f"--resume_from_checkpoint={tmp_path / 'checkpoint-3'}")
    weights = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(weights[key], weight) for key, weight in expected.items())
    start = load_file(Path(options[0].partition("=")[2]) / "model.safetensors")
    unused = [key for key in start if "selection_projection" in key]
    assert unused and all(torch.equal(start[key], expected[key]) for key in unused)
