"""Parts that both kinds of models share: the question in the hash of the image, and the selection itself."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial

import torch
from prometheus_client import Counter
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, tensor_model_parallel_all_reduce
from vllm.logger import init_logger
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.processing import BaseMultiModalProcessor, ProcessorInputs, PromptUpdateDetails

from ..hosts.vlm.families import Family
from ..hosts.vlm.pruning import select_at_exit
from ..hosts.vlm.tower import TowerLayer
from .settings import ServingSettings, find_question, split_calls


logger = init_logger("vllm.trips")  # vLLM's format and level
QUESTION = "question_ids"
OPTIONS = {QUESTION, "patch_selection"}  # of the image's processor, for the hash only
# Processors run in the process that serves /metrics. vLLM removes foreign counters whose names begin with its own.
VISUAL_TOKENS = Counter("trips_visual_tokens", "Visual tokens of the images in prompts.", ["state"])


class SelectionProcessor(BaseMultiModalProcessor):
    """
    Processor that passes the question to the model where it decides. The question and the settings become options of
    the image's processor. vLLM hashes these options with the image, so its caches never mix them.
    """

    @cached_property
    def settings(self) -> ServingSettings:
        return ServingSettings.of(self.info.get_hf_config())

    @property
    def image_token_id(self) -> int:
        return self.info.get_hf_config().image_token_id

    def apply(self, inputs: ProcessorInputs, *args, **kwargs):
        options = {**inputs.hf_processor_mm_kwargs, "patch_selection": str(self.settings)}
        if self.settings.reads_prompt:
            options[QUESTION] = find_question(inputs.prompt, self.image_token_id)
        return super().apply(replace(inputs, hf_processor_mm_kwargs=options), *args, **kwargs)

    def _apply_hf_processor_main(self, mm_items, hf_kwargs: Mapping[str, object]):
        outputs = super()._apply_hf_processor_main(mm_items, without_own(hf_kwargs))
        if "pixel_values" in outputs and self.settings.reads_prompt:
            outputs[QUESTION] = [torch.tensor(hf_kwargs[QUESTION], dtype=torch.long)] * mm_items.get_count("image")
        return outputs

    def _get_mm_fields_config(self, hf_inputs, hf_processor_mm_kwargs) -> Mapping[str, MultiModalFieldConfig]:
        fields = dict(super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs))
        if QUESTION in hf_inputs:
            fields[QUESTION] = MultiModalFieldConfig.batched("image")
        return fields

    def _get_prompt_updates(self, mm_items, hf_processor_mm_kwargs, out_mm_kwargs):
        tiles = [num_tiles(image) for image in out_mm_kwargs.get("image", [])]
        updates = super()._get_prompt_updates(mm_items, without_own(hf_processor_mm_kwargs), out_mm_kwargs)
        return [replace(update, replacement=partial(self.shorten, update.replacement, tiles)) for update in updates]

    def shorten(self, replacement: Callable, tiles: list[int], item: int) -> PromptUpdateDetails:
        """Return the tokens that replace an image's placeholder."""
        whole = replacement(item)
        ids = torch.tensor(whole if isinstance(whole, list) else whole.full)
        is_visual = ids == self.image_token_id
        size = int(is_visual.sum()) // max(1, tiles[item])
        is_kept = ~is_visual | ((is_visual.cumsum(0) - 1) % size < (self.num_kept(size) if tiles[item] else size))
        kept = PromptUpdateDetails.select_token_id(ids[is_kept].tolist(), self.image_token_id)
        kept.num_dropped = int((~is_kept).sum())  # for the counters
        return kept

    def num_kept(self, size: int) -> int:
        """Return how many tokens of an image (or tile) are kept."""
        return self.settings.at_exit.num_kept(size, self.settings.num_kept_in_tower(size))

    def _maybe_apply_prompt_updates(self, mm_items, mm_res):
        for (own,) in mm_res.prompt_updates.get("image", []):
            VISUAL_TOKENS.labels("kept").inc(own.content.full.count(self.image_token_id))
            VISUAL_TOKENS.labels("dropped").inc(own.content.num_dropped)
        return super()._maybe_apply_prompt_updates(mm_items, mm_res)


def num_tiles(image: Mapping) -> int:
    """Return the number of tiles of an image, 0 for embeddings of the caller, which stay as they are."""
    if {"pixel_values", "num_image_patches"} <= image.keys() and "image_grid_thw" not in image:
        return int(image["num_image_patches"].data)
    return int("pixel_values" in image)


def without_own(options: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in options.items() if name not in OPTIONS}


