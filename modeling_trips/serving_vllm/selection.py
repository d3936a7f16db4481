"""Parts that both kinds of models share: the question in the hash of the image, and the selection itself."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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
from ..hosts.vlm.tower import TowerLayer
from ..hosts.vlm.visual_tokens import VisualTokens, special_token_ids
from .settings import REQUEST_KEYS, ServingSettings, find_question, split_calls


logger = init_logger("vllm.trips")  # vLLM's format and level
# Inputs of the model for each image: the token ids of its question, and its request's number or rate.
QUESTION = "question_ids"
CHOICE = "visual_tokens_and_rate"
OPTIONS = {QUESTION, "patch_selection", *REQUEST_KEYS}  # of the image's processor, which do not reach Transformers
# Processors run in the process that serves /metrics. vLLM removes foreign counters whose names begin with its own.
VISUAL_TOKENS = Counter("trips_visual_tokens", "Visual tokens of the images in prompts.", ["state"])


class SelectionProcessor(BaseMultiModalProcessor):
    """
    Processor that passes the request's settings to the model, and the question where it decides. Both become options
    of the image's processor. vLLM hashes these options with the image, so its caches never mix them.
    """

    pixels = "pixel_values"  # the processor's output

    @cached_property
    def settings(self) -> ServingSettings:
        return ServingSettings.of(self.info.get_hf_config())

    @property
    def image_token_id(self) -> int:
        return self.info.get_hf_config().image_token_id

    def apply(self, inputs: ProcessorInputs, *args, **kwargs):
        settings = self.settings_of(inputs.hf_processor_mm_kwargs)
        options = {**inputs.hf_processor_mm_kwargs, "patch_selection": str(settings)}
        if settings.reads_prompt:
            special_ids = special_token_ids(self.info.get_hf_config())
            options[QUESTION] = find_question(inputs.prompt, self.image_token_id, special_ids)
        return super().apply(replace(inputs, hf_processor_mm_kwargs=options), *args, **kwargs)

    def settings_of(self, options: Mapping[str, object]) -> ServingSettings:
        """Return the settings of a request with these options. Raise a ValueError if they do not fit the model."""
        settings = self.settings.of_request(options)
        settings.check_type(self.info.get_hf_config())
        return settings

    def _apply_hf_processor_main(self, mm_items, hf_kwargs: Mapping[str, object]):
        outputs = super()._apply_hf_processor_main(mm_items, without_own(hf_kwargs))
        if self.pixels in outputs:
            num_images = mm_items.get_count("image")
            outputs[CHOICE] = [self.settings_of(hf_kwargs).encode()] * num_images
            if QUESTION in hf_kwargs:
                outputs[QUESTION] = [torch.tensor(hf_kwargs[QUESTION], dtype=torch.long)] * num_images
        return outputs

    def _get_mm_fields_config(self, hf_inputs, hf_processor_mm_kwargs) -> Mapping[str, MultiModalFieldConfig]:
        fields = dict(super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs))
        for name in (CHOICE, QUESTION):
            if name in hf_inputs:
                fields[name] = MultiModalFieldConfig.batched("image", keep_on_cpu=name == CHOICE)
        return fields

    def _get_prompt_updates(self, mm_items, hf_processor_mm_kwargs, out_mm_kwargs):
        settings = self.settings_of(hf_processor_mm_kwargs)
        tiles = [num_tiles(image) for image in out_mm_kwargs.get("image", [])]
        updates = super()._get_prompt_updates(mm_items, without_own(hf_processor_mm_kwargs), out_mm_kwargs)
        return [
            replace(update, replacement=partial(self.shorten, settings, update.replacement, tiles))
            for update in updates
        ]

    def shorten(
        self, settings: ServingSettings, replacement: Callable, tiles: list[int], item: int
    ) -> PromptUpdateDetails:
        """Return the tokens that replace an image's placeholder: of each tile, as many visual tokens as it keeps."""
        whole = replacement(item)
        ids = whole if isinstance(whole, list) else whole.full
        num_visual = ids.count(self.image_token_id)
        size = num_visual // max(1, tiles[item])
        num_kept = self.num_kept(settings, size) if tiles[item] else size
        kept_ids = []
        place = 0  # of the next visual token
        for token in ids:
            if token != self.image_token_id:
                kept_ids.append(token)
            else:
                if place % size < num_kept:
                    kept_ids.append(token)
                place += 1
        kept = PromptUpdateDetails.select_token_id(kept_ids, self.image_token_id)
        kept.num_dropped = len(ids) - len(kept_ids)  # for the counters
        return kept

    def num_kept(self, settings: ServingSettings, size: int) -> int:
        """Return how many tokens of an image (or tile) are kept."""
        return settings.at_exit.num_kept(size, settings.num_kept_in_tower(size))

    def _maybe_apply_prompt_updates(self, mm_items, mm_res):
        for (update,) in mm_res.prompt_updates.get("image", []):
            VISUAL_TOKENS.labels("kept").inc(update.content.full.count(self.image_token_id))
            VISUAL_TOKENS.labels("dropped").inc(update.content.num_dropped)
        return super()._maybe_apply_prompt_updates(mm_items, mm_res)


