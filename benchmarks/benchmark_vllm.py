"""
Measure time to the first token and throughput of vLLM with patch selection, over HTTP, with random weights.

    python benchmarks/benchmark_vllm.py --output_json docs/results/vllm_cpu.json

Run it where vLLM is installed. The model is a LLaVA from SigLIP-B/16 at 384 pixels (576 visual tokens) and the decoder
of Qwen2-0.5B. A server for each variant takes turns with the others; each request has a new image. Each of
the three servers needs 6 GB of memory.
"""

import base64
import io
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import torch
from measuring import OutputArguments, quartiles, run_benchmark
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlavaProcessor, PreTrainedTokenizerFast, SiglipImageProcessor
from vlm_cost import IMAGE_TOKEN, make_siglip_384

from modeling_trips.serving_vllm.__main__ import installed_release


SIDE, NUM_PATCHES = 384, 576
SCHEDULE, VISUAL_TOKENS = "4:image:0.333", 64
ARCHITECTURE = {"architectures": ["TripsLlavaForConditionalGeneration"]}
VARIANTS = {
    "unpruned": {},
    "exit": {**ARCHITECTURE, "visual_tokens": VISUAL_TOKENS},
    "tower and exit": {**ARCHITECTURE, "patch_selection": SCHEDULE, "visual_tokens": VISUAL_TOKENS},
}
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
)


@dataclass(kw_only=True)
class VllmArguments(OutputArguments):
    clients: list[int] = field(default_factory=lambda: [1, 8], metadata={"help": "Numbers of requests at a time."})
    new_tokens: int = field(default=16, metadata={"help": "Tokens per answer."})
    text_length: int = field(default=32, metadata={"help": "Tokens of text per prompt."})
    dtype: str = field(default="float32", metadata={"help": "Dtype: float32, bfloat16 or float16."})
    warmup: int = field(default=1, metadata={"help": "Untimed rounds."})
    repeats: int = field(default=5, metadata={"help": "Timed rounds."})
    seed: int = field(default=0, metadata={"help": "Seed of the images."})


def save_model(folder: Path):
    """Save the configuration and a processor. vLLM makes random weights."""
    with torch.device("meta"):
        config = make_siglip_384().config
    config.architectures = ["LlavaForConditionalGeneration"]
    config.image_token_index = IMAGE_TOKEN
    config.save_pretrained(folder)
    words = {"<unk>": 0, "<pad>": 1, "</s>": 2, "<image>": IMAGE_TOKEN}
    words |= {f"w{number}": number for number in range(3, 1000) if number != IMAGE_TOKEN}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="</s>",
        additional_special_tokens=["<image>"],
    )
    LlavaProcessor(
        SiglipImageProcessor(size={"height": SIDE, "width": SIDE}),
        tokenizer,
        patch_size=16,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        chat_template=TEMPLATE,
    ).save_pretrained(folder)


class Server:
    """A process that serves one variant."""

    def __init__(self, folder: Path, overrides: dict, args: VllmArguments):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--port", str(port)]
        command += ["--load-format", "dummy", "--dtype", args.dtype, "--max-model-len", "1024", "--enforce-eager"]
        command += ["--served-model-name", "model", "--hf-overrides", json.dumps(overrides)]
        command += ["--no-enable-prefix-caching", "--max-num-batched-tokens", "8192"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)

    def __enter__(self) -> "Server":
        while True:
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
                return self
            except OSError as error:
                if self.process.poll() is not None:
                    raise RuntimeError("The server ended at its start.") from error
                time.sleep(1)

    def __exit__(self, *exception):
        self.process.terminate()
        self.process.wait()

    def cpu_seconds(self) -> float:
        parent = psutil.Process(self.process.pid)
        return sum(sum(process.cpu_times()[:2]) for process in [parent, *parent.children(recursive=True)])

    def ask(self, image: str, args: VllmArguments) -> float:
        """Ask about an image. Return the seconds to the first token."""
        text = " ".join(f"w{number}" for number in range(20, 20 + args.text_length))
        content = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": text}]
        body = {"model": "model", "messages": [{"role": "user", "content": content}], "stream": True}
        body |= {"max_tokens": args.new_tokens, "ignore_eos": True, "return_token_ids": True, "temperature": 0}
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}/v1/chat/completions", json.dumps(body).encode(), headers)
        start, first = time.perf_counter(), None
        with urllib.request.urlopen(request) as response:
            for line in response:
                if first is None and b'"token_ids":[' in line:
                    first = time.perf_counter() - start
        return first


def make_image(generator: np.random.Generator) -> str:
    """Return a new image of random colors as a data URL."""
    buffer = io.BytesIO()
    Image.fromarray(generator.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def measure(args: VllmArguments) -> Iterator[dict]:
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    generator = np.random.default_rng(args.seed)
    times: dict[tuple[str, int], list[tuple[float, float, float]]] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        save_model(folder)
        servers = {name: stack.enter_context(Server(folder, own, args)) for name, own in VARIANTS.items()}
        for turn in range(args.warmup + args.repeats):
            for clients in args.clients:
                for name, server in servers.items():
                    images = [make_image(generator) for _ in range(clients)]
                    start, cpu = time.perf_counter(), server.cpu_seconds()
                    with ThreadPoolExecutor(clients) as pool:
                        first = list(pool.map(partial(server.ask, args=args), images))
                    seconds, cpu = time.perf_counter() - start, server.cpu_seconds() - cpu
                    if turn >= args.warmup:
                        row = statistics.median(first), seconds / clients, cpu / clients
                        times.setdefault((name, clients), []).append(row)
    for (name, clients), own in times.items():
        first, seconds, cpu = map(statistics.median, zip(*own))
        yield {
            "variant": name,
            "clients": clients,
            "schedule": VARIANTS[name].get("patch_selection", "unpruned"),
            "visual_tokens": VARIANTS[name].get("visual_tokens", NUM_PATCHES),
            "seconds_to_first_token": first,
            "requests_per_second": 1 / seconds,
            "cpu_seconds_per_request": cpu,
            **ratios(own, "exit", times["exit", clients]),
            **ratios(own, "unpruned", times["unpruned", clients]),
            **args.settings("clients", "seed"),
            "vllm_version": installed_release(),
        }


def ratios(own: list[tuple], reference: str, others: list[tuple]) -> dict[str, list[float]]:
    """Return the quartiles over the rounds of each time divided by the reference's."""
    names = [f"{name}_ratio_to_{reference}_quartiles" for name in ("first_token", "seconds", "cpu")]
    pairs = [[one / other for one, other in zip(*rows)] for rows in zip(own, others)]
    return {name: quartiles([*column]) for name, column in zip(names, zip(*pairs))}


def report(rows: list[dict], args: VllmArguments):
    print("| variant | clients | s to first token | requests/s | CPU s per request |")
    print("|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['variant']} | {row['clients']} | {row['seconds_to_first_token']:.2f} | "
            f"{row['requests_per_second']:.2f} | {row['cpu_seconds_per_request']:.2f} |"
        )


def main(argv: list[str] | None = None) -> list[dict]:
    return run_benchmark(VllmArguments, __doc__, measure, report, argv)


if __name__ == "__main__":
    main()
