"""Checkpoints of strangers are refused before they take memory or time."""

import base64
import json
import os
import shutil
import socket
import subprocess
import sys
import time

import pytest
import torch
from json_files import read_json
from loopback_hub import LoopbackHub, Repository
from random_checkpoint import save_random_checkpoint
from safetensors.torch import load_file, save_file

from modeling_trips import TripsForQuestionAnswering, TripsModel
from modeling_trips.inspection.checkpoints import load_checkpoint, load_processor


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_random_checkpoint(tmp_path_factory.mktemp("model"), TripsForQuestionAnswering, ["what is it?"])


@pytest.mark.parametrize(
    "field, value",
    [
        ("size", {"height": 40_000, "width": 40_000}),
        ("size", {"shortest_edge": 10**6}),
        ("crop_size", {"height": 10**5, "width": 10**5}),
    ],
)
def test_images_larger_than_the_model_s_are_refused(saved, tmp_path, field, value):
    config = load_checkpoint(saved).config
    load_processor(saved, config)
    folder = shutil.copytree(saved, tmp_path / "model")
    edit("processor_config.json", **{f"image_processor__{field}": value})(folder)
    with pytest.raises(ValueError, match=field):
        load_processor(folder, config)


NAME = "decoder.embeddings.LayerNorm.weight"
KERNEL = "kernels-community/flash"


def edit(name, **fields):
    """Return a function that sets fields of a JSON file of a folder; `part__field` is a field of a part."""

    def write(folder):
        path = folder / name
        content = read_json(path) if path.exists() else {}
        for field, value in fields.items():
            part, is_nested, own = field.partition("__")
            (content[part] if is_nested else content)[own if is_nested else field] = value
        path.write_text(json.dumps(content))

    return write


def put(name, content):
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def change_weights(function, name=None):
    """Return a function that changes one stored weight, or all floating-point ones."""

    def write(folder):
        path = folder / "model.safetensors"
        weights = load_file(path)
        for key, tensor in weights.items():
            if key == name or name is None and tensor.is_floating_point():
                weights[key] = function(tensor)
        save_file(weights, path, {"format": "pt"})

    return write


def as_index(content):
    """Return a function that puts an index in the place of the weights."""

    def write(folder):
        (folder / "model.safetensors").rename(folder / "one.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))

    return write


def cut_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])


def deep(depth):
    return '{"a":' * depth + "1" + "}" * depth


