"""
Time models in vLLM, in a process of its own: `python time_vllm.py JOBS RESULTS`.

A job has a model, options of `LLM`, the prompt, the side of its square images in pixels, a number of requests, and
maybe a clock (`process_time` on a machine that does other work) and `choices`, options of the image's processor by
name. A result has by choice the seconds to the first token of one request, its tokens per second after that, and the
requests per second of all at once with 16 tokens each; or an error. Every request has an image of its own, so no cache
helps. The engines of all jobs and their choices take turns.
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
NUM_TOKENS = 65  # of the same requests, for the tokens per second


class TimedChoice:
    """Requests to an engine with the same options of the image's processor."""

    def __init__(self, engine: LLM, job: dict, options: dict):
        self.engine = engine
        self.clock = getattr(time, job.get("clock", "perf_counter"))
        self.num_requests = job["num_requests"]
        self.first_token: list[float] = []
        self.all_tokens: list[float] = []
        random = np.random.default_rng(0)
        self.prompts = []
        side = job["image_size"]
        for _ in range(1 + ROUNDS + self.num_requests):
            pixels = random.integers(0, 256, (side, side, 3), dtype=np.uint8)
            prompt = {
                "prompt": job["prompt"],
                "multi_modal_data": {"image": Image.fromarray(pixels)},
                "mm_processor_kwargs": options,
            }
            self.prompts.append(prompt)

    def seconds(self, prompts: list[dict], num_tokens: int) -> float:
        """Return the seconds until all requests have this number of tokens."""
        greedy = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
        start = self.clock()
        self.engine.generate(prompts, greedy, use_tqdm=False)
        return self.clock() - start

    def run_round(self, number: int):
        prompts = self.prompts[number : number + 1]
        first_token = self.seconds(prompts, num_tokens=1)
        if number > 0:  # the first one is not timed
            self.first_token.append(first_token)
            self.all_tokens.append(self.seconds(prompts, num_tokens=NUM_TOKENS))

    def result(self) -> dict:
        first_token = statistics.median(self.first_token)
        others = statistics.median(self.all_tokens) - first_token
        result = {"first_token": first_token, "tokens_per_second": (NUM_TOKENS - 1) / others}
        if self.num_requests > 0:
            seconds = self.seconds(self.prompts[1 + ROUNDS :], num_tokens=16)
            result["requests_per_second"] = self.num_requests / seconds
        return result


def run(jobs: list[dict]) -> list[dict]:
    results: list[dict] = [{} for _ in jobs]
    choices: list[tuple[int, str, TimedChoice]] = []
    for number, job in enumerate(jobs):
        try:
            engine = LLM(job["model"], **job["options"])
        except Exception as error:  # whatever does not work is a result
            results[number] = {"error": f"{type(error).__name__}: {error}"}
            continue
        for name, options in job.get("choices", {"": {}}).items():
            choices.append((number, name, TimedChoice(engine, job, options)))
    for round_number in range(1 + ROUNDS):
        for _, _, choice in choices:
            choice.run_round(round_number)
    for number, name, choice in choices:
        results[number][name] = choice.result()
    return results


if __name__ == "__main__":
    jobs, results = map(Path, sys.argv[1:])
    found = run(json.loads(jobs.read_text("utf-8")))
    results.write_text(json.dumps(found), "utf-8")
