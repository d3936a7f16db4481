"""
Time models in vLLM, in a process of its own: `python time_vllm.py JOBS RESULTS`.

A job has a model, options of `LLM`, the side of its square images in pixels, and a number of requests. A result has
the seconds to the first token of one request, and the requests per second of all at once with 16 tokens each; or an
error. Every request has an image of its own, so no cache helps.
"""

import gc
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory


ROUNDS = 5  # timed requests to the first token, after one that is not


def run(job: dict) -> dict:
    try:
        engine = LLM(job["model"], **job["options"])
    except Exception as error:  # whatever does not work is a result
        return {"error": f"{type(error).__name__}: {error}"}
    num_requests = job["num_requests"]
    random = np.random.default_rng(0)
    prompts = []
    for _ in range(1 + ROUNDS + num_requests):
        pixels = random.integers(0, 256, (job["image_size"], job["image_size"], 3), dtype=np.uint8)
        prompts.append({"prompt": job["prompt"], "multi_modal_data": {"image": Image.fromarray(pixels)}})
    seconds(engine, prompts[:1], num_tokens=1)
    first_token = [seconds(engine, [prompt], num_tokens=1) for prompt in prompts[1 : 1 + ROUNDS]]
    result = {
        "first_token": statistics.median(first_token),
        "requests_per_second": num_requests / seconds(engine, prompts[1 + ROUNDS :], num_tokens=16),
    }
    del engine
    gc.collect()
    cleanup_dist_env_and_memory()
    return result


def seconds(engine: LLM, prompts: list[dict], num_tokens: int) -> float:
    """Return the seconds until all requests have this number of tokens."""
    greedy = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
    start = time.perf_counter()
    engine.generate(prompts, greedy, use_tqdm=False)
    return time.perf_counter() - start


if __name__ == "__main__":
    jobs, results = map(Path, sys.argv[1:])
    results.write_text(json.dumps([run(job) for job in json.loads(jobs.read_text("utf-8"))]), "utf-8")
