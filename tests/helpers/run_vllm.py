"""
Generate with vLLM, in an environment of its own, without the project's tests: `python run_vllm.py JOBS RESULTS`.

A job has a model, options of `LLM`, prompts with files of images and videos (arrays of frames) and options of the
image's processor, and a number of passes over the same prompts. A result has the hashes of the first prompt's images,
the length of each prompt, and by pass its answer's tokens, their log-probabilities and how many tokens of the prompt
were cached; or an error. Without prompts, the job only checks whether patch selection fits the engine.
"""

import gc
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.models import registry

from modeling_trips.serving_vllm.selection import check_engine
from modeling_trips.serving_vllm.settings import ServingSettings


def check(job):
    config = EngineArgs(model=job["model"], **job["options"]).create_engine_config()
    check_engine(config, ServingSettings.of(config.model_config.hf_config))


def video_metadata(num_frames):
    """Return what vLLM notes of a video of one frame per second when it loads all frames."""
    return {
        "fps": 1.0,
        "duration": float(num_frames),
        "total_num_frames": num_frames,
        "frames_indices": list(range(num_frames)),
        "video_backend": "opencv",
        "do_sample_frames": False,
    }


def run(job):
    try:
        if not job["prompts"]:
            check(job)
            return {}
        engine = LLM(job["model"], **job["options"])
    except Exception as error:
        return {"error": str(error)}
    prompts = []
    for text, files, options in job["prompts"]:
        data = {"image": [Image.open(file) for file in files if file.endswith(".png")]}
        if videos := [np.load(file) for file in files if file.endswith(".npy")]:
            data["video"] = [(frames, video_metadata(len(frames))) for frames in videos]
        prompts.append({"prompt": text, "multi_modal_data": data, "mm_processor_kwargs": options})
    greedy = SamplingParams(temperature=0, max_tokens=job["num_tokens"], ignore_eos=True, logprobs=0)
    passes = [engine.generate(prompts, greedy, use_tqdm=False) for _ in range(job["passes"])]
    hashes = engine.renderer.render_cmpl(prompts[:1])[0]["mm_hashes"].get("image")
    del engine
    gc.collect()
    cleanup_dist_env_and_memory()
    answers = [[output.outputs[0] for output in outputs] for outputs in passes]
    return {
        "tokens": [[list(answer.token_ids) for answer in own] for own in answers],
        "logprobs": [
            [[step[token].logprob for step, token in zip(answer.logprobs, answer.token_ids)] for answer in own]
            for own in answers
        ],
        "hashes": hashes,
        "lengths": [len(output.prompt_token_ids) for output in passes[0]],
        "cached": [[output.num_cached_tokens for output in outputs] for outputs in passes],
    }


def inspect_here(registered):
    """Inspect a model's class, as vLLM does in a process of its own, which takes a minute, so that it needs no GPU."""
    return registry._ModelInfo.from_model_cls(registered.load_model_cls())


if __name__ == "__main__":
    registry._LazyRegisteredModel.inspect_model_cls = inspect_here
    jobs, results = map(Path, sys.argv[1:])
    results.write_text(json.dumps([run(job) for job in json.loads(jobs.read_text("utf-8"))]), "utf-8")
