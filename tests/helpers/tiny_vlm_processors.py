"""Processors of the tiny models of `tiny_vlms`: a vocabulary of words, and images of 32 x 32 pixels."""

from tiny_classes import SMALL
from tiny_vlms import BY_NAME, IMAGE, PAD, QWEN, VISION_END, VISION_START, VIT
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    Idefics3ImageProcessor,
    Idefics3Processor,
    LlavaProcessor,
    PaliGemmaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    SiglipImageProcessor,
)


COLORS = ["red", "green", "blue", "yellow"]
WORDS = [*COLORS, *"what color is it ? which one a the picture same no image".split()]
LLAVA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
)
QWEN_TEMPLATE = LLAVA_TEMPLATE.replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>").replace(
    "{% else %}", "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|> {% else %}"
)


def make_tokenizer(image_token, names=None):
    """
    Return a tokenizer with one token per word, and special tokens with the ids of the tiny models; `names` are those
    from 91 on that a family has instead.
    """
    tokens = [f"w{number}" for number in range(SMALL["vocab_size"])]
    tokens[:4] = ["<unk>", "<pad>", "<s>", "</s>"]
    tokens[5 : 5 + len(WORDS)] = WORDS
    tokens[IMAGE], tokens[VISION_START], tokens[VISION_END] = image_token, "<|vision_start|>", "<|vision_end|>"
    tokens[72:88] = [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]  # of Idefics3
    tokens[93:97] = ["<|video_pad|>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>"]
    for number, name in (names or {}).items():
        tokens[number] = name
    vocabulary = {token: number for number, token in enumerate(tokens)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=[*tokens[72:88], *tokens[IMAGE:97]],
    )
    assert tokenizer.pad_token_id == PAD
    return tokenizer


def make_llava_processor(chat_template=LLAVA_TEMPLATE):
    side = VIT["image_size"]
    image_processor = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return LlavaProcessor(
        image_processor,
        make_tokenizer("<image>"),
        patch_size=VIT["patch_size"],
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=chat_template,
    )


def make_qwen_processor():
    sizes = {"patch_size": QWEN["patch_size"], "merge_size": 2, "temporal_patch_size": 2}
    limits = {"min_pixels": 16 * 16, "max_pixels": 64 * 64}
    return Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(**sizes, **limits),
        make_tokenizer("<|image_pad|>"),
        Qwen2VLVideoProcessor(**sizes, **limits),
        chat_template=QWEN_TEMPLATE,
    )


def save_tiny_vlm(name, folder, processor=None):
    """Save a tiny model with random weights and its processor."""
    model = BY_NAME[name].make()
    model.generation_config.eos_token_id = None  # answers have the maximal length
    model.save_pretrained(folder)
    makers = {
        "idefics3": make_idefics3_processor,
        "llava": make_llava_processor,
        "paligemma": make_paligemma_processor,
        "qwen2_5_vl": make_qwen_processor,
    }
    (processor or makers[name]()).save_pretrained(folder)
    return folder


def make_idefics3_processor():
    """Return a processor for images of at most 128 pixels per side, in tiles of 32 pixels."""
    image_processor = Idefics3ImageProcessor(size={"longest_edge": 128}, max_image_size={"longest_edge": 32})
    tokens = BY_NAME["idefics3"].tokens
    return Idefics3Processor(
        image_processor, make_tokenizer("<image>"), image_seq_len=tokens, chat_template=LLAVA_TEMPLATE
    )


def make_paligemma_processor():
    """Return a processor without a chat template, as in PaliGemma's checkpoints."""
    side = VIT["image_size"]
    image_processor = SiglipImageProcessor(size={"height": side, "width": side})
    image_processor.image_seq_length = BY_NAME["paligemma"].tokens
    tokenizer = make_tokenizer("<image>")
    tokenizer.image_token, tokenizer.image_token_id = "<image>", IMAGE
    return PaliGemmaProcessor(image_processor, tokenizer)


def conversation(text, *images):
    parts = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
