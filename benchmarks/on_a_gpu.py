"""
Measure on one GPU what was measured on CPUs only, in tens of minutes. Run it in a checkout with the extra `vllm`, and
send the rows.

    python benchmarks/on_a_gpu.py --output_json gpu.json
    python benchmarks/on_a_gpu.py --device cpu --tiny True --kinds sdpa  # whether it runs, without a GPU

Parts: `encoder`, steps of base size in bfloat16 against the unpruned baseline; `tokens`, answers of tiny models in
vLLM (Model Runner V2, encoder graphs off and on) against Transformers; `speed`, the time to the first token and the
requests per second of LLaVA in vLLM, 7B with random weights, pruned and unpruned. What does not work is printed at
once, becomes a row with an `error`, and the rest goes on.
"""

import importlib.util
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from measuring import OutputArguments, run_benchmark
from tqdm.auto import tqdm
from transformers import LlavaConfig

from modeling_trips.inspection.speed import MODES, Setting, measure
from modeling_trips.serving_vllm.settings import ARCHITECTURES
from trips_examples.data.source import option
from trips_examples.training.options import run_script


ROOT = Path(__file__).resolve().parents[1]
HELPERS = ROOT / "tests" / "helpers"
sys.path.append(str(HELPERS))  # the models of the tests
PARTS = ("encoder", "tokens", "speed")
KINDS = {  # of a step
    "sdpa": {},
    "compile": {"compile": True},
    "flash_attention_2": {"attn_implementation": "flash_attention_2"},
}
SCHEDULES = {1: "5:text:0.7,10:text:0.7", 5: "5:image:0.7,10:image:0.7,12:text:0.3"}  # by texts per image
SELECTIONS = {  # of LLaVA with 24 layers and 576 visual tokens
    "unpruned": {},
    "64 tokens": {"visual_tokens": 64, "visual_scorer": "divprune"},
    "64 tokens and 8:image:0.33": {"schedule": "8:image:0.33", "visual_tokens": 64, "visual_scorer": "divprune"},
}
TINY = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 8, "num_attention_heads": 4}
TIMEOUT = 1800  # seconds of one process of vLLM
# Fields of rows that are printed at the end.
SHOWN = ("part", "kind", "mode", "texts_per_image", "model", "selection", "encoder_graphs", "macs_ratio", "time_ratio")
SHOWN += ("equal_answers", "answers", "first_token", "requests_per_second", "error")


@dataclass(kw_only=True)
class GpuArguments(OutputArguments):
    parts: list[str] = option([*PARTS], "What is measured.", choices=PARTS)
    kinds: list[str] = option([*KINDS], "Kinds of encoder steps.", choices=[*KINDS])
    device: str = option("cuda", "cuda, or cpu to try the script.")
    tiny: bool = option(False, "Tiny shapes, to try the script.")
    seed: int = option(0, "Seed of weights and inputs.")


def encoder_rows(args: GpuArguments) -> Iterator[dict]:
    size = {"preset": "base", "image_size": 384, "batch_size": 16}
    schedules = SCHEDULES
    if args.tiny:
        size = {"preset": "tiny", "image_size": 64, "batch_size": 1}
        schedules = {1: "2:text:0.5,3:text:0.5", 5: "2:image:0.5,4:text:0.3"}
    warmup, repeats = (0, 1) if args.tiny else (3, 9)
    cases = [*itertools.product(args.kinds, MODES, schedules)]
    for kind, mode, texts_per_image in tqdm(cases, desc="encoder"):
        setting = Setting(
            **size,
            texts_per_image=texts_per_image,
            text_length=40,
            mode=mode,
            dtype="bfloat16",
            device=args.device,
            **KINDS[kind],
            schedule=schedules[texts_per_image],
        )
        row = {"part": "encoder", "kind": kind, "schedule": schedules[texts_per_image]}
        try:
            yield row | measure(setting, warmup=warmup, repeats=repeats)
        except Exception as error:  # whatever does not work is a result
            yield row | asdict(setting) | failure(error)


def failure(error: Exception | str) -> dict:
    """Print at once what does not work, and return the field of its row."""
    text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    tqdm.write(f"Does not work: {text}", file=sys.stderr)
    return {"error": text}


def run_vllm(script: Path, job: dict, device: str) -> dict:
    """Run a job of vLLM in a process of its own, which may fail as a whole."""
    variables = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
    if device == "cuda":
        variables["VLLM_USE_V2_MODEL_RUNNER"] = "1"  # there is none for CPUs
    with tempfile.TemporaryDirectory() as folder:
        given = Path(folder) / "jobs.json"
        found = Path(folder) / "results.json"
        given.write_text(json.dumps([job]), encoding="utf-8")
        command = [sys.executable, str(script), str(given), str(found)]
        environment = os.environ | variables
        try:
            process = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            return {"error": f"no result within {TIMEOUT} s"}
        if process.returncode != 0:
            last_line = (process.stderr.strip().splitlines() or ["no message"])[-1]
            return {"error": f"vLLM ended with code {process.returncode}: {last_line}"}
        (result,) = json.loads(found.read_text(encoding="utf-8"))
        return result


