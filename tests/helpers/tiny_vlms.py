"""Tiny generative vision-language models with random weights, and prompts for them."""

from dataclasses import dataclass, field

import pytest
import torch
from tiny_classes import GLM, IMAGE, QWEN3_5, SLIDING, make, mrope


VIT = {"image_size": 32, "patch_size": 4, "num_hidden_layers": 3}
QWEN = {"patch_size": 4, "depth": 3}
PAD, VISION_START, VISION_END = 1, 91, 92
SPECIAL = {"pad_token_id": PAD, "bos_token_id": 2, "eos_token_id": 3}
QWEN_TOKENS = {"vision_start_token_id": VISION_START, "vision_end_token_id": VISION_END, "video_token_id": 93}
PINPOINTS = {"image_grid_pinpoints": [[32, 64], [64, 32], [64, 64], [32, 32]]}
WHOLE = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}


@dataclass(frozen=True)
class Vlm:
    """A family: what its tiny configuration needs, and its format of images."""

    name: str
    vision: dict
    text: dict = field(default_factory=dict)
    config: dict = field(default_factory=dict)
    kind: str = "grid"  # format of the inputs: grid, tiles, anyres, packed
    tokens: int = 64  # visual tokens per image of a grid, or per tile
    num_layers: int = 3  # layers of the tower that may select
    model_type: str | None = None  # if it is not the name

    def make(self, sizes=None):
        parts = {"vision_config": self.vision, "text_config": SPECIAL | self.text}
        return make(self.model_type or self.name, parts | self.config, sizes)


ROPE = GLM["text_config"]
FULL = {**QWEN3_5["text_config"], "layer_types": ["full_attention"] * 2}
ROPE3 = mrope(2, 1, 1, rope={"mrope_interleaved": True})
VLMS = [
    Vlm("llava", VIT, num_layers=2),
    Vlm("llava_next", VIT, {}, PINPOINTS, "anyres", num_layers=2),
    Vlm("llava_onevision", VIT, {}, PINPOINTS, "anyres"),
    Vlm("paligemma", VIT),
    Vlm("gemma3", VIT, {"layer_types": SLIDING, "query_pre_attn_scalar": 8}, {"mm_tokens_per_image": 16}, tokens=16),
    Vlm("smolvlm", VIT, {}, {"scale_factor": 2}, "tiles", tokens=16),
    Vlm("idefics3", VIT, {}, {"scale_factor": 2}, "tiles", tokens=16),
    Vlm(
        "internvl",
        {**VIT, "image_size": [32, 32], "patch_size": [4, 4], "use_qk_norm": True, "norm_type": "rms_norm"},
        tokens=16,
    ),
    Vlm("qwen2_vl", QWEN, ROPE, QWEN_TOKENS, "packed"),
    Vlm("qwen2_5_vl", {**QWEN, "window_size": 16, "fullatt_block_indexes": [1]}, ROPE, QWEN_TOKENS, "packed"),
    Vlm("qwen3_vl", {**QWEN, "deepstack_visual_indexes": [0, 1]}, ROPE3, QWEN_TOKENS, "packed"),
    Vlm(
        "qwen3_vl_moe",
        {**QWEN, "deepstack_visual_indexes": [0, 1]},
        {**ROPE3, "norm_topk_prob": True},  # in published configurations: Transformers always does so, vLLM reads it
        QWEN_TOKENS,
        "packed",
    ),
    Vlm("qwen3_5", QWEN, FULL, QWEN_TOKENS, "packed"),
    Vlm(
        "glm4v",
        QWEN,
        ROPE,
        {
            "image_start_token_id": VISION_START,
            "image_end_token_id": VISION_END,
            "video_token_id": 93,
            "video_start_token_id": 94,
            "video_end_token_id": 95,
        },
        "packed",
    ),
]
# Supported at the exit only.
OTHERS = [Vlm("llava_pixtral", {"model_type": "pixtral", "head_dim": 8, **VIT}, {}, WHOLE, model_type="llava")]
BY_NAME = {vlm.name: vlm for vlm in [*VLMS, *OTHERS]}
SIZES = [(32, 64), (64, 64), (32, 32), (64, 32)]  # sizes of images without a fixed size


