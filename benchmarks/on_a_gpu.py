"""
Measure on one GPU what was measured on CPUs only. Run it in a checkout with the extras `examples` and `vllm`, and send
the rows.

    pip install -e ".[examples,vllm]"
    python benchmarks/on_a_gpu.py --output_json gpu.json
    python benchmarks/on_a_gpu.py --device cpu --tiny True  # whether it runs, without a GPU
    python benchmarks/benchmark.py --device cuda --dtype bfloat16 --mode forward training  # TRIPS itself

Parts, whose rows are printed at once: `tokens`, answers of tiny models in vLLM (Model Runner V2) against
Transformers; `speed`, the time to the first token, tokens and requests per second in vLLM at four rates, in the shapes
of LLaVA-1.5 7B and Qwen3-VL 8B with random weights. Both run eager and compiled and are planned to take ten minutes.
What does not work becomes a row with an `error`, and the rest goes on.
"""

import importlib.util
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from measuring import OutputArguments, run_benchmark
from transformers import LlavaConfig, Qwen3VLConfig

from modeling_trips.serving_vllm import ARCHITECTURES
from modeling_trips.serving_vllm.settings import IN_TOWER
from trips_examples.data.source import option
from trips_examples.training.options import run_script


ROOT = Path(__file__).resolve().parents[1]
HELPERS = ROOT / "tests" / "helpers"
sys.path.append(str(HELPERS))  # the models of the tests
MODES_OF_VLLM = ("eager", "compiled")
RATES = (1.0, 0.5, 0.25, 0.1)
TINY = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 8, "num_attention_heads": 4}
IMAGE_SIZE = 336
TIMEOUT = 1800  # seconds of one process of vLLM
# Fields of rows that are printed.
SHOWN = ("part", "model", "mode", "keep_rate")
SHOWN += ("equal_answers", "answers", "first_token", "tokens_per_second", "requests_per_second", "error")


@dataclass(kw_only=True)
class GpuArguments(OutputArguments):
    parts: list[str] = option(["tokens", "speed"], "What is measured.", choices=["tokens", "speed"])
    families: list[str] = option(
        ["llava", "qwen3_vl"], "Families of the tiny models, of tests/helpers/served_vlms.py."
    )
    modes: list[str] = option([*MODES_OF_VLLM], "Modes of vLLM.", choices=MODES_OF_VLLM)
    device: str = option("cuda", "cuda, or cpu to try the script.")
    tiny: bool = option(False, "Tiny shapes, to try the script.")
    seed: int = option(0, "Seed of weights and inputs.")


def run_vllm(script: Path, jobs: list[dict], device: str) -> list[dict]:
    """Run jobs of vLLM in a process of its own, which may fail as a whole."""
    variables = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
    if device == "cuda":
        variables["VLLM_USE_V2_MODEL_RUNNER"] = "1"  # there is none for CPUs
    with tempfile.TemporaryDirectory() as folder:
        given = Path(folder) / "jobs.json"
        found = Path(folder) / "results.json"
        given.write_text(json.dumps(jobs), encoding="utf-8")
        command = [sys.executable, str(script), str(given), str(found)]
        environment = os.environ | variables
        try:
            process = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            return [{"error": f"no result within {TIMEOUT} s"}] * len(jobs)
        if process.returncode != 0:
            last_line = (process.stderr.strip().splitlines() or ["no message"])[-1]
            return [{"error": f"vLLM ended with code {process.returncode}: {last_line}"}] * len(jobs)
        return json.loads(found.read_text(encoding="utf-8"))


def token_rows(args: GpuArguments) -> Iterator[dict]:
    """Compare greedy answers of tiny models in float32, with selection after the tower, and inside it where it can."""
    from served_vlms import NUM_TOKENS, Selection, ServedVlm

    options = {"dtype": "float32", "max_model_len": 512, "max_num_seqs": 8, "limit_mm_per_prompt": {"image": 2}}
    cases = [*itertools.product(args.families, args.modes)]
    jobs = []
    references = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, mode in cases:
            if name not in references:
                vlm = ServedVlm(name, Path(folder) / name)
                schedule = "2:image:0.5" if vlm.model.config.model_type in IN_TOWER else "unpruned"
                selection = Selection(schedule, keep_rate=0.3, scorer="divprune")
                references[name], _ = vlm.reference(selection)
            overrides = selection.overrides(vlm.folder)
            overrides["architectures"] = [ARCHITECTURES[vlm.model.config.model_type]]
            job = {
                "model": str(vlm.folder),
                "options": {**options, "hf_overrides": overrides, "enforce_eager": mode == "eager"},
                "prompts": [(text, files, {}) for text, files in vlm.prompts],
                "passes": 1,
                "num_tokens": NUM_TOKENS,
            }
            jobs.append(job)
        results = run_vllm(HELPERS / "run_vllm.py", jobs, args.device)
    for (name, mode), result in zip(cases, results):
        row = {"part": "tokens", "model": name, "mode": mode}
        if "error" in result:
            yield row | result
            continue
        (answers,) = result["tokens"]
        num_equal = sum(answer == wanted for answer, wanted in zip(answers, references[name]))
        yield row | {"equal_answers": num_equal, "answers": len(answers)}


