"""Tiny generative models that vLLM can serve on a CPU: heads are 32 wide. With processors, prompts and references."""

import json
import re
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from strange_pictures import noise
from tiny_classes import GEMMA4, HYBRID, IMAGE, SMALL, mrope
from tiny_vlm_processors import (
    make_idefics3_processor,
    make_llava_processor,
    make_qwen_processor,
    make_tokenizer,
)
from tiny_vlms import (
    BY_NAME,
    FULL,
    QWEN,
    VISION_END,
    VISION_START,
    VIT,
    WHOLE,
    Vlm,
)
from transformers import (
    AutoModelForImageTextToText,
    Gemma3ImageProcessor,
    Gemma3Processor,
    Gemma4AudioFeatureExtractor,
    Gemma4ImageProcessor,
    Gemma4Processor,
    Gemma4VideoProcessor,
    Glm4vImageProcessor,
    Glm4vProcessor,
    Glm4vVideoProcessor,
    GotOcr2ImageProcessor,
    GotOcr2ImageProcessorPil,
    InternVLProcessor,
    InternVLVideoProcessor,
    MiniCPMV4_6ImageProcessor,
    MiniCPMV4_6Processor,
    MiniCPMV4_6VideoProcessor,
    PixtralImageProcessor,
    PixtralProcessor,
    ProcessorMixin,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    SiglipImageProcessor,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from modeling_trips.hosts import TextGuide, apply_patch_selection, remove_patch_selection
from modeling_trips.serving_vllm.settings import IN_TOWER


WIDTHS = {
    "hidden_size": 128,
    "head_dim": 32,
    "out_hidden_size": 128,
    "embed_dim": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "mrope_section": [8, 4, 4],
    "max_position_embeddings": 1024,
}
NUM_TOKENS = 16
PLACEHOLDERS = {  # of an image in a prompt, by the first word of a family's name
    "gemma3": "w29 <start_of_image>",  # lines of two images would meet
    "gemma4": "<|image|>",
    "glm4v": "<|begin_of_image|> <|image|> <|end_of_image|>",
    "minicpmv4": "<|image_pad|>",
    "mistral3": "[IMG]",
    **dict.fromkeys(("qwen2", "qwen3"), "<|vision_start|> <|image_pad|> <|vision_end|>"),
}
GLM_TEXT = mrope(2, 1, 1, rope={"partial_rotary_factor": 1.0})  # else a half in vLLM
GLM_TEXT["attention_bias"] = True  # Transformers has it always, vLLM reads the configuration
GEMMA3 = BY_NAME["gemma3"]
MARKS = {"boi_token_index": VISION_START, "eoi_token_index": VISION_END}
GEMMA4_VISION = {**VIT, "position_embedding_size": 64, "default_output_length": 70}  # the length is read by vLLM
GEMMA4_TEXT = {
    **GEMMA4["text_config"],
    "global_head_dim": 32,
    "sliding_window": 512,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": SMALL["vocab_size"],
}
GEMMA4_TOKENS = {
    "boi_token_id": VISION_START,
    "eoi_token_id": VISION_END,
    "video_token_id": 93,
    "audio_token_id": 94,
    "boa_token_id": 95,
    "eoa_token_index": 96,
}
MINICPM_CONFIG = {"image_token_id": IMAGE, "image_size": 448, "insert_layer_id": 0, "video_token_id": 93}
VLMS = {
    **{
        name: BY_NAME[name]
        for name in ("llava", "idefics3", "internvl", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "smolvlm")
    },
    "llava_siglip": Vlm("llava_siglip", {"model_type": "siglip_vision_model", **VIT}, {}, WHOLE, model_type="llava"),
    "internvl_chat": BY_NAME["internvl"],
    "gemma3": replace(GEMMA3, text={**GEMMA3.text, "query_pre_attn_scalar": 32}, config={**GEMMA3.config, **MARKS}),
    "glm4v": replace(BY_NAME["glm4v"], text=GLM_TEXT),
    "mistral3": Vlm("mistral3", {**VIT, "image_size": 64}, {"sliding_window": None}),
    "gemma4": Vlm("gemma4", GEMMA4["vision_config"] | GEMMA4_VISION, GEMMA4_TEXT, GEMMA4_TOKENS),
    "minicpmv4_6": Vlm("minicpmv4_6", {**VIT, "insert_layer_id": 0}, FULL, MINICPM_CONFIG),
}
# What vLLM does not compute on CPUs, for `benchmarks/on_a_gpu.py`.
LINEAR = {"layer_types": HYBRID, "linear_key_head_dim": 32}
BOTH_WAYS = {"use_bidirectional_attention": "vision"}
VLMS["minicpmv4_6_linear"] = replace(VLMS["minicpmv4_6"], text=FULL | LINEAR)
VLMS["gemma4_both_ways"] = replace(VLMS["gemma4"], text=GEMMA4_TEXT | BOTH_WAYS)


def make_siglip_processor():
    processor = make_llava_processor()
    side = VIT["image_size"]
    processor.image_processor = SiglipImageProcessor(size={"height": side, "width": side})
    processor.vision_feature_select_strategy = "full"
    processor.num_additional_image_tokens = 0
    return processor


def name_tokens(tokenizer, tokens):
    """Let the tokenizer have special tokens under these names, also when it is saved."""
    for name, token in tokens.items():
        tokenizer.init_kwargs[f"{name}_token"] = token
        setattr(tokenizer, f"{name}_token", token)
        setattr(tokenizer, f"{name}_token_id", tokenizer.convert_tokens_to_ids(token))


def make_internvl_processor():
    """Return a processor for images of up to 4 tiles."""
    side = {"height": VIT["image_size"], "width": VIT["image_size"]}
    tokens = {"start_image": "<|vision_start|>", "end_image": "<|vision_end|>", "context_image": "<image>"}
    tokenizer = make_tokenizer("<image>")
    name_tokens(tokenizer, {**tokens, "video": "<|video_pad|>"})
    return InternVLProcessor(
        GotOcr2ImageProcessor(size=side, crop_to_patches=True, min_patches=1, max_patches=4),
        tokenizer,
        InternVLVideoProcessor(size=side),
        image_seq_length=BY_NAME["internvl"].tokens,
    )


def make_internvl_chat_processor():
    """Return a processor that treats images as vLLM does in the published form."""
    processor = make_internvl_processor()
    image_processor = GotOcr2ImageProcessorPil(size=processor.image_processor.size)
    image_processor.crop_to_patches = True
    image_processor.max_patches = 4
    image_processor.image_mean = IMAGENET_DEFAULT_MEAN
    image_processor.image_std = IMAGENET_DEFAULT_STD
    processor.image_processor = image_processor
    return processor


def make_qwen3_processor():
    processor = make_qwen_processor()
    return Qwen3VLProcessor(
        processor.image_processor,
        processor.tokenizer,
        Qwen3VLVideoProcessor(
            patch_size=QWEN["patch_size"],
            merge_size=2,
            temporal_patch_size=2,
            size={"shortest_edge": 16 * 16, "longest_edge": 64 * 64 * 8},
            image_mean=processor.image_processor.image_mean,
            image_std=processor.image_processor.image_std,
        ),
        chat_template=processor.chat_template,
    )


def make_smolvlm_processor():
    """Return a processor of images in tiles of 32 pixels, as that of Idefics3. It needs num2words."""
    processor = make_idefics3_processor()
    image_processor = SmolVLMImageProcessor(size={"longest_edge": 128}, max_image_size={"longest_edge": 32})
    return SmolVLMProcessor(
        image_processor,
        processor.tokenizer,
        SmolVLMVideoProcessor(),
        image_seq_len=BY_NAME["smolvlm"].tokens,
        chat_template=processor.chat_template,
    )


def make_glm_processor():
    names = {VISION_START: "<|begin_of_image|>", VISION_END: "<|end_of_image|>", 93: "<|video|>"}
    tokenizer = make_tokenizer("<|image|>", {**names, 94: "<|begin_of_video|>", 95: "<|end_of_video|>"})
    sizes = {"patch_size": QWEN["patch_size"], "merge_size": 2, "temporal_patch_size": 2}
    limits = {"size": {"shortest_edge": 16 * 16, "longest_edge": 64 * 64}}
    return Glm4vProcessor(Glm4vImageProcessor(**sizes, **limits), tokenizer, Glm4vVideoProcessor(**sizes, **limits))


def make_mistral_processor():
    return PixtralProcessor(
        PixtralImageProcessor(size={"longest_edge": 64}, patch_size=VIT["patch_size"]),
        make_tokenizer("[IMG]", {VISION_START: "[IMG_BREAK]", VISION_END: "[IMG_END]"}),
        patch_size=VIT["patch_size"],
        spatial_merge_size=2,
    )


def make_gemma3_processor():
    lines = {number: "\n" * count for count, number in enumerate(range(72, 76), start=1)}
    tokenizer = make_tokenizer(
        "<image_soft_token>", {**lines, VISION_START: "<start_of_image>", VISION_END: "<end_of_image>"}
    )
    name_tokens(tokenizer, {"boi": "<start_of_image>", "image": "<image_soft_token>", "eoi": "<end_of_image>"})
    side = {"height": VIT["image_size"], "width": VIT["image_size"]}
    return Gemma3Processor(Gemma3ImageProcessor(size=side), tokenizer, image_seq_length=BY_NAME["gemma3"].tokens)


def make_gemma_processor():
    tokens = {"boi": "<|image>", "image": "<|image|>", "eoi": "<image|>"}
    tokens |= {"audio": "<|audio|>", "boa": "<|audio>", "eoa": "<audio|>"}
    names = {VISION_START: "<|image>", VISION_END: "<image|>", 93: "<|video|>", 94: "<|audio|>"}
    tokenizer = make_tokenizer("<|image|>", {**names, 95: "<|audio>", 96: "<audio|>"})
    name_tokens(tokenizer, tokens)
    sizes = {"patch_size": VIT["patch_size"], "pooling_kernel_size": 2, "max_soft_tokens": 70}
    return Gemma4Processor(
        Gemma4AudioFeatureExtractor(), Gemma4ImageProcessor(**sizes), tokenizer, Gemma4VideoProcessor(**sizes)
    )


def make_minicpm_processor():
    """Return a processor for images of up to 4 slices of about 32 pixels."""
    names = {VISION_START: "<image>", VISION_END: "</image>", 94: "<slice>", 95: "</slice>", 72: "<image_id>"}
    tokenizer = make_tokenizer("<|image_pad|>", {**names, 73: "</image_id>"})
    tokens = {"image": "<|image_pad|>", "video": "<|video_pad|>", "image_start": "<image>", "image_end": "</image>"}
    tokens |= {"slice_start": "<slice>", "slice_end": "</slice>"}
    name_tokens(tokenizer, {**tokens, "image_id_start": "<image_id>", "image_id_end": "</image_id>"})
    sizes = {"patch_size": VIT["patch_size"], "scale_resolution": 32, "max_slice_nums": 4}
    return MiniCPMV4_6Processor(MiniCPMV4_6ImageProcessor(**sizes), MiniCPMV4_6VideoProcessor(**sizes), tokenizer)


PROCESSORS = {
    "llava": make_llava_processor,
    "llava_siglip": make_siglip_processor,
    "idefics3": make_idefics3_processor,
    "internvl": make_internvl_processor,
    "internvl_chat": make_internvl_chat_processor,
    "gemma3": make_gemma3_processor,
    "gemma4": make_gemma_processor,
    "glm4v": make_glm_processor,
    "minicpmv4_6": make_minicpm_processor,
    "mistral3": make_mistral_processor,
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl"), make_qwen_processor),
    **dict.fromkeys(("qwen3_vl", "qwen3_vl_moe"), make_qwen3_processor),
    "minicpmv4_6_linear": make_minicpm_processor,
    "gemma4_both_ways": make_gemma_processor,
}
if find_spec("num2words"):
    PROCESSORS["smolvlm"] = make_smolvlm_processor


@dataclass(frozen=True)
class Selection:
    """Arguments of `apply_patch_selection`."""

    schedule: str = "unpruned"
    visual_tokens: int | None = None
    scorer: str = "divprune"
    keep_rate: float | None = None

    @property
    def is_by_text(self):
        return "text" in self.schedule

    def overrides(self, folder):
        """Return what the overrides of a configuration in vLLM set."""
        settings = {
            "schedule": self.schedule,
            "visual_tokens": self.visual_tokens,
            "keep_rate": self.keep_rate,
            "visual_scorer": self.scorer,
            "text_guide": str(folder / "guide") if self.is_by_text else None,
        }
        return {"patch_selection": settings}


class ServedVlm:
    """A saved tiny model with its processor, prompts with images, and greedy tokens of Transformers."""

    def __init__(self, name, folder):
        self.name = name
        self.folder = folder
        model = VLMS[name].make(WIDTHS)
        model.save_pretrained(folder)
        PROCESSORS[name]().save_pretrained(folder)
        self.guide = None
        if model.config.model_type in IN_TOWER:
            self.guide = TextGuide.for_model(model)
            self.guide.save_pretrained(folder / "guide")
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        self.processor: ProcessorMixin = PROCESSORS[name]()
        if name.startswith(("gemma3", "llava")) or name.endswith("_moe"):
            store_as_published(folder / "model.safetensors")
        if name == "internvl_chat":
            store_internvl_chat(self.model, folder)
        self.images = []
        for seed, size in enumerate([(64, 32), (96, 64), (32, 32)]):
            self.images.append(folder / f"{seed}.png")
            noise(*size, seed).save(self.images[-1])

    @property
    def prompts(self):
        """
        Different images and questions, an image under two questions, two images in a prompt, a question before its
        image, and an image alone.
        """
        image = PLACEHOLDERS.get(self.name.partition("_")[0], "<image>")
        end = " ".join(f"w{number}" for number in range(30, 46))
        first, second, third = map(str, self.images)
        return [
            (f"<s> the {image} what color is it ? {end}", [first]),
            (f"<s> the {image} which picture ? {end}", [second]),
            (f"<s> the {image} is it red ? {end}", [first]),
            (f"<s> the {image} {image} which one ? {end}", [third, first]),
            (f"<s> what color is it ? {end} {image}", [second]),
            (image, [first]),
        ]

    def lengths(self):
        """Return the number of tokens of each prompt without selection."""
        lengths = []
        for text, files in self.prompts:
            images = [Image.open(file) for file in files]
            (ids,) = self.processor(text=text, images=images)["input_ids"]
            lengths.append(len(ids))
        return lengths

    def reference(self, selection):
        """Return the greedy tokens of each prompt, one by one, and their log-probabilities."""
        tokens = []
        logprobs = []
        with self.selecting(selection):
            for text, files in self.prompts:
                row = self.generate(text, [Image.open(file) for file in files])
                tokens.append(row[0])
                logprobs.append(row[1])
        return tokens, torch.stack(logprobs)

    @contextmanager
    def selecting(self, selection):
        """Let the model select."""
        apply_patch_selection(
            self.model,
            selection.schedule,
            visual_tokens=selection.visual_tokens,
            keep_rate=selection.keep_rate,
            scorer=selection.scorer,
            guide=self.guide if selection.is_by_text else None,
        )
        try:
            yield
        finally:
            remove_patch_selection(self.model)

    def generate(self, text, images):
        inputs = self.processor(text=text, images=images, return_tensors="pt")
        inputs.pop("token_type_ids", None)  # Gemma 3 then is causal within images, too, as in vLLM on CPUs
        outputs = self.model.generate(
            **inputs,
            max_new_tokens=NUM_TOKENS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        tokens = outputs.sequences[0, inputs["input_ids"].shape[1] :]
        logprobs = torch.cat(outputs.logits).log_softmax(dim=-1)
        return tokens.tolist(), logprobs.gather(1, tokens[:, None])[:, 0]


def store_as_published(file):
    """Use names and shapes of published checkpoints: vLLM 0.32 does not know what Transformers writes since 5.19."""
    weights = {}
    for name, weight in load_file(file).items():
        name = re.sub(r"vision_tower\.(?!vision_model)", "vision_tower.vision_model.", name)
        if ".experts." in name:
            weight = weight.transpose(1, 2).contiguous()
        weights[name] = weight
    save_file(weights, file, metadata={"format": "pt"})


INTERNVL_CHAT_NAMES = {
    r"model\.vision_tower\.": "vision_model.",
    r"embeddings\.cls_token": "embeddings.class_embedding",
    r"embeddings\.position_embeddings": "embeddings.position_embedding",
    r"embeddings\.patch_embeddings\.projection": "embeddings.patch_embedding",
    r"encoder\.layer\.": "encoder.layers.",
    r"attention\.projection_layer": "attn.proj",
    r"attention\.": "attn.",
    r"lambda_": "ls",
    r"layernorm_before": "norm1",
    r"layernorm_after": "norm2",
    r"model\.multi_modal_projector\.layer_norm": "mlp1.0",
    r"model\.multi_modal_projector\.linear_1": "mlp1.1",
    r"model\.multi_modal_projector\.linear_2": "mlp1.3",
    r"model\.language_model\.": "language_model.model.",
    r"lm_head": "language_model.lm_head",
}
INTERNVL_CHAT_CONFIG = """
from transformers import PreTrainedConfig, Qwen2Config

class InternVLChatConfig(PreTrainedConfig):
    model_type = "internvl_chat"

    def __init__(self, vision_config=None, llm_config=None, **kwargs):
        super().__init__(**kwargs)
        self.vision_config = PreTrainedConfig(**(vision_config or {}))
        self.llm_config = Qwen2Config(**(llm_config or {}))
"""


def store_internvl_chat(model, folder):
    """Replace what Transformers saved of InternVL by the published form, which it does not have."""
    weights = {}
    for name, weight in model.state_dict().items():
        for old, new in INTERNVL_CHAT_NAMES.items():
            name = re.sub(old, new, name)
        weights[name] = weight.clone()  # the head may be tied
    for name in [name for name in weights if ".attn.q_proj." in name]:
        parts = [weights.pop(name.replace("q_proj", part)) for part in ("q_proj", "k_proj", "v_proj")]
        weights[name.replace("q_proj", "qkv")] = torch.cat(parts)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    vision = model.config.vision_config
    side = vision.image_size[0]
    config = {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "auto_map": {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"},
        "vision_config": {
            **vision.to_dict(),
            "model_type": "intern_vit_6b",
            "image_size": side,
            "patch_size": vision.patch_size[0],
            "qkv_bias": vision.attention_bias,
            "qk_normalization": vision.use_qk_norm,
            "initializer_factor": 1.0,
        },
        "llm_config": {
            **model.config.text_config.to_dict(),
            "architectures": ["Qwen2ForCausalLM"],
            "tie_word_embeddings": False,
        },
        "force_image_size": side,
        "downsample_ratio": model.config.downsample_ratio,
        "ps_version": "v2",
        "select_layer": -1,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 4,
        "dynamic_image_size": True,
        "use_thumbnail": True,
    }
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    (folder / "configuration_internvl_chat.py").write_text(INTERNVL_CHAT_CONFIG, "utf-8")
    for file in folder.glob("tokenizer*.json"):
        text = file.read_text("utf-8")
        for old, new in {"<image>": "<IMG_CONTEXT>", "<|vision_start|>": "<img>", "<|vision_end|>": "</img>"}.items():
            text = text.replace(f'"{old}"', f'"{new}"')
        file.write_text(text, "utf-8")