class ServedLayer(TowerLayer):
    """Selection layer under tensor parallelism: each process scores by its own heads."""

    def score(self, query: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        num_heads = self.project_query(states[:, 0]).shape[1]
        if num_heads < query.shape[1]:  # a guide makes the query of all heads
            query = query.split(num_heads, dim=1)[get_tensor_model_parallel_rank()]
        return tensor_model_parallel_all_reduce(super().score(query, states))


def check_engine(vllm_config: VllmConfig, settings: ServingSettings):
    """Raise a ValueError if the engine would bypass the selection, or answer wrongly under it."""
    compilation, lora = vllm_config.compilation_config, vllm_config.lora_config
    refused = {
        "compile_mm_encoder": compilation.compile_mm_encoder,
        "cudagraph_mm_encoder": compilation.cudagraph_mm_encoder,
        "enable_tower_connector_lora": lora is not None and lora.enable_tower_connector_lora,
    }
    for option, is_set in refused.items():
        if is_set:
            raise ValueError(f"Patch selection does not support `{option}`. Start without it.")
    num_stages = vllm_config.parallel_config.pipeline_parallel_size
    if num_stages > 1 and vllm_config.model_config.uses_mrope:
        raise ValueError(
            f"`pipeline_parallel_size` must be 1 for this model, got {num_stages}: only the first stage has the "
            "positions of the kept tokens. Use `tensor_parallel_size`."
        )
    if vllm_config.is_mm_encoder_only and settings.reads_prompt:
        raise ValueError(
            "An instance for the encoder only has no embeddings of the question. Set a `visual_scorer` that chooses "
            "by the image."
        )


class SelectingModel(nn.Module):
    """Model of vLLM that selects patches."""

    def select_patches(self, family: Family, vllm_config: VllmConfig):
        """Replace layers of the tower by selection layers, where the settings fit the model and the engine."""
        self.settings, self.family = ServingSettings.of(family.config), family
        check_engine(vllm_config, self.settings)
        guide = self.settings.check_fits(family)
        # A list hides the guide from vLLM, which expects its weights in the model's checkpoint.
        self.guides = [] if guide is None else [guide.to(vllm_config.device_config.device)]
        family.wrap_layers(self.settings.tower)
        self.max_tokens = vllm_config.scheduler_config.max_num_encoder_input_tokens
        log = logger.warning if self.settings.keeps_all else logger.info
        log("Patch selection %s.", self.settings.describe(family.tokens_per_image))

    def split(self, pixel_values: torch.Tensor, counts: list[int]) -> list[slice]:
        """
        Return the images of each call of the encoder; an image has `counts` rows of `pixel_values`. vLLM plans by kept
        tokens, but patches take the memory, so a call gets no more of them than without selection.
        """
        if pixel_values.dim() == 2:  # Qwen-VL: a row is a patch
            total = len(pixel_values) // self.family.unit**2
        else:  # tiles
            side = pixel_values.shape[-1] // self.family.unit
            tile = self.family.tokens_per_image or (side // self.family.config.vision_config.patch_size) ** 2
            total = pixel_values[..., 0, 0, 0].numel() * tile
        return split_calls([count * total // sum(counts) for count in counts], self.max_tokens)

    def query(self, questions: Sequence[torch.Tensor] | None) -> torch.Tensor | None:
        """Return the queries of the guide, `(num_images, num_heads, head_dim)`, or `None` without one."""
        return self.guides[0](*self.embed_questions(questions)) if self.guides else None

    def embed_questions(self, questions: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the input embeddings `(num_images, length, width)` of the questions, and their mask."""
        # The padding also gives an empty question a position, which the mask leaves out.
        ids = nn.utils.rnn.pad_sequence([nn.functional.pad(own, (0, 1)) for own in questions], batch_first=True)
        mask = torch.arange(ids.shape[1]) < torch.tensor([[len(question)] for question in questions])
        return self.embed_input_ids(ids.flatten()).unflatten(0, ids.shape), mask.to(ids.device)

    def select_tokens(
        self, groups: Sequence[torch.Tensor], questions: Sequence[torch.Tensor] | None, sizes: list[int]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
        """
        Select after the tower, in batches of images (or tiles) of equal size: `groups` of shape `(num_tokens, width)`,
        where the tower has kept `num_tokens` of `sizes`. Return the kept tokens of each, and their positions in the
        group; `None` stands for all.
        """
        text = partial(self.embed_questions, questions)
        return select_at_exit(text, list(range(len(groups))), sizes, list(groups), self.settings.at_exit)