def num_tiles(image: Mapping) -> int:
    """Return the number of tiles of an image, 0 for embeddings of the caller, which stay as they are."""
    if CHOICE not in image:
        return 0
    # Of the Transformers backend, of SmolVLM, of InternVL.
    for name in ("num_image_patches", "num_patches", "image_num_patches"):
        if name in image:
            return int(image[name].data)
    return 1


def without_own(options: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in options.items() if name not in OPTIONS}


@dataclass(frozen=True)
class RequestInputs:
    """What the processor passes for each image beside its pixels: the choice of its request, and its question."""

    choices: list[list[float]]
    questions: Sequence[torch.Tensor] | None

    @classmethod
    def of(cls, inputs: dict) -> "RequestInputs":
        """Take them out of the model's inputs."""
        return cls(choices=inputs.pop(CHOICE).tolist(), questions=inputs.pop(QUESTION, None))

    def __getitem__(self, images: slice) -> "RequestInputs":
        questions = None if self.questions is None else self.questions[images]
        return RequestInputs(choices=self.choices[images], questions=questions)

    def repeat(self, counts: list[int]) -> "RequestInputs":
        """Return them with the question of each tile, for images with these numbers of tiles."""
        if self.questions is None:
            return self
        questions = []
        for question, count in zip(self.questions, counts):
            questions += [question] * count
        return replace(self, questions=questions)


