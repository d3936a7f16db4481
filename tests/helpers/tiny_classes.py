"""
Each class behind `AutoModelForImageTextToText` as a tiny model with random weights and images, or as one that is
refused. `python tests/helpers/tiny_classes.py` writes the table of docs/vlm.md from these rows.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from modeling_trips.hosts.vlm.families import NOT_SUPPORTED


PAGE = Path(__file__).resolve().parents[2] / "docs" / "vlm.md"
IMAGE = 90
SIDE = 32
PATCH = 8
# By size: the fields of a configuration that get it.
FIELDS = {
    1: "n_shared_experts first_k_dense_replace n_group topk_group",
    2: "num_hidden_layers depth num_key_value_heads num_experts_per_tok moe_k spatial_merge_size temporal_patch_size "
    "linear_num_key_heads pooling_kernel_size",
    4: "num_attention_heads num_heads linear_num_value_heads mm_tokens_per_image num_experts n_routed_experts "
    "num_local_experts moe_num_experts",
    8: "head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim linear_key_head_dim linear_value_head_dim "
    "global_head_dim patch_size",
    16: "moe_intermediate_size shared_expert_intermediate_size q_lora_rank kv_lora_rank qk_head_dim "
    "num_position_embeddings",
    32: "hidden_size embed_dim out_hidden_size projection_dim text_hidden_size projector_hidden_size "
    "projection_hidden_size adapter_in_dim adapter_out_dim image_size sliding_window",
    48: "intermediate_size mlp_dim projection_intermediate_size",
    120: "vocab_size",
    512: "max_position_embeddings",
}
SMALL = {name: size for size, names in FIELDS.items() for name in names.split()}


def shrink(config, own):
    """Return arguments that make a configuration of this kind tiny; `own` are those of the class."""
    arguments = dict(own)
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            arguments[name] = {"model_type": value.model_type, **shrink(value, own.get(name, {}))}
        elif name in own or value is None or name.startswith("_"):
            continue
        elif name in SMALL:
            is_pair = isinstance(value, (list, tuple))
            arguments[name] = [SMALL[name]] * 2 if is_pair else SMALL[name]
        elif name in ("image_token_id", "image_token_index"):
            arguments[name] = IMAGE
        elif name.endswith(("_token_id", "_token_index", "_token_ids")):
            is_list = isinstance(value, (list, tuple))
            arguments[name] = [91, 92, 93, 94, 95][: len(value)] if is_list else min(value, 91 + len(name) % 25)
        elif name in ("layer_types", "mlp_layer_types"):
            arguments[name] = value[:2]
        elif name == "rope_parameters" and value.get("mrope_section"):
            arguments[name] = {**value, "mrope_section": [2, 1, 1]}
    return arguments


def pixels(index, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(index))


# ---- Formats: arguments of `get_image_features` for one image, by its index --------------------------------------


GRIDS = [(4, 4), (4, 8), (8, 4)]  # patches of images of any size, down and across


def square(index):
    return {"pixel_values": pixels(index, 1, 3, SIDE, SIDE)}


def sized(index):
    return {**square(index), "image_sizes": torch.tensor([[SIDE, SIDE]])}


def packed(frames=2, is_flat=True, **more):
    """Return a format with all patches in one sequence; `frames` of each are in a row of pixels."""

    def image(index):
        down, across = GRIDS[index % len(GRIDS)]
        shape = (3 * frames * PATCH**2,) if is_flat else (3, PATCH, PATCH)
        grid = torch.tensor([[1, down, across]])
        return {
            "pixel_values": pixels(index, down * across, *shape),
            "image_grid_thw": grid,
            **{name: torch.tensor([value]) for name, value in more.items()},
        }

    return image


def tiles(index):
    return {"pixel_values": pixels(index, 1, 1, 3, SIDE, SIDE)}


def masked_tiles(index):
    return {**tiles(index), "pixel_attention_mask": torch.ones(1, 1, dtype=torch.bool)}


def anyres(index):
    return {"pixel_values": pixels(index, 1, 3, 3, SIDE, SIDE), "image_sizes": torch.tensor([[SIDE, 2 * SIDE]])}


def two_sizes(index):
    return {**square(index), "high_res_pixel_values": pixels(index, 1, 3, 2 * SIDE, 2 * SIDE)}


def siglip2(index):
    shape = torch.tensor([[(4, 4), (2, 4), (4, 2)][index % 3]])
    mask = (torch.arange(16) < shape.prod()).long()
    return {
        "pixel_values": pixels(index, 1, 16, 3 * PATCH**2),
        "spatial_shapes": shape,
        "pixel_attention_mask": mask[None],
    }


def strip(index):
    down, across = GRIDS[index % len(GRIDS)]
    return {
        "pixel_values": pixels(index, 1, 3, PATCH, PATCH * down * across),
        "target_sizes": torch.tensor([[down, across]], dtype=torch.int32),
    }


def pooled(index):
    """Patches, and those of each visual token."""
    units = torch.arange(16).view(2, 2, 2, 2).transpose(1, 2).reshape(4, 4)
    grid = torch.tensor([[2, 2, 0, 0]])
    return {
        "pixel_values": pixels(index, 1, 16, 3 * PATCH**2),
        "image_token_pooling": units,
        "image_grids": grid,
        "image_num_crops": torch.tensor([1]),
    }


def placed(index):
    """Patches with their places across and down."""
    places = torch.cartesian_prod(torch.arange(4), torch.arange(4)).flip(1)
    return {"pixel_values": pixels(index, 1, 16, 3 * PATCH**2), "image_position_ids": places[None]}


def raster(index: int) -> dict:
    """Squares of patches of one visual token each, row by row, with the channels last."""
    down, across = (side // 2 for side in GRIDS[index % len(GRIDS)])
    side = 2 * PATCH
    return {
        "pixel_values": pixels(index, down * across, side, side, 3),
        "image_grid_thw": torch.tensor([[1, down, across]]),
    }


def merged(index: int) -> dict:
    """Patches of one visual token each with their places across and down."""
    return {**placed(index), "pixel_values": pixels(index, 1, 16, 3 * (2 * PATCH) ** 2)}


def flat_grid(index: int) -> dict:
    image = FLAT(index)
    grid = image.pop("image_grid_thw")
    return {**image, "image_grid_hw": grid[:, 1:]}


# ---- Rows ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TinyClass:
    """A class that runs, by its title in the table, what its tiny configuration needs, and the format of images."""

    title: str
    image: Callable[[int], dict] = square
    config: dict = field(default_factory=dict)
    # Logits of the same tokens dropped by hand: not where attention or positions depend on the whole image, or where
    # the frame has no embeddings of words.
    by_hand: bool = True
    tolerance: float = 1e-5  # of a batch against its prompts alone, of the largest logit
    quick: bool = False  # also outside of the slow tests
    frame: tuple[int, ...] = ()  # tokens before and after the placeholders of an image, where the model asks for them

    def images(self, first, end):
        images = [self.image(index) for index in range(first, end)]
        joined = {}
        for name in images[0]:
            dim = -1 if self.image is strip and name == "pixel_values" else 0
            joined[name] = torch.cat([image[name] for image in images], dim=dim)
        return joined


def resize(arguments, sizes):
    """Return arguments with other values of some fields, also in parts."""
    if not isinstance(arguments, dict):
        return arguments
    return {name: sizes.get(name, resize(value, sizes)) for name, value in arguments.items()}


def make(name, own, sizes=None):
    """Return a tiny model of the class for a type of model; `sizes` are those of fields that are to be larger."""
    config_class = CONFIG_MAPPING[name]
    arguments = shrink(config_class(), own)
    config = config_class(**resize(arguments, sizes or {}))
    torch.manual_seed(0)
    model = getattr(transformers, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[name])(config).eval()
    model.generation_config.eos_token_id = None
    with torch.no_grad():  # tokens of usual weights are nearly equal
        for parameter in model.parameters():
            if not parameter.isfinite().all() or not parameter.any():
                parameter.normal_(std=0.02)
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    return model


QWEN = packed()
FLAT = packed(frames=1)
CONV = packed(is_flat=False)


def text(**own):
    return {"text_config": own}


def mrope(*section, **own):
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": section, **own.pop("rope", {})}
    return {"rope_parameters": rope, **own}


GLM = text(**mrope(2, 1, 1))
HYBRID = ["linear_attention", "full_attention"]
QWEN3_5 = text(**mrope(2, 1, 1, rope={"partial_rotary_factor": 1.0}), layer_types=HYBRID)
CONVOLUTIONS = text(layer_types=["conv", "full_attention"])
MINICPM = {"image_token_id": IMAGE, "insert_layer_id": 0, "vision_config": {"image_size": 64, "insert_layer_id": 0}}
SAM = {"hidden_size": 32, "output_channels": 32, "global_attn_indexes": [1], "window_size": 2, "image_size": 64}
DEEPSTACK = {"vision_config": {"deepstack_visual_indexes": [0]}}
MOLMO2 = {"image_patch_id": IMAGE, "adapter_config": {"vision_feature_layer": [1, 0], "num_key_value_heads": 4}}
SLIDING = ["sliding_attention", "full_attention"]
PER_LAYER = {"layer_types": SLIDING, "rope_parameters": dict.fromkeys(SLIDING, mrope(2, 1, 1)["rope_parameters"])}
OCR2 = {
    "vision_config": {"sam_config": {"downsample_channels": [32, 32]}},
    **text(mlp_layer_types=["dense", "sparse"], num_experts_per_tok=2),
}
GEMMA4 = {
    "vision_config": {
        "model_type": "gemma4_vision",
        **{
            name: SMALL[name]
            for name in "hidden_size intermediate_size num_hidden_layers num_attention_heads head_dim global_head_dim "
            "patch_size pooling_kernel_size".split()
        },
        "num_key_value_heads": 4,
        "position_embedding_size": 16,
    },
    **text(hidden_size_per_layer_input=0, num_kv_shared_layers=0, global_head_dim=8, layer_types=SLIDING),
}

GEMMA4_UNIFIED = {
    "vision_config": {
        "model_type": "gemma4_unified_vision",
        **{name: SMALL[name] for name in ("patch_size", "pooling_kernel_size")},
        **dict.fromkeys(("mm_embed_dim", "output_proj_dims"), 32),
        "mm_posemb_size": 16,
    },
}
INDEXER = {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_compress_ratio": 4}
QWEN4 = text(
    **GLM["text_config"], **INDEXER, indexer_budget=512, layer_types=["linear_attention", "indexed_attention"]
)
INKLING2 = text(unpadded_vocab_size=120, swa_num_attention_heads=4, swa_num_key_value_heads=2, swa_head_dim=8)
DOTS3 = {"audio_config": {"adapter_input_size": 32}, **text(num_key_value_heads=4)}
MUSE = {"audio_config": {"num_hidden_layers": 4, "hidden_sizes": [8] * 4}, "out_hidden_size": 128}
NEMOTRON = {"vision_config": {"video_temporal_patch_size": 2}, "vision_hidden_size": 32, "image_token_id": IMAGE}
PERCEPTION = {"embed_dim": 32, "depth": 2, "num_heads": 4, "img_size": SIDE, "patch_size": PATCH, "ref_feat_shape": 4}
PERCEPTION |= {"global_pool": "", "use_post_transformer_norm": False, "init_values": 0.1}
TIMM = {"vision_config": {"architecture": "vit_pe_core_large_patch14_336", "model_args": PERCEPTION}}

OVIS2_5_FRAME = (96, 97)
OVIS2_5 = {
    "image_start_token_id": OVIS2_5_FRAME[0],
    "image_end_token_id": OVIS2_5_FRAME[1],
    "vision_config": {"temporal_patch_size": 1},
}

# By type of model, in the order of the table: those that select in their tower, too, and those that do not.
IN_TOWER = {
    "llava": TinyClass("LLaVA-1.5", quick=True),
    "paligemma": TinyClass("PaliGemma", by_hand=False),
    "llava_next": TinyClass("LLaVA-NeXT", anyres, {"image_grid_pinpoints": [[32, 64]]}),
    "llava_onevision": TinyClass("LLaVA-OneVision", anyres, {"image_grid_pinpoints": [[32, 64]]}),
    "gemma3": TinyClass("Gemma 3", by_hand=False),
    "shieldgemma2": TinyClass("ShieldGemma 2", by_hand=False),
    "smolvlm": TinyClass("SmolVLM", tiles, {"scale_factor": 2}),
    "idefics3": TinyClass("Idefics3", tiles, {"scale_factor": 2}),
    "internvl": TinyClass("InternVL"),
    "qwen2_vl": TinyClass("Qwen2-VL", QWEN, GLM),
    "qwen2_5_vl": TinyClass("Qwen2.5-VL", QWEN, GLM),
    "qwen3_vl": TinyClass("Qwen3-VL", QWEN, DEEPSTACK, quick=True),
    "qwen3_vl_moe": TinyClass("Qwen3-VL-MoE", QWEN, DEEPSTACK),
    "qwen3_5": TinyClass("Qwen3.5", QWEN, QWEN3_5),
    "qwen3_5_moe": TinyClass("Qwen3.5-MoE", QWEN, QWEN3_5),
    "glm4v": TinyClass("GLM-4.1V", QWEN, GLM),
    "glm46v": TinyClass("GLM-4.6V", QWEN, GLM),
    "glmga": TinyClass("GLM-GA", QWEN, GLM),
    "glm4v_moe": TinyClass("GLM-4.5V", QWEN, text(**mrope(1, 1, 0))),
}
AT_EXIT = {
    "glm_ocr": TinyClass("GLM-OCR", QWEN, GLM),
    "aria": TinyClass("Aria", config={"projector_patch_to_query_dict": {"16": 8}}),
    "aya_vision": TinyClass("Aya Vision"),
    "cohere2_vision": TinyClass("Command A Vision"),
    "cohere_compass": TinyClass("Cohere Compass", QWEN, {**DEEPSTACK, **text(**PER_LAYER)}),
    "cosmos3_edge": TinyClass("Cosmos3-Edge", FLAT),
    "cosmos3_omni": TinyClass("Cosmos3-Omni", QWEN, DEEPSTACK),
    "deepseek_vl": TinyClass("DeepSeek-VL"),
    "deepseek_vl_hybrid": TinyClass("DeepSeek-VL hybrid", two_sizes, {"high_res_vision_config": SAM}),
    "deepseek_ocr2": TinyClass("DeepSeek-OCR 2", config=OCR2),
    "ernie4_5_vl_moe": TinyClass("ERNIE-4.5-VL", FLAT, text(**mrope(1, 1, 2))),
    "exaone4_5": TinyClass("EXAONE 4.5", QWEN),
    "gemma4": TinyClass("Gemma 4", placed, GEMMA4, by_hand=False),
    "got_ocr2": TinyClass("GOT-OCR 2"),
    "pp_chart2table": TinyClass("PP-Chart2Table"),
    "granite_docling": TinyClass("Granite-Docling", masked_tiles, DEEPSTACK, by_hand=False),
    "hy_v4_vl": TinyClass("HY-V4", FLAT),
    "hyperclovax_vision_v2": TinyClass("HyperCLOVA X", QWEN),
    "idefics2": TinyClass("Idefics2", tiles),
    "janus": TinyClass("Janus"),
    "kimi_k25": TinyClass("Kimi-K2.5", CONV, text(num_key_value_heads=4)),
    "lfm2_vl": TinyClass("LFM2-VL", siglip2, {**CONVOLUTIONS, "vision_config": {"num_patches": 16}}),
    "lfm3_vl": TinyClass("LFM3-VL", QWEN, CONVOLUTIONS),
    "lighton_ocr": TinyClass("LightOnOCR", sized),
    "llava_onevision1_5": TinyClass("LLaVA-OneVision-1.5", FLAT),
    "llava_next_video": TinyClass("LLaVA-NeXT-Video", anyres, {"image_grid_pinpoints": [[32, 64]]}),
    "minicpm_ocr": TinyClass("MiniCPM-OCR", strip, {**MINICPM, **text(layer_types=HYBRID)}),
    "minicpmv4_6": TinyClass("MiniCPM-V 4.6", strip, {**MINICPM, **text(layer_types=["full_attention"] * 2)}),
    "minimax_m3_vl": TinyClass("MiniMax-M3", QWEN),
    "mistral3": TinyClass("Mistral 3", sized, quick=True),
    "mistral_large4": TinyClass("Mistral Large 4", sized, text(num_key_value_heads=4, head_dim=8), tolerance=1e-2),
    "molmo2": TinyClass("Molmo 2", pooled, MOLMO2, by_hand=False),
    "muse_glimmer": TinyClass("Muse Glimmer", QWEN, {"out_hidden_size": 128}),
    "ovis2": TinyClass("Ovis 2"),
    "ovis2_5": TinyClass("Ovis 2.5", FLAT, OVIS2_5, by_hand=False, frame=OVIS2_5_FRAME),
    "paddleocr_vl": TinyClass("PaddleOCR-VL", CONV, GLM),
    "qianfan_ocr": TinyClass("Qianfan-OCR"),
    "step3p7": TinyClass("Step 3.7", config=text(sliding_window=16, layer_types=["full_attention"] * 2)),
    "video_llama_3": TinyClass("VideoLLaMA 3", packed(frames=1, image_merge_sizes=2)),
    "video_llava": TinyClass("Video-LLaVA"),
    "dots3_note": TinyClass("dots3", FLAT, DOTS3),
    "gemma4_unified": TinyClass("Gemma 4 unified", merged, GEMMA4_UNIFIED, by_hand=False),
    "glm5_next": TinyClass("GLM-5-next", QWEN, text(num_key_value_heads=4, qk_rope_head_dim=0, layer_types=HYBRID)),
    "inkling2": TinyClass("Inkling 2", raster, INKLING2),
    "inkling2_loop": TinyClass("Inkling 2 Loop", raster, INKLING2),
    "muse_spark": TinyClass("Muse Spark", QWEN, MUSE),
    "nemotron_h_omni": TinyClass("Nemotron-H-Omni", flat_grid, NEMOTRON),
    "perception_lm": TinyClass("PerceptionLM", tiles, TIMM),
    "qwen4_exp": TinyClass("Qwen4-exp", QWEN, QWEN4),
    "unlimited_ocr": TinyClass("Unlimited-OCR", config={"vision_config": OCR2["vision_config"]}),
    "vipllava": TinyClass("ViP-LLaVA", config={"vision_feature_layers": [-1, -2]}),
}
RUNS = IN_TOWER | AT_EXIT
# By type of model: its name in the table.
REFUSED = {
    "blip": "BLIP captioning",
    "blip-2": "BLIP-2",
    "instructblip": "InstructBLIP",
    "instructblipvideo": "InstructBLIP-Video",
    "chameleon": "Chameleon",
    "emu3": "Emu3",
    "idefics": "Idefics",
    "mllama": "Mllama",
    "pix2struct": "Pix2Struct",
    "pp_formulanet": "PP-FormulaNet",
    "t5gemma2": "T5Gemma 2",
    "vision-encoder-decoder": "VisionEncoderDecoder",
    "kosmos-2": "Kosmos-2",
    "kosmos-2.5": "Kosmos-2.5",
    "evolla": "Evolla",
    "diffusion_gemma": "DiffusionGemma",
    "fast_vlm": "FastVLM",
    "florence2": "Florence-2",
    "fuyu": "Fuyu",
    "git": "GIT",
    "granite4_vision": "Granite 4 Vision",
    "llama4": "Llama 4",
    "mistral4": "Mistral 4",
    "pi0": "Pi0",
    "pi05": "Pi0.5",
    "udop": "UDOP",
    "minicpmv4_7": "MiniCPM-V 4.7",
    "qwen2_5_omni_thinker": "Qwen2.5-Omni",
    "qwen3_omni_moe_thinker": "Qwen3-Omni",
    "apertus1p5": "Apertus 1.5",
    "gemma3n": "Gemma 3n",
    "hunyuan_vl": "HunYuan-VL",
    "inkling_mm_model": "Inkling",
}


def make_refused(name):
    """Return a model of a class that is refused, with its configuration alone."""
    own_class = getattr(transformers, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[name])
    model = own_class.__new__(own_class)
    torch.nn.Module.__init__(model)
    model.config = CONFIG_MAPPING[name]()
    return model


def reason_of(name):
    """Return why a class is refused, as its error says."""
    return NOT_SUPPORTED.get(name, "no visual tokens in its prompt; a schedule for its tower works")


def write_table():
    """Return the table of docs/vlm.md."""
    lines = ["| Model | At the exit | Inside the tower |", "|---|---|---|"]
    for rows, in_tower in ((IN_TOWER, "yes"), (AT_EXIT, "no")):
        titles = [row.title for row in rows.values()]
        lines.append(f"| {', '.join(titles)} | yes | {in_tower} |")
    for reason, names in groupby(sorted(REFUSED, key=reason_of), key=reason_of):
        titles = [REFUSED[name] for name in names]
        lines.append(f"| {', '.join(titles)} | {reason} | |")
    return "\n".join(lines)


def with_table(page):
    return re.sub(r"(<!-- table: classes -->\n).*?(\n<!-- end -->)", rf"\1{write_table()}\2", page, flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text("utf-8")), "utf-8")
