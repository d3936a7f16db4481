"""The names users type: Auto classes with the project imported, and remote code where it is not imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from example_datasets import train_wordpiece_tokenizer
from example_training import make_processor
from transformers import AutoConfig, AutoModel, AutoModelForVisualQuestionAnswering, AutoProcessor

from modeling_trips import TripsConfig, TripsForQuestionAnswering, TripsModel, TripsProcessor, TripsVisionModel


QUESTION = "what color is it?"
REMOTE = """
import sys, torch
from transformers import AutoConfig, AutoModelForVisualQuestionAnswering, AutoProcessor
folder, inputs = sys.argv[1:]
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForVisualQuestionAnswering.from_pretrained(folder, trust_remote_code=True).eval()
assert AutoConfig.from_pretrained(folder, trust_remote_code=True).keep_rate == 0.5
assert not any(name.split(".")[0] == "modeling_trips" for name in sys.modules)
inputs = torch.load(inputs, weights_only=True)
again = processor(images=torch.zeros(3, 64, 64), text="what color is it?", return_tensors="pt")
assert torch.equal(again["input_ids"], inputs["input_ids"])
torch.save(model(**inputs).logits, folder + "/logits.pt")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    tokenizer = train_wordpiece_tokenizer([QUESTION, "red blue yes no"])
    config = TripsConfig.from_preset("tiny", text_config={"vocab_size": len(tokenizer)})
    TripsForQuestionAnswering(config).save_pretrained(path)
    make_processor(tokenizer, config).save_pretrained(path)
    return path


def test_auto_classes_know_the_project(folder):
    assert type(AutoConfig.from_pretrained(folder)) is TripsConfig
    assert type(AutoProcessor.from_pretrained(folder)) is TripsProcessor
    assert type(AutoModel.from_pretrained(folder)) is TripsModel
    model = AutoModelForVisualQuestionAnswering.from_pretrained(folder)
    assert type(model) is TripsForQuestionAnswering
    assert type(AutoModel.from_config(model.config.vision_config)) is TripsVisionModel


def test_a_checkpoint_brings_its_own_code(folder, tmp_path):
    model, processor = TripsForQuestionAnswering.from_pretrained(folder), TripsProcessor.from_pretrained(folder)
    inputs = processor(images=torch.zeros(3, 64, 64), text=QUESTION, return_tensors="pt")
    inputs = {**inputs, "decoder_input_ids": torch.tensor([[2, 5]])}
    torch.save(inputs, tmp_path / "inputs.pt")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["HF_HOME"] = str(tmp_path)  # a fresh cache of remote code
    command = [sys.executable, "-c", REMOTE, str(folder), str(tmp_path / "inputs.pt")]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    with torch.no_grad():
        assert torch.equal(torch.load(folder / "logits.pt", weights_only=True), model(**inputs).logits)