class ServedFamily(Family):
    """Family of a model of vLLM."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.base = model
        self.config = model.config


class ServedLayer(TowerLayer):
    """Selection layer under tensor parallelism: each process scores by its own heads."""

    def score(self, query: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        num_heads = self.project_query(states[:, 0]).shape[1]
        if num_heads < query.shape[1]:  # a guide makes the query of all heads
            query = query.split(num_heads, dim=1)[get_tensor_model_parallel_rank()]
        return tensor_model_parallel_all_reduce(super().score(query, states))


def check_engine(vllm_config: VllmConfig, settings: ServingSettings):
    """Raise a ValueError if the engine would bypass the selection, or answer wrongly under it."""
    compilation = vllm_config.compilation_config
    lora = vllm_config.lora_config
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
        self.settings = ServingSettings.of(family.config)
        self.family = family
        check_engine(vllm_config, self.settings)
        guide = self.settings.check_fits(family)
        # A list hides the guide from vLLM, which expects its weights in the model's checkpoint.
        self.guides = [] if guide is None else [guide.to(vllm_config.device_config.device)]
        family.wrap_layers(self.settings.tower)
        self.max_tokens = vllm_config.scheduler_config.max_num_encoder_input_tokens
        log = logger.warning if self.settings.keeps_all else logger.info
        log("Patch selection %s.", self.settings.describe(family.tokens_per_image))

    def calls(
        self, pixel_values: torch.Tensor, counts: list[int], request: RequestInputs
    ) -> Iterator[tuple[slice, slice]]:
        """
        Yield the images of each call of the encoder, and their rows of `pixel_values`, of which an image has `counts`.
        vLLM plans by kept tokens, but patches take the memory, so a call gets no more of them than without selection.
        """
        if pixel_values.dim() == 2:  # Qwen-VL: a row is a patch
            num_tokens = len(pixel_values) // self.family.unit**2
        else:  # a row is a tile
            tokens_per_tile = self.family.tokens_per_image
            if tokens_per_tile is None:
                side = pixel_values.shape[-1] // self.family.config.vision_config.patch_size
                tokens_per_tile = (side // self.family.unit) ** 2
            num_tokens = pixel_values[..., 0, 0, 0].numel() * tokens_per_tile
        sizes = [count * num_tokens // sum(counts) for count in counts]
        first = 0
        for images in split_calls(sizes, most=self.max_tokens, choices=request.choices):
            last = first + sum(counts[images])
            yield images, slice(first, last)
            first = last

    def query(self, questions: Sequence[torch.Tensor] | None) -> torch.Tensor | None:
        """Return the queries of the guide, `(num_images, num_heads, head_dim)`, or `None` without one."""
        if not self.guides:
            return None
        embeddings, mask = self.embed_questions(questions)
        return self.guides[0](embeddings, mask)

    def embed_questions(self, questions: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the input embeddings `(num_images, length, width)` of the questions, and their mask."""
        longest = max(len(question) for question in questions)
        # The padding also gives an empty question a position, which the mask leaves out.
        ids = questions[0].new_zeros(len(questions), longest + 1)  # (num_images, length)
        mask = torch.zeros_like(ids, dtype=torch.bool)
        for row, question in enumerate(questions):
            ids[row, : len(question)] = question
            mask[row, : len(question)] = True
        embeddings = self.embed_input_ids(ids.flatten())  # (num_images * length, width)
        return embeddings.unflatten(0, ids.shape), mask

    def visual_tokens(self, inputs: Mapping, request: RequestInputs) -> VisualTokens:
        """
        Return the visual tokens of images (or tiles) that the tower and the selection after it keep, as Transformers
        does in [`modeling_trips.hosts.vlm.pruning.prune`]. All have one choice, and each has its question.
        """
        at_exit = self.settings.choice_of(request.choices[0])
        if at_exit is None:
            return self.family.encode(inputs, None)
        current = self.family.begin_pass(inputs)
        current.query = self.query(request.questions)
        tokens = self.family.encode(inputs, current)
        rows = range(len(tokens.sizes))
        return tokens.select(at_exit, rows=rows, text=partial(self.embed_questions, request.questions))

    def tokens_of_images(self, inputs: Mapping, counts: list[int], request: RequestInputs) -> list[torch.Tensor]:
        """Return the kept tokens of each image, which has as many rows (tiles) of `pixel_values` as `counts` says."""
        features = []
        for images, rows in self.calls(inputs["pixel_values"], counts, request):
            part = {}
            for name, value in inputs.items():
                part[name] = take(value, images, len(counts), rows, sum(counts))
            own_counts = counts[images]
            tiles = self.visual_tokens(part, request[images].repeat(own_counts)).features
            first = 0
            for count in own_counts:
                features.append(torch.cat(tiles[first : first + count]))
                first += count
        return features


def take(value, images: slice, num_images: int, rows: slice, num_rows: int):
    """Return the part of an input that belongs to some images, of which it has an entry or a row of pixels each."""
    if len(value) == num_images:
        return value[images]
    if len(value) == num_rows:
        return value[rows]
    if value.shape[1] == num_rows:  # Idefics3 has one prompt before its tiles
        return value[:, rows]
    return value