def token_rows(args: GpuArguments) -> Iterator[dict]:
    """Compare greedy answers of tiny models in float32, with selection inside the tower and after it."""
    from served_vlms import NUM_TOKENS, Selection, ServedVlm

    selection = Selection("2:image:0.5", visual_tokens=6, scorer="divprune")
    options = {"dtype": "float32", "max_model_len": 512, "max_num_seqs": 8, "limit_mm_per_prompt": {"image": 2}}
    for name, has_graphs in itertools.product(("llava", "qwen2_5_vl", "qwen3_vl"), (False, True)):
        row = {"part": "tokens", "model": name, "encoder_graphs": has_graphs, "schedule": selection.schedule}
        with tempfile.TemporaryDirectory() as folder:
            vlm = ServedVlm(name, Path(folder))
            expected, _ = vlm.reference(selection)
            overrides = selection.overrides(vlm.folder)
            overrides["architectures"] = [ARCHITECTURES[vlm.model.config.model_type]]
            graphs = {"cudagraph_mm_encoder": has_graphs}
            job = {
                "model": folder,
                "options": {**options, "hf_overrides": overrides, "compilation_config": graphs},
                "prompts": [(text, files, {}) for text, files in vlm.prompts],
                "passes": 1,
                "num_tokens": NUM_TOKENS,
            }
            result = run_vllm(HELPERS / "run_vllm.py", job, args.device)
        if "error" in result:
            yield row | failure(result["error"])
            continue
        (answers,) = result["tokens"]
        num_equal = sum(answer == wanted for answer, wanted in zip(answers, expected))
        yield row | {"equal_answers": num_equal, "answers": len(expected)}


def speed_rows(args: GpuArguments) -> Iterator[dict]:
    """Time LLaVA-1.5's shape with random weights, which vLLM makes itself."""
    num_requests = 4 if args.tiny else 64
    with tempfile.TemporaryDirectory() as folder:
        image_size = save_llava(Path(folder), args.tiny)
        for (name, settings), has_graphs in itertools.product(SELECTIONS.items(), (False, True)):
            options = {
                "load_format": "dummy",
                "dtype": "bfloat16",
                "max_model_len": 1024,
                "enable_prefix_caching": False,
                "mm_processor_cache_gb": 0,
                "compilation_config": {"cudagraph_mm_encoder": has_graphs},
            }
            if settings:
                options["hf_overrides"] = {"architectures": [ARCHITECTURES["llava"]], "patch_selection": settings}
            job = {
                "model": folder,
                "options": options,
                "prompt": "<s> <image> what color is it ?",
                "image_size": image_size,
                "num_requests": num_requests,
            }
            result = run_vllm(ROOT / "benchmarks" / "time_vllm.py", job, args.device)
            row = {"part": "speed", "selection": name, "encoder_graphs": has_graphs, "num_requests": num_requests}
            yield row | (failure(result["error"]) if "error" in result else result)


def save_llava(folder: Path, tiny: bool) -> int:
    """Save the configuration and the processor of a LLaVA, without weights, and return the side of its images."""
    from tiny_vlm_processors import make_llava_processor
    from tiny_vlms import IMAGE

    vision = {"model_type": "clip_vision_model"}  # CLIP ViT-L/14 and a Llama of 7B by default
    text = {"model_type": "llama", "vocab_size": 32064, "max_position_embeddings": 4096}
    sizes = {"image_size": 336, "patch_size": 14}
    if not tiny:
        vision |= {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    else:
        vision |= TINY
        text |= TINY
    config = LlavaConfig(vision_config=vision | sizes, text_config=text, image_token_id=IMAGE)
    config.architectures = ["LlavaForConditionalGeneration"]
    config.save_pretrained(folder)
    processor = make_llava_processor()
    processor.image_processor.size = {"shortest_edge": sizes["image_size"]}
    processor.image_processor.crop_size = {"height": sizes["image_size"], "width": sizes["image_size"]}
    processor.patch_size = sizes["patch_size"]
    processor.save_pretrained(folder)
    return sizes["image_size"]


def measure_all(args: GpuArguments) -> Iterator[dict]:
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("There is no GPU that PyTorch can use. Try the script with --device cpu --tiny True.")
    if "encoder" in args.parts:
        yield from encoder_rows(args)
        if args.device == "cuda":
            torch.cuda.empty_cache()  # vLLM takes most of the memory
    has_vllm = importlib.util.find_spec("vllm") is not None
    for part, rows in {"tokens": token_rows, "speed": speed_rows}.items():
        if part not in args.parts:
            continue
        if has_vllm:
            yield from rows(args)
        else:
            yield {"part": part} | failure(
                'vLLM is not installed: pip install -e ".[vllm]", then --parts tokens speed'
            )


def print_table(rows: list[dict], args: GpuArguments):
    for row in rows:
        cells = []
        for name in SHOWN:
            if name in row:
                value = row[name]
                cells.append(f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}")
        print(", ".join(cells))


def main(argv: list[str] | None = None) -> list[dict]:
    return run_benchmark(GpuArguments, __doc__, measure_all, print_table, argv)


if __name__ == "__main__":
    run_script(main)
