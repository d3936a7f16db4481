"""
Time models in vLLM, in a process of its own: `python time_vllm.py JOBS RESULTS`.

A job has a model, options of `LLM`, the prompt, the side of its square images in pixels, a number of requests, and
maybe a clock (`process_time` on a machine that does other work). A result has the seconds to the first token of one
request, and the requests per second of all at once with 16 tokens each; or an error. Every request has an image of its
own, so no cache helps. The engines of all jobs take turns.
"""

import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image
from vllm import LLM, SamplingParams


ROUNDS = 5  # timed requests to the first token, after one that is not


class TimedEngine:
    """An engine, its prompts, and the seconds to the first token of each round."""

    def __init__(self, job: dict):
        self.engine = LLM(job["model"], **job["options"])
        self.clock = getattr(time, job.get("clock", "perf_counter"))
        self.num_requests = job["num_requests"]
        self.first_token: list[float] = []
        random = np.random.default_rng(0)
        self.prompts = []
        for _ in range(1 + ROUNDS + self.num_requests):
            pixels = random.integers(0, 256, (job["image_size"], job["image_size"], 3), dtype=np.uint8)
            image = Image.fromarray(pixels)
            self.prompts.append({"prompt": job["prompt"], "multi_modal_data": {"image": image}})

    def seconds(self, prompts: list[dict], num_tokens: int) -> float:
        """Return the seconds until all requests have this number of tokens."""
        greedy = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
        start = self.clock()
        self.engine.generate(prompts, greedy, use_tqdm=False)
        return self.clock() - start

    def result(self) -> dict:
        result = {"first_token": statistics.median(self.first_token)}
        if self.num_requests > 0:
            seconds = self.seconds(self.prompts[1 + ROUNDS :], num_tokens=16)
            result["requests_per_second"] = self.num_requests / seconds
        return result


def run(jobs: list[dict]) -> list[dict]:
    engines: dict[int, TimedEngine] = {}
    results: list[dict] = [{} for _ in jobs]
    for number, job in enumerate(jobs):
        try:
            engines[number] = TimedEngine(job)
        except Exception as error:  # whatever does not work is a result
            results[number] = {"error": f"{type(error).__name__}: {error}"}
    for round_number in range(1 + ROUNDS):
        for timed in engines.values():
            seconds = timed.seconds(timed.prompts[round_number : round_number + 1], num_tokens=1)
            if round_number > 0:  # the first one is not timed
                timed.first_token.append(seconds)
    for number, timed in engines.items():
        results[number] = timed.result()
    return results


if __name__ == "__main__":
    jobs, results = map(Path, sys.argv[1:])
    results.write_text(json.dumps(run(json.loads(jobs.read_text("utf-8")))), "utf-8")
