"""Generation of answers with vision-language models of Transformers for evaluations."""

import math
from collections.abc import Sequence
from contextlib import nullcontext

import PIL.Image
import torch
from accelerate import PartialState
from transformers import AutoModelForImageTextToText, AutoProcessor, BatchFeature, ProcessorMixin

from modeling_trips.hosts import TextGuide, apply_patch_selection, record_patch_selection
from modeling_trips.hosts.vlm.families import Llava, Qwen2Vl, Smolvlm, find_family
from modeling_trips.hosts.vlm.wrapper import selection_of


# Overrides the options of the checkpoint.
GREEDY = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}


def encode(
    processor: ProcessorMixin,
    images: list[PIL.Image.Image],
    questions: list[str],
    answers: Sequence[str] = (),
    **options,
) -> BatchFeature:
    """
    Return the inputs of a batch of questions about an image each, padded on the left. The model answers, or continues
    `answers`. Without a chat template, a prompt is an image token and the texts. `options` are further arguments of
    the processor.
    """
    options |= {"padding": True, "return_tensors": "pt"}
    if processor.chat_template is None:
        texts = map("\n".join, zip(questions, answers)) if answers else questions
        prompts = [processor.image_token + text for text in texts]
        return processor(text=prompts, images=[[image] for image in images], **options)
    conversations = []
    for image, question in zip(images, questions):
        content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
        conversations.append([{"role": "user", "content": content}])
    for conversation, answer in zip(conversations, answers):
        conversation.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return processor.apply_chat_template(
        conversations,
        add_generation_prompt=not answers,
        continue_final_message=bool(answers),
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=options,
    )


class VisionLanguageModel:
    """
    Vision-language model with its processor and a selection of patches.

    Args:
        pretrained (`str`): Folder or Hub repository of a model for `AutoModelForImageTextToText`. Its code never runs.
        schedule (`str`, *optional*, defaults to `"unpruned"`): Selection inside the vision tower.
        keep_rate (`float`, *optional*): Share of an image's visual tokens that the language model gets.
        scorer (`str`, *optional*, defaults to `"divprune"`): Scorer of these tokens.
        guide (`str`, *optional*): Folder or Hub repository of a `TextGuide`, for a layer that is scored by the text.
        resolution_tokens (`int`, *optional*): Reduce images to about this number of visual tokens.
        device (`str` or `torch.device`, *optional*): Device. Default: a GPU if there is one.
        dtype (`str`, *optional*, defaults to `"auto"`): Dtype of the weights.

    Raises:
        TypeError: The model does not support a selection.
        ValueError: It is not a vision-language model, does not fit the schedule, or supports no lower resolution.
    """

    def __init__(
        self,
        pretrained: str,
        schedule: str = "unpruned",
        keep_rate: float | None = None,
        scorer: str = "divprune",
        guide: str | None = None,
        resolution_tokens: int | None = None,
        device: str | torch.device | None = None,
        dtype: str = "auto",
    ):
        model = AutoModelForImageTextToText.from_pretrained(
            pretrained, dtype=dtype, use_safetensors=True, trust_remote_code=False
        )
        self.model = model.eval().to(device or PartialState().device)
        self.processor = AutoProcessor.from_pretrained(pretrained, trust_remote_code=False)
        tokenizer = self.processor.tokenizer
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        if resolution_tokens is not None:
            self.lower_resolution(resolution_tokens)
        if schedule != "unpruned" or keep_rate is not None or guide is not None:
            loaded = None if guide is None else TextGuide.from_pretrained(guide).to(self.model.device).eval()
            apply_patch_selection(self.model, schedule, keep_rate=keep_rate, scorer=scorer, guide=loaded)
        self.num_images = 0
        self.num_visual_tokens = 0

    @property
    def visual_tokens_per_image(self) -> float:
        """Mean number of visual tokens in the language model, of all answers so far."""
        return self.num_visual_tokens / self.num_images

    @torch.no_grad()
    def answer(self, images: list[PIL.Image.Image], questions: list[str], max_new_tokens: int = 32) -> list[str]:
        """Answer a batch of questions about an image each by the most probable tokens, at most `max_new_tokens`."""
        inputs = encode(self.processor, images, questions)
        placeholders = inputs["input_ids"] == getattr(self.model.config, "image_token_id", -1)
        inputs = inputs.to(self.model.device, self.model.dtype)
        is_pruned = selection_of(self.model) is not None
        with record_patch_selection(self.model) if is_pruned else nullcontext() as selections:
            outputs = self.model.generate(**inputs, **GREEDY, max_new_tokens=max_new_tokens)
        is_kept = selections[-1].kept_indices >= 0 if is_pruned else placeholders
        self.num_visual_tokens += int(is_kept.sum())
        self.num_images += len(images)
        prompt_length = inputs["input_ids"].shape[1]
        texts = self.processor.batch_decode(outputs[:, prompt_length:], skip_special_tokens=True)
        return [text.strip() for text in texts]

    def lower_resolution(self, visual_tokens: int):
        """
        Reduce images in the processor to at most about this number of visual tokens. LLaVA-1.5 and PaliGemma
        interpolate the tower's position embeddings, SmolVLM and Idefics3 use fewer tiles. Others raise a `ValueError`.
        """
        family = find_family(self.model)
        image_processor = self.processor.image_processor
        if isinstance(family, Qwen2Vl):
            side = family.unit * image_processor.patch_size
            # The processor rounds both sides down, on average by half a unit.
            largest = round((math.sqrt(visual_tokens) + 0.5) ** 2 * side**2)
            size = image_processor.size
            image_processor.size = {"shortest_edge": min(size["shortest_edge"], largest), "longest_edge": largest}
        elif type(family) is Llava:
            config = family.config.vision_config
            grid = min(round(math.sqrt(visual_tokens)), config.image_size // config.patch_size)
            size = grid * config.patch_size
            for name in ("size", "crop_size"):
                current = getattr(image_processor, name, None)
                if current:
                    setattr(image_processor, name, dict.fromkeys(dict(current), size))
            if hasattr(self.processor, "image_seq_length"):  # PaliGemma
                self.processor.image_seq_length = grid**2
            embeddings = getattr(family.tower, "vision_model", family.tower).embeddings
            embeddings.register_forward_pre_hook(_interpolate_positions, with_kwargs=True)
        elif isinstance(family, Smolvlm) and visual_tokens >= family.base.image_seq_len:
            # A square of tiles, and a tile of the whole image.
            tiles = max(1, math.isqrt(visual_tokens // family.base.image_seq_len - 1))
            image_processor.size = {"longest_edge": tiles * image_processor.max_image_size["longest_edge"]}
        else:
            raise ValueError(
                f"Lower resolution is not supported for {type(self.model).__name__}, got {visual_tokens} tokens."
            )


def _interpolate_positions(embeddings: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    return args, {**kwargs, "interpolate_pos_encoding": True}
