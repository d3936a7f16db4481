"""
The README's commands in a fresh environment: from a clone to an answer, to training on your own data, to a published
model. The Hub is local, and the pretrained towers are small ones with random weights.
"""

import json
import os
import re
import shutil
import sysconfig

import pytest
from documents import README
from loopback_hub import LoopbackHub
from PIL import Image
from places import ROOT
from programs import output_of
from transformers import BertConfig, BertModel, BertTokenizer, BitImageProcessor, Dinov2Config, Dinov2Model


PUBLISH = "hf auth login && python examples/push_to_hub.py --model mine --repo_id ada/mine"
ANSWER = """python -c "from transformers import pipeline
answerer = pipeline('visual-question-answering', model='ada/mine', trust_remote_code=True)
print(answerer(image='images/1.png', question='what is it?'))"
"""


def path_of_the_readme():
    """Return the commands: install, check, train, look at what would be sent; then publish and answer."""
    (install,) = [span for span in README.code_spans if "venv" in span]
    (block,) = [block for block in README.blocks("bash") if "push_to_hub" in block]
    return [install, *(line.partition("  #")[0] for line in block.splitlines()), PUBLISH, ANSWER]


@pytest.fixture
def clone(tmp_path):
    """Return a copy of the repository with the user's images, questions and answers."""
    clone = tmp_path / "clone"
    left_out = shutil.ignore_patterns(".git", ".venv", "build", "outputs", "demo", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, clone, ignore=left_out)
    (clone / "images").mkdir()
    row = json.loads(re.search(r"`(\{\"image\".*?\})`", README.text)[1])  # as the README says that they look
    lines = []
    for number, color in enumerate(("red", "green", "blue"), start=1):
        path = f"images/{number}.png"
        Image.new("RGB", (48, 36), color).save(clone / path)
        line = json.dumps({**row, "image": path, "answer": color})
        lines.append(line + "\n")
    for split in ("train", "val"):
        (clone / f"{split}.jsonl").write_text("".join(lines))
    write_towers(clone / "towers")
    return clone


def write_towers(folder):
    """Write small models with random weights where `make_towers.py` writes the pretrained ones."""
    vision = Dinov2Config(
        hidden_size=32,
        num_attention_heads=2,
        num_hidden_layers=12,
        mlp_ratio=2,
        patch_size=14,
        image_size=42,
    )
    Dinov2Model(vision).save_pretrained(folder / "dinov2-small")
    BitImageProcessor().save_pretrained(folder / "dinov2-small")

    words = "[PAD] [UNK] [CLS] [SEP] [MASK] what is it ? red green blue".split()
    vocab = {word: number for number, word in enumerate(words)}
    text = BertConfig(
        hidden_size=32,
        num_attention_heads=2,
        num_hidden_layers=2,
        intermediate_size=64,
        vocab_size=len(vocab),
    )
    BertModel(text).save_pretrained(folder / "minilm")
    BertTokenizer(vocab=vocab).save_pretrained(folder / "minilm")


@pytest.mark.slow
def test_the_readmes_commands_lead_to_a_published_model(clone, tmp_path):
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_", "VIRTUAL"))
    }
    # The dependencies are installed already, but the project is not visible in the new environment.
    environment |= {"PYTHONPATH": sysconfig.get_path("purelib"), "PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0"}
    environment |= {"OMP_NUM_THREADS": "1", "HF_DATASETS_OFFLINE": "1"}
    environment["PATH"] += os.pathsep + sysconfig.get_path("scripts")  # `hf`, which comes with what is there already
    with LoopbackHub() as hub:
        environment |= hub.client_environment(tmp_path / "home")
        output = {}
        for command in path_of_the_readme():
            activate = "" if "activate" in command else ". .venv/bin/activate && "
            output[command] = output_of("bash", "-c", f"{activate}{command}", cwd=clone, env=environment)
    assert {"model.safetensors", "config.json", "README.md"} <= hub.repositories["ada/mine"].files.keys()
    assert "'answer': " in output[ANSWER]  # loaded from the Hub, with its code