def make_images(vlm, counts, seed=0):
    """Return images for prompts with `counts` images each, and the number of visual tokens of each image."""
    generator = torch.Generator().manual_seed(seed)
    number = sum(counts)

    def pixels(*shape):
        return torch.randn(*shape, generator=generator)

    if number == 0:
        return {}, []
    if vlm.kind == "grid":
        inputs = {"pixel_values": pixels(number, 3, 32, 32)}
        if vlm.name == "llava_pixtral":
            inputs["image_sizes"] = torch.tensor([[32, 32]] * number)
        return inputs, [vlm.tokens] * number
    if vlm.kind == "tiles":  # two per image; rows with fewer images are padded with zeros
        images = torch.zeros(len(counts), 2 * max(counts), 3, 32, 32)
        for row, count in enumerate(counts):
            images[row, : 2 * count] = pixels(2 * count, 3, 32, 32)
        return {"pixel_values": images}, [2 * vlm.tokens] * number
    sizes = [SIZES[index % len(SIZES)] for index in range(number)]
    if vlm.kind == "packed":
        grids = torch.tensor([(1, height // 4, width // 4) for height, width in sizes])
        patches = pixels(int(grids.prod(dim=1).sum()), 3 * 2 * 4 * 4)
        return {"pixel_values": patches, "image_grid_thw": grids}, (grids.prod(dim=1) // 4).tolist()
    tiles = [1 + height * width // 32**2 for height, width in sizes]
    images = torch.zeros(number, max(tiles), 3, 32, 32)
    for image, count in zip(images, tiles):
        image[:count] = pixels(count, 3, 32, 32)
    # The base image, and tiles whose rows end with a newline.
    tokens = [64 + (height // 4) * (width // 4 + 1) for height, width in sizes]
    inputs = {"pixel_values": images, "image_sizes": torch.tensor(sizes)}
    if vlm.name == "llava_onevision":
        inputs["batch_num_images"] = torch.ones(number, dtype=torch.long)
    return inputs, tokens


def make_inputs(vlm, counts=(1, 1), padding_side="left", seed=0):
    """Return a batch of prompts with `counts` images each and texts of different lengths."""
    images, tokens = make_images(vlm, list(counts), seed)
    generator = torch.Generator().manual_seed(seed + 1)
    rows, image = [], 0
    for row, count in enumerate(counts):
        ids = [2, *torch.randint(5, 80, (2,), generator=generator).tolist()]
        for _ in range(count):
            ids += [VISION_START, *[IMAGE] * tokens[image], VISION_END]
            image += 1
        ids += torch.randint(5, 80, (5 + row,), generator=generator).tolist()
        rows.append(torch.tensor(ids))
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), PAD)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for row, own in enumerate(rows):
        place = slice(length - len(own), length) if padding_side == "left" else slice(0, len(own))
        ids[row, place], mask[row, place] = own, 1
    inputs = {"input_ids": ids, "attention_mask": mask, **images}
    types = (ids == IMAGE).long()
    if vlm.name in ("paligemma", "gemma3"):
        inputs["token_type_ids"] = types if vlm.name == "gemma3" else torch.zeros_like(ids)
    if vlm.kind == "packed":
        inputs["mm_token_type_ids"] = types
    return inputs


def make_both(name, *args, **options):
    """Return a model, and inputs as `make_inputs` does."""
    vlm = BY_NAME[name]
    return vlm.make(), make_inputs(vlm, *args, **options)


VIDEO = QWEN_TOKENS["video_token_id"]


def make_video_inputs(vlm):
    """Return a prompt with an image and a video of three time steps of 8 visual tokens, apart from Qwen3-VL on."""
    images, (num_tokens,) = make_images(vlm, [1])
    grid = torch.tensor([[3, 4, 8]])
    step = [VISION_START, *[VIDEO] * 8, VISION_END, 7]
    video = step * 3 if vlm.name.startswith("qwen3") else [VISION_START, *[VIDEO] * 24, VISION_END]
    ids = torch.tensor([[2, 11, VISION_START, *[IMAGE] * num_tokens, VISION_END, 12, *video, 13, 14, 15]])
    patches = torch.randn(int(grid.prod()), 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(1))
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == IMAGE).long() + 2 * (ids == VIDEO).long(),
        **images,
        "pixel_values_videos": patches,
        "video_grid_thw": grid,
    }


COUNTS = [1, 2, 0]  # images per prompt
ENCODER_INPUTS = ("pixel_values", "image_sizes", "image_grid_thw", "batch_num_images")
families = pytest.mark.parametrize("vlm", VLMS, ids=lambda vlm: vlm.name)
grid_and_packed = pytest.mark.parametrize("vlm", [BY_NAME["llava"], BY_NAME["qwen2_5_vl"]], ids=lambda vlm: vlm.name)


def rows_alone(vlm, counts):
    """Return the prompts of `make_inputs(vlm, counts)` one by one, without padding."""
    batch = make_inputs(vlm, counts)
    image = patch = 0
    for row, count in enumerate(counts):
        present = batch["attention_mask"][row].bool()
        own = {
            name: value[row : row + 1, present]
            for name, value in batch.items()
            if value.shape[:2] == batch["input_ids"].shape
        }
        if count and vlm.kind == "tiles":
            own["pixel_values"] = batch["pixel_values"][row : row + 1, : 2 * count]
        elif count and vlm.kind == "packed":
            own["image_grid_thw"] = batch["image_grid_thw"][image : image + count]
            length = int(own["image_grid_thw"].prod(dim=1).sum())
            own["pixel_values"] = batch["pixel_values"][patch : patch + length]
            patch += length
        elif count:
            for name in ("pixel_values", "image_sizes", "batch_num_images"):
                if name in batch:
                    own[name] = batch[name][image : image + count]
        image += count
        yield own


def keep_even(features, prompt, prompt_mask, num_kept):
    """Scorer that keeps the even tokens."""
    kept = torch.arange(0, 2 * num_kept, 2).expand(len(features), -1)
    return kept, features[:, ::2][:, :num_kept]