def speed_rows(args: GpuArguments) -> Iterator[dict]:
    """Time models with random weights, which vLLM makes itself. Each request chooses its rate."""
    num_requests = 4 if args.tiny else 64
    choices = {str(rate): {"keep_rate": rate} if rate < 1 else {"visual_tokens": "all"} for rate in RATES}
    with tempfile.TemporaryDirectory() as folder:
        for save, mode in itertools.product((save_llava, save_qwen), args.modes):
            model_type, prompt, image_size = save(Path(folder) / save.__name__, args.tiny)
            overrides = {"architectures": [ARCHITECTURES[model_type]], "patch_selection": {"keep_rate": 0.5}}
            options = {
                "load_format": "dummy",
                "dtype": "bfloat16",
                "max_model_len": 1024,
                "enable_prefix_caching": False,
                "mm_processor_cache_gb": 0,
                "enforce_eager": mode == "eager",
                "hf_overrides": overrides,
            }
            job = {
                "model": str(Path(folder) / save.__name__),
                "options": options,
                "prompt": prompt,
                "image_size": image_size,
                "num_requests": num_requests,
                "choices": choices,
            }
            (result,) = run_vllm(ROOT / "benchmarks" / "time_vllm.py", [job], args.device)
            row = {"part": "speed", "model": model_type, "mode": mode, "num_requests": num_requests}
            if "error" in result:
                yield row | result
                continue
            for rate in RATES:
                yield row | {"keep_rate": rate} | result[str(rate)]


def save_llava(folder: Path, tiny: bool) -> tuple[str, str, int]:
    """
    Save the configuration and the processor of LLaVA-1.5 7B. Return the model's type, a prompt, and the side of images
    of 576 visual tokens in pixels.
    """
    from tiny_vlm_processors import make_llava_processor
    from tiny_vlms import IMAGE

    vision = {"model_type": "clip_vision_model"}  # CLIP ViT-L/14 and a Llama of 7B by default
    text = {"model_type": "llama", "vocab_size": 32064, "max_position_embeddings": 4096}
    sizes = {"image_size": IMAGE_SIZE, "patch_size": 14}
    if not tiny:
        vision |= {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    else:
        vision |= TINY
        text |= TINY
    config = LlavaConfig(vision_config=vision | sizes, text_config=text, image_token_id=IMAGE)
    config.architectures = ["LlavaForConditionalGeneration"]
    config.save_pretrained(folder)
    processor = make_llava_processor()
    processor.image_processor.size = {"shortest_edge": IMAGE_SIZE}
    processor.image_processor.crop_size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    processor.patch_size = sizes["patch_size"]
    processor.save_pretrained(folder)
    return "llava", "<s> <image> what color is it ?", IMAGE_SIZE


def save_qwen(folder: Path, tiny: bool) -> tuple[str, str, int]:
    """As `save_llava`, for Qwen3-VL 8B."""
    from served_vlms import make_qwen3_processor
    from tiny_vlms import IMAGE, QWEN_TOKENS

    vision = {"deepstack_visual_indexes": [8, 16, 24], "out_hidden_size": 4096}  # that of 8B by default
    text = {"num_hidden_layers": 36, "num_key_value_heads": 8, "intermediate_size": 12288, "hidden_size": 4096}
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
    if tiny:
        vision = {"depth": 4, "hidden_size": 128, "out_hidden_size": 128, "num_heads": 4, "intermediate_size": 256}
        vision["deepstack_visual_indexes"] = [0, 1]
        text |= TINY | {"head_dim": 32, "num_key_value_heads": 4}
        rope["mrope_section"] = [8, 4, 4]
    text["rope_parameters"] = rope
    config = Qwen3VLConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, **QWEN_TOKENS)
    config.architectures = ["Qwen3VLForConditionalGeneration"]
    config.save_pretrained(folder)
    processor = make_qwen3_processor()
    for part in (processor.image_processor, processor.video_processor):
        part.patch_size = config.vision_config.patch_size
        part.size = {"shortest_edge": 32 * 32, "longest_edge": 1024 * 1024}
    processor.save_pretrained(folder)
    prompt = "<s> <|vision_start|> <|image_pad|> <|vision_end|> what color is it ?"
    return "qwen3_vl", prompt, IMAGE_SIZE if tiny else 24 * 32


def measure_all(args: GpuArguments) -> Iterator[dict]:
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("There is no GPU that PyTorch can use. Try the script with --device cpu --tiny True.")
    if importlib.util.find_spec("vllm") is None:
        raise ValueError('vLLM is not installed: pip install -e ".[examples,vllm]"')
    for part in args.parts:
        for row in PARTS[part](args):
            print(", ".join(f"{name} {row[name]}" for name in SHOWN if name in row))
            yield row


PARTS = {"tokens": token_rows, "speed": speed_rows}


def main(argv: list[str] | None = None) -> list[dict]:
    return run_benchmark(GpuArguments, __doc__, measure_all, lambda rows, args: None, argv)


if __name__ == "__main__":
    run_script(main)