LARGE = [  # more than the weights, or than there is time for: a file, a field and its value
    ("config.json", "vision_config__num_hidden_layers", 3000),
    ("config.json", "decoder_config__num_hidden_layers", 10**5),
    ("config.json", "vision_config__intermediate_size", 2**40),
    ("config.json", "num_labels", 10**7),
    ("config.json", "num_images", 10**6),
    ("config.json", "vision_config__schedule", ",".join(map(str, range(1, 10**6)))),
    ("config.json", "vision_config__hidden_size", 10**12),
    ("generation_config.json", "num_beams", 10**5),
    ("generation_config.json", "num_beams", "9"),
    ("generation_config.json", "num_beams", float("nan")),
]
DAMAGES = {  # a change of a folder, and a part of the message
    **{f"{field}={value!s:.9}": (edit(name, **{field: value}), field.split("__")[-1]) for name, field, value in LARGE},
    "adapter": (edit("adapter_config.json", peft_type="LORA", r=10**7), "adapter_config"),
    "empty weights": (put("model.safetensors", b""), "model.safetensors"),
    "cut weights": (cut_weights, "model.safetensors"),
    "a pickle for weights": (put("model.safetensors", b"\x80\x04N."), "model.safetensors"),
    "an index that is a list": (as_index([]), "index.json"),
    "an index without files": (as_index({"metadata": {}}), "index.json"),
    "an index of other files": (as_index({"metadata": {}, "weight_map": {"a": "config.json"}}), "config.json"),
    "another shape": (change_weights(lambda tensor: tensor[:3].clone(), NAME), NAME),
    "bool": (change_weights(lambda tensor: tensor > 0), "BOOL"),
    "int64": (change_weights(torch.Tensor.long), "I64"),
    "complex64": (change_weights(lambda tensor: tensor.to(torch.complex64), NAME), NAME),
    "config a list": (put("config.json", "[1, 2]"), "config.json"),
    "deep config": (put("config.json", deep(10**5)), "config.json"),
    "deep generation config": (put("generation_config.json", deep(10**5)), "generation_config.json"),
    "architectures a dict": (edit("config.json", architectures={"a": 1}), "cannot be read"),
    "model_type a list": (edit("config.json", model_type=[1]), "cannot be read"),
    "dtype": (edit("config.json", dtype="load"), "cannot be read"),
    "a long value": (edit("config.json", vision_config__schedule="x" * 10**7), "cannot be read"),
    "many fields": (edit("config.json", **{f"k{number}": number for number in range(10**5)}), "fields"),
    "a method": (edit("config.json", to_dict="x"), "to_dict"),
    "a class": (edit("config.json", vision_config____class__="x"), "__class__"),
    "no heads": (edit("config.json", vision_config__num_attention_heads=0), "cannot be read"),
    "another file of weights": (edit("config.json", transformers_weights="adapter_model.bin"), "transformers_weights"),
    "attention of the Hub": (edit("config.json", attn_implementation=KERNEL), "attn_implementation"),
    "attention of a part": (edit("config.json", vision_config___attn_implementation=KERNEL), "_attn_implementation"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_and_hostile_folders_are_refused_with_a_short_message(saved, tmp_path, name):
    folder = shutil.copytree(saved, tmp_path / "model")
    damage, part = DAMAGES[name]
    damage(folder)
    with pytest.raises(ValueError, match=part) as refused:
        load_checkpoint(folder)
    assert len(str(refused.value)) < 1000
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("field", ["attn_implementation", "vision_config__attn_implementation"])
def test_a_stored_attention_of_the_hub_is_refused_without_this_package_s_tools(saved, tmp_path, field):
    folder = shutil.copytree(saved, tmp_path / "model")
    edit("config.json", **{field: KERNEL})(folder)
    for model_class in (TripsForQuestionAnswering, TripsModel):
        with pytest.raises(ValueError, match="attn_implementation"):
            model_class.from_pretrained(folder)


def edit_tokenizer(**fields):
    return edit("tokenizer.json", **fields)


def growing(*normalizers):
    return {"type": "Sequence", "normalizers": list(normalizers)}


LONGER = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 64}
BYTES = {"type": "ByteLevel"}
PIECES = [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}] * 10**4
MANY = [{"id": number, "content": f"<{number}>", "special": True} for number in range(10**4)]
CHARSMAP = base64.b64encode((0).to_bytes(4, "little") + b"a" * 5000 + b"\0").decode()  # an empty trie, one replacement
TOKENIZERS = {
    "none": lambda folder: (folder / "tokenizer.json").unlink(),
    "a list": put("tokenizer.json", "[]"),
    "deep": put("tokenizer.json", deep(10**5)),
    "without a model": put("tokenizer.json", "{}"),
    "chained replacements": edit_tokenizer(normalizer=growing(LONGER, LONGER)),
    "chained bytes": edit_tokenizer(normalizer=growing(*[BYTES] * 20)),
    "a long template": edit_tokenizer(post_processor={"type": "TemplateProcessing", "single": PIECES}),
    "many added tokens": edit_tokenizer(added_tokens=MANY),
    "a large vocabulary": edit_tokenizer(model__vocab={f"w{number}": number for number in range(10**5)}),
    "many tokens in its settings": edit("tokenizer_config.json", added_tokens_decoder=dict.fromkeys(range(10**4), {})),
    "a long replacement": edit_tokenizer(normalizer={"type": "Precompiled", "precompiled_charsmap": CHARSMAP}),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizers_that_take_much_memory_are_refused(saved, tmp_path, name):
    config = load_checkpoint(saved).config
    folder = shutil.copytree(saved, tmp_path / "model")
    TOKENIZERS[name](folder)
    with pytest.raises((OSError, ValueError), match="tokenizer") as refused:
        load_processor(folder, config)
    assert len(str(refused.value)) < 1000


LOAD = """
import sys
from modeling_trips.inspection.checkpoints import load_checkpoint, load_processor
try:
    config = load_checkpoint(sys.argv[1]).config
    load_processor(sys.argv[1], config)
    print("loaded")
except OSError as error:
    sys.exit(f"refused: {error}")
"""


def load_in_a_process(name, **environment):
    """Return what a process printed, and its seconds."""
    start = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-c", LOAD, name], capture_output=True, text=True, env={**os.environ, **environment}
    )
    return result.stdout + result.stderr, time.monotonic() - start


@pytest.mark.slow
def test_a_hub_that_does_not_answer_is_an_error_after_ten_seconds_and_its_cache_is_used(saved, tmp_path):
    with LoopbackHub() as hub:
        hub.repositories["ada/model"] = Repository(private=False)
        files = {path.name: path.read_bytes() for path in saved.iterdir()}
        hub.repositories["ada/model"].commits.append({**files, "checkpoint-9/model.safetensors": b"", "a.bin": b""})
        environment = hub.client_environment(tmp_path)
        printed, _ = load_in_a_process("ada/model", **environment)
        assert "loaded" in printed, printed
        assert not any("checkpoint-9" in request or "a.bin" in request for request in hub.requests)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        environment["HF_ENDPOINT"] = f"http://127.0.0.1:{silent.getsockname()[1]}"
        _, seconds_to_import = load_in_a_process("/no/such/folder", **environment)
        printed, seconds = load_in_a_process("ada/other", **environment)
        assert "refused: ada/other" in printed
        assert "Traceback" not in printed
        assert seconds < seconds_to_import + 10
        printed, _ = load_in_a_process("ada/model", **environment)
        assert "loaded" in printed, printed
