"""
Measure time, memory and cache of generative vision-language models with patch selection, at published shapes.

    python benchmarks/vlm_cost.py --num_threads 1 --clock process --output_json docs/results/vlm_cost.json

Weights are random, because time depends only on shapes. Four variants take turns: the unpruned model, visual tokens
dropped after the tower, patches dropped inside the tower, and both. Then the scorers take turns.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from measuring import TimingArguments, check_choices, run_benchmark
from torch import nn
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from modeling_trips.hosts import apply_patch_selection, remove_patch_selection
from modeling_trips.hosts.layers import score_states
from modeling_trips.hosts.vlm.scoring import centered_directions, select_by_prompt, select_diverse
from modeling_trips.modeling_trips_text import CACHE_NAME
from modeling_trips.patch_selection import keep_topk


IMAGE_TOKEN = 10
NEW_TOKENS = 16  # number of tokens for the mean time per token
SIGLIP_BASE = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "patch_size": 16,
}


@dataclass(frozen=True)
class Shape:
    """Model with its image and numbers of kept tokens."""

    make_model: Callable[[], PreTrainedModel]
    make_images: Callable[[int], dict[str, torch.Tensor]]  # from the batch size
    num_visual_tokens: int  # per prompt
    schedule: str
    visual_tokens: int = 64


def make_siglip_384() -> PreTrainedModel:
    """Make a LLaVA from SigLIP-B/16 at 384 pixels and the decoder of Qwen2-0.5B."""
    text = {
        "model_type": "qwen2",
        "hidden_size": 896,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "intermediate_size": 4864,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    }
    vision = {"model_type": "siglip_vision_model", **SIGLIP_BASE, "image_size": 384}
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_id=IMAGE_TOKEN,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
            tie_word_embeddings=True,
        )
    )


def make_smolvlm_256m() -> PreTrainedModel:
    """Make a SmolVLM from SigLIP-B/16 at 512 pixels, with 64 tokens per tile, and SmolLM2-135M."""
    text = {
        "model_type": "llama",
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "vocab_size": 49280,
    }
    vision = {**SIGLIP_BASE, "image_size": 512}
    return SmolVLMForConditionalGeneration(
        SmolVLMConfig(vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN, scale_factor=4)
    )


def make_qwen2_5_vl_3b_tower() -> PreTrainedModel:
    """Make the tower of Qwen2.5-VL-3B with a language model of one small layer."""
    text = {
        "hidden_size": 2048,
        "num_hidden_layers": 1,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "vocab_size": 1000,
        "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
    }
    vision = {
        "depth": 32,
        "hidden_size": 1280,
        "num_heads": 16,
        "intermediate_size": 3420,
        "out_hidden_size": 2048,
        "patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    }
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN)
    )


SHAPES = {
    "siglip_384": Shape(
        make_siglip_384, lambda batch: {"pixel_values": torch.randn(batch, 3, 384, 384)}, 576, "4:image:0.333"
    ),
    # Four tiles of an image, and the whole image.
    "smolvlm_256m": Shape(
        make_smolvlm_256m, lambda batch: {"pixel_values": torch.randn(batch, 5, 3, 512, 512)}, 320, "4:image:0.333"
    ),
    "qwen2_5_vl_3b_tower": Shape(
        make_qwen2_5_vl_3b_tower,
        lambda batch: {
            "pixel_values": torch.randn(batch * 32 * 32, 3 * 2 * 14 * 14),
            "image_grid_thw": torch.tensor([[1, 32, 32]] * batch),
        },
        256,
        "8:image:0.5",
    ),
}
VARIANTS = ("unpruned", "exit", "tower", "tower and exit")


@dataclass(kw_only=True)
class VlmCostArguments(TimingArguments):
    shapes: list[str] = field(default_factory=lambda: list(SHAPES), metadata={"help": f"Of {', '.join(SHAPES)}."})
    batch_sizes: list[int] = field(default_factory=lambda: [1], metadata={"help": "Prompts per batch."})
    text_length: int = field(default=32, metadata={"help": "Tokens of text per prompt."})
    dtype: str = field(default="float32", metadata={"help": "Dtype: float32, bfloat16 or float16."})

    def __post_init__(self):
        super().__post_init__()
        check_choices("--shapes", self.shapes, SHAPES)


def apply(model: PreTrainedModel, variant: str, shape: Shape):
    remove_patch_selection(model)
    if variant != "unpruned":
        schedule = shape.schedule if "tower" in variant else "unpruned"
        apply_patch_selection(model, schedule, visual_tokens=shape.visual_tokens if "exit" in variant else None)


def make_inputs(shape: Shape, batch_size: int, args: VlmCostArguments) -> dict[str, torch.Tensor]:
    ids = torch.randint(11, 1000, (batch_size, 4 + shape.num_visual_tokens + args.text_length - 4))
    ids[:, 4 : 4 + shape.num_visual_tokens] = IMAGE_TOKEN
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **shape.make_images(batch_size)}
    if "image_grid_thw" in inputs:
        inputs["mm_token_type_ids"] = (ids == IMAGE_TOKEN).int()
    dtype = getattr(torch, args.dtype)
    return {
        name: value.to(args.device, dtype if value.is_floating_point() else None) for name, value in inputs.items()
    }


def measure_model(name: str, batch_size: int, args: VlmCostArguments) -> Iterator[dict]:
    """Yield a row per variant."""
    shape = SHAPES[name]
    model = shape.make_model().eval().to(args.device, getattr(torch, args.dtype))
    inputs = make_inputs(shape, batch_size, args)

    def generate(number: int):
        options = {"max_new_tokens": number, "min_new_tokens": number, "do_sample": False}
        return model.generate(**inputs, **options, return_dict_in_generate=True)

    steps = {}
    for variant in VARIANTS:
        steps[variant, 1] = lambda: generate(1)
        steps[variant, 1 + NEW_TOKENS] = lambda: generate(1 + NEW_TOKENS)
    times = args.time_in_turns(steps, ("exit", 1), lambda step: apply(model, step[0], shape))
    for variant in VARIANTS:
        apply(model, variant, shape)
        cache = generate(1)[CACHE_NAME]
        first, more = times[variant, 1], times[variant, 1 + NEW_TOKENS]
        yield {
            "shape": name,
            "variant": variant,
            "batch_size": batch_size,
            "schedule": shape.schedule if "tower" in variant else "unpruned",
            "visual_tokens": shape.num_visual_tokens,
            "cached_tokens": cache.get_seq_length(),
            "cache_bytes": sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers),
            "seconds_to_first_token": first["latency"],
            "ratio_to_exit": first["latency"] / times["exit", 1]["latency"],
            "ratio_to_exit_quartiles": first["time_ratio_quartiles"],
            "seconds_per_token": (more["latency"] - first["latency"]) / NEW_TOKENS,
            "peak_memory_bytes": first["peak_memory_bytes"],
        }
    remove_patch_selection(model)


def select_by_determinant(features: torch.Tensor, relevance: torch.Tensor, num_kept: int) -> torch.Tensor:
    """
    Select tokens like CDPruner (https://arxiv.org/abs/2506.10967): greedy search for the most probable set of a
    determinantal point process, one token per step (https://arxiv.org/abs/1709.05135).
    """
    directions = centered_directions(features)
    kernel = relevance[:, :, None] * (directions @ directions.transpose(1, 2)) * relevance[:, None, :]
    gains = kernel.diagonal(dim1=1, dim2=2).clone()
    images = torch.arange(len(features), device=features.device)
    rows = features.new_zeros(len(features), num_kept, features.shape[1], dtype=torch.float32)
    chosen = []
    for step in range(num_kept):
        best = gains.argmax(dim=-1)
        chosen.append(best)
        own = rows[images, :step, best]
        update = kernel[images, best] - torch.einsum("bs,bsn->bn", own, rows[:, :step])
        update = update / gains[images, best].clamp_min(1e-12).sqrt()[:, None]
        rows[:, step] = update
        gains = gains - update.square()
        gains[images, best] = -torch.inf
    return torch.stack(chosen, dim=1)


def measure_choices(args: VlmCostArguments) -> Iterator[dict]:
    """Time scorers of the 576 patches or visual tokens of one image, at the widths of `siglip_384`."""
    width, heads, tokens, kept = 768, 12, 576, 64
    device, dtype = args.device, getattr(torch, args.dtype)
    states = torch.randn(1, tokens, width, device=device, dtype=dtype)
    projections = nn.Linear(width, 2 * width, device=device, dtype=dtype)
    features = torch.randn(1, tokens, 896, device=device, dtype=dtype)
    prompt = torch.randn(1, args.text_length, 896, device=device, dtype=dtype)
    mask = torch.ones(1, args.text_length, dtype=torch.bool, device=device)
    relevance = torch.rand(1, tokens, device=device)

    def one_query():
        query = nn.functional.linear(states.mean(dim=1), projections.weight[:width]).unflatten(-1, (heads, -1))
        return keep_topk(score_states(query, states, projections.weight[width:], 0.125), kept)

    def full_map():
        query, key = projections(states).unflatten(-1, (2, heads, -1)).transpose(1, 3).unbind(2)
        return keep_topk((query @ key.transpose(2, 3) * 0.125).softmax(dim=-1).mean(dim=(1, 2)), kept)

    steps = {
        "one query, inside the tower": one_query,
        "full attention map, inside the tower": full_map,
        "prompt, 192 tokens at the exit": lambda: select_by_prompt(features[:, :192], prompt, mask, kept),
        "prompt, 576 tokens at the exit": lambda: select_by_prompt(features, prompt, mask, kept),
        "max-min diversity, 576 tokens": lambda: select_diverse(features, prompt, mask, kept),
        "CDPruner's loop, 576 tokens": lambda: select_by_determinant(features, relevance, kept),
    }
    for name, times in args.time_in_turns(steps).items():
        yield {"choice": name, "kept": kept, "milliseconds": 1e3 * times["latency"]}


def measure(args: VlmCostArguments) -> Iterator[dict]:
    settings = args.settings("shapes", "batch_sizes")
    with torch.no_grad():
        for row in measure_choices(args):
            yield settings | row
        for name in args.shapes:
            for batch_size in args.batch_sizes:
                for row in measure_model(name, batch_size, args):
                    yield settings | row


def report(rows: list[dict], args: VlmCostArguments):
    print("\n| choice of 64 | ms |\n|---|---|")
    for row in rows:
        if "choice" in row:
            print(f"| {row['choice']} | {row['milliseconds']:.2f} |")
    print("\n| shape | batch | variant | first token, s | ratio to exit | next token, ms | cache, MB | peak, MB |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        if "variant" in row:
            peak = row["peak_memory_bytes"]
            cells = [
                row["shape"],
                row["batch_size"],
                row["variant"],
                f"{row['seconds_to_first_token']:.3f}",
                f"{row['ratio_to_exit']:.2f}",
                f"{1e3 * row['seconds_per_token']:.1f}",
                f"{row['cache_bytes'] / 1e6:.2f}",
                "" if peak is None else round(peak / 1e6),
            ]
            print(f"| {' | '.join(map(str, cells))} |")


def main(argv: list[str] | None = None) -> list[dict]:
    return run_benchmark(VlmCostArguments, __doc__, measure, report, argv)


if __name__ == "__main__":
    main()
