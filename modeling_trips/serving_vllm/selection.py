"""Parts that both kinds of models share: the question in the hash of the image, and the selection itself."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from prometheus_client import Counter
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, tensor_model_parallel_all_reduce
from vllm.logger import init_logger
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItem
from vllm.multimodal.processing import BaseMultiModalProcessor, ProcessorInputs, PromptUpdateDetails

from ..hosts.layers import SelectionPass
from ..hosts.vlm.families import Family
from ..hosts.vlm.tower import TowerLayer
from ..hosts.vlm.visual_tokens import VisualTokens, special_token_ids
from .settings import NUM_CHOICES, ONE_SIZE, REQUEST_KEYS, ServingSettings, find_question, split_calls


logger = init_logger("vllm.trips")  # vLLM's format and level
# Inputs of the model for each image or video, by modality: the token ids of its question, and what its request chooses
# before the number of visual tokens of each tile (a time step of a video) without selection.
QUESTION = "{}_question_ids"
CHOICE = "{}_choice_and_sizes"
QUESTIONS = QUESTION.format("all")  # an option of the processor
SIZES = "tile_sizes"
# Of some configurations: further ids of tokens that stand for images and videos in a prompt before it is processed.
PLACEHOLDERS = ("video_token_id", "boi_token_index")  # the last one of Gemma 3
OPTIONS = {QUESTIONS, "patch_selection", *REQUEST_KEYS}  # of the image's processor, which do not reach Transformers
# Processors run in the process that serves /metrics. vLLM removes foreign counters whose names begin with its own.
VISUAL_TOKENS = Counter("trips_visual_tokens", "Visual tokens of the images and videos in prompts.", ["state"])


class SelectionProcessor(BaseMultiModalProcessor):
    """
    Processor that passes the request's settings to the model, and the question where it decides. Both become options
    of the image's processor. vLLM hashes these options with the image, so its caches never mix them.
    """

    pixels = {"image": "pixel_values"}  # the processor's output by modality

    @cached_property
    def settings(self) -> ServingSettings:
        return ServingSettings.of(self.info.get_hf_config())

    @cached_property
    def known_options(self) -> set[str]:
        """Names of the options that a request may have."""
        try:
            scopes = self.info.supported_mm_processor_kwargs
        except AttributeError:  # a processor of vLLM, such as that of InternVL
            scopes = {"images_kwargs": {*inspect.signature(self.info.get_hf_processor()).parameters}}
        return {*REQUEST_KEYS, *scopes, "common_kwargs"}.union(*scopes.values())

    def apply(self, inputs: ProcessorInputs, *args, **kwargs):
        unknown = inputs.hf_processor_mm_kwargs.keys() - self.known_options
        if unknown:
            raise ValueError(
                f"`mm_processor_kwargs` must have keys among {', '.join(REQUEST_KEYS)} and those of the image's "
                f"processor, got {', '.join(sorted(unknown))}."
            )
        settings = self.settings_of(inputs.hf_processor_mm_kwargs)
        options = {**inputs.hf_processor_mm_kwargs, "patch_selection": str(settings)}
        if settings.reads_prompt:
            config = self.info.get_hf_config()
            visual_ids = [config.image_token_id, *(getattr(config, name, -1) for name in PLACEHOLDERS)]
            options[QUESTIONS] = find_question(inputs.prompt, visual_ids, special_token_ids(config))
        return super().apply(replace(inputs, hf_processor_mm_kwargs=options), *args, **kwargs)

    def settings_of(self, options: Mapping[str, object]) -> ServingSettings:
        """Return the settings of a request with these options. Raise a ValueError if they do not fit the model."""
        settings = self.settings.of_request(options)
        settings.check_type(self.info.get_hf_config())
        return settings

    def _apply_hf_processor_main(self, mm_items, hf_kwargs: Mapping[str, object]):
        outputs = super()._apply_hf_processor_main(mm_items, without_own(hf_kwargs))
        for modality, pixels in self.pixels.items():
            if pixels in outputs:
                number = mm_items.get_count(modality)
                outputs[CHOICE.format(modality)] = [self.settings_of(hf_kwargs).encode()] * number
                if QUESTIONS in hf_kwargs:
                    question = torch.tensor(hf_kwargs[QUESTIONS], dtype=torch.long)
                    outputs[QUESTION.format(modality)] = [question] * number
        return outputs

    def _get_mm_fields_config(self, hf_inputs, hf_processor_mm_kwargs) -> Mapping[str, MultiModalFieldConfig]:
        fields = dict(super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs))
        for modality in self.pixels:
            for name in (CHOICE, QUESTION):
                if name.format(modality) in hf_inputs:
                    field = MultiModalFieldConfig.batched(modality, keep_on_cpu=name == CHOICE)
                    fields[name.format(modality)] = field
        return fields

    def _get_mm_prompt_updates(self, mm_items, hf_processor_mm_kwargs, out_mm_kwargs):
        settings = self.settings_of(hf_processor_mm_kwargs)
        updates = super()._get_mm_prompt_updates(mm_items, without_own(hf_processor_mm_kwargs), out_mm_kwargs)
        for modality in self.pixels:
            items = out_mm_kwargs.get(modality, [])
            for item, own in zip(items, updates.get(modality, [])):
                choice = item.get(CHOICE.format(modality))
                if choice is None:  # embeddings of the caller stay as they are
                    continue
                number = num_visual(own[0].content)
                sizes = self.tile_sizes(item, number)
                if modality == "video":
                    settings.check_steps(min(sizes))
                chosen = choice.data[:NUM_CHOICES].tolist()
                choice.data = choice.data.new_tensor([*chosen, *sizes])
                for index, update in enumerate(own):
                    content = self.shorten(settings, sizes, update.content)
                    own[index] = replace(update, content=content)
        return updates

    def shorten(self, settings: ServingSettings, sizes: list[int], whole: PromptUpdateDetails) -> PromptUpdateDetails:
        """Return the tokens that replace a placeholder: of each tile, as many visual tokens as it keeps."""
        if self.info.get_hf_config().model_type in ONE_SIZE:
            settings.check_size(sizes[0])
        is_kept = []  # of each visual token
        for size in sizes:
            num_kept = self.num_kept(settings, size)
            is_kept += [True] * num_kept + [False] * (size - num_kept)
        is_visual = visual_mask(whole)
        mask = torch.ones_like(is_visual)
        mask[is_visual] = torch.tensor(is_kept)
        kept = PromptUpdateDetails.from_seq(torch.tensor(whole.full)[mask].tolist())
        if whole.is_embed is not None:
            kept.is_embed = lambda full: is_visual[mask]
        kept.num_dropped = is_kept.count(False)  # for the counters
        return kept

    def tile_sizes(self, item: MultiModalKwargsItem, num_visual: int) -> list[int]:
        """Return the number of visual tokens of each tile of an image, `num_visual` together."""
        # Of the Transformers backend, of vLLM's classes, of InternVL.
        for name in ("num_image_patches", "num_patches", "image_num_patches"):
            if name in item:
                number = int(item[name].data)
                return [num_visual // number] * number
        return [num_visual]

    def num_kept(self, settings: ServingSettings, size: int) -> int:
        """Return how many tokens of an image (or tile) are kept."""
        return settings.at_exit.num_kept(size, settings.num_kept_in_tower(size))

    def _maybe_apply_prompt_updates(self, mm_items, mm_res):
        for modality in self.pixels:
            for update, *_ in mm_res.prompt_updates.get(modality, []):
                content = update.content
                num_kept = num_visual(content)
                num_dropped = getattr(content, "num_dropped", 0)
                VISUAL_TOKENS.labels("kept").inc(num_kept)
                VISUAL_TOKENS.labels("dropped").inc(num_dropped)
        return super()._maybe_apply_prompt_updates(mm_items, mm_res)


def visual_mask(content: PromptUpdateDetails) -> torch.Tensor:
    """Return which tokens that replace a placeholder are visual tokens."""
    if content.is_embed is None:
        return torch.ones(len(content.full), dtype=torch.bool)
    return content.is_embed(content.full)


def num_visual(content: PromptUpdateDetails) -> int:
    return int(visual_mask(content).sum())


def without_own(options: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in options.items() if name not in OPTIONS}


@dataclass(frozen=True)
class RequestInputs:
    """What the processor passes beside an image's (or video's) pixels: its request's choice, question, and tiles."""

    choices: list[tuple[float, ...]]
    sizes: list[list[int]]  # number of visual tokens of each tile
    questions: Sequence[torch.Tensor] | None

    @classmethod
    def of(cls, inputs: dict, modality: str = "image") -> "RequestInputs":
        """Take them out of the model's inputs."""
        choices = []
        sizes = []
        for row in inputs.pop(CHOICE.format(modality)):
            chosen, own_sizes = row.tensor_split([NUM_CHOICES])
            choices.append(tuple(chosen.tolist()))
            sizes.append(own_sizes.long().tolist())
        questions = inputs.pop(QUESTION.format(modality), None)
        return cls(choices=choices, sizes=sizes, questions=questions)

    def __getitem__(self, images: slice) -> "RequestInputs":
        questions = None if self.questions is None else self.questions[images]
        return RequestInputs(choices=self.choices[images], sizes=self.sizes[images], questions=questions)

    @property
    def questions_of_tiles(self) -> list[torch.Tensor]:
        questions = []
        for question, sizes in zip(self.questions, self.sizes):
            num_tiles = len(sizes)
            questions += [question] * num_tiles
        return questions


class ServedFamily(Family):
    """Family of a model of vLLM. This class supports selection after the tower."""

    layer_classes = {}

    def __init__(self, model: nn.Module):
        self.model = model
        self.base = model
        self.config = model.config

    def encode_whole(self, inputs: Mapping, current: SelectionPass | None) -> VisualTokens:
        groups = self.model.own_features(inputs)
        joined = torch.cat([*groups])
        sizes = [*chain(*inputs[SIZES])]
        tiles = joined.split(sizes)
        # Scorers read the columns of the language model's width. Those of deepstack follow the choice.
        width = self.config.get_text_config().hidden_size
        read = joined[:, :width].split(sizes)
        return VisualTokens.whole(read, output=tiles)


class ServedLayer(TowerLayer):
    """Selection layer under tensor parallelism: each process scores by its own heads."""

    def score(self, query: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        num_heads = self.project_query(states[:, 0]).shape[1]
        if num_heads < query.shape[1]:  # a guide makes the query of all heads
            query = query.split(num_heads, dim=1)[get_tensor_model_parallel_rank()]
        scores = super().score(query, states)
        return tensor_model_parallel_all_reduce(scores)


def check_engine(vllm_config: VllmConfig, settings: ServingSettings):
    """Raise a ValueError if the engine would bypass the selection, or answer wrongly under it."""
    compilation = vllm_config.compilation_config
    lora = vllm_config.lora_config
    refused = {
        "compile_mm_encoder": compilation.compile_mm_encoder,
        "cudagraph_mm_encoder": compilation.cudagraph_mm_encoder,
        "video_pruning_rate": bool(vllm_config.model_config.multimodal_config.video_pruning_rate),
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
    if vllm_config.is_mm_encoder_only and settings.may_read_prompt:
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
        if self.settings.tower.layers:
            family.add_hooks()
        self.max_tokens = vllm_config.scheduler_config.max_num_encoder_input_tokens
        log = logger.warning if self.settings.keeps_all else logger.info
        log("Patch selection %s.", self.settings.describe(family.tokens_per_image))

    def query(self, request: RequestInputs) -> torch.Tensor | None:
        """Return the guide's query of each image (tile), `(num_images, num_heads, head_dim)`, if there is a guide."""
        if not self.guides:
            return None
        embeddings, mask = self.embed_questions(request.questions_of_tiles)
        return self.guides[0](embeddings, mask)

    def embed_questions(self, questions: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the input embeddings `(num_images, length, width)` of the questions, and their mask."""
        ids = nn.utils.rnn.pad_sequence([*questions], batch_first=True, padding_value=-1)
        # The padding also gives an empty question a position, which the mask leaves out.
        ids = nn.functional.pad(ids, (0, 1), value=-1)  # (num_images, length)
        embeddings = self.embed_input_ids(ids.clamp(min=0).flatten())  # (num_images * length, width)
        return embeddings.unflatten(0, ids.shape), ids >= 0

    def visual_tokens(self, inputs: Mapping, request: RequestInputs) -> VisualTokens:
        """
        Return the visual tokens of images (or tiles) that the tower and the selection after it keep, as Transformers
        does in [`modeling_trips.hosts.vlm.pruning.select_visual_tokens`]. All have one choice, each has its question.
        """
        at_exit = self.settings.choice_of(request.choices[0])
        if at_exit is None:
            return self.family.encode(inputs, None)
        current = self.family.begin_pass(inputs)
        current.selects = bool(self.settings.tower.layers)
        current.wants_attention = at_exit.reads_attention
        current.query = self.query(request)
        tokens = self.family.encode(inputs, current)
        rows = range(len(tokens.sizes))
        return tokens.select(at_exit, rows=rows, text=lambda: self.embed_questions(request.questions_of_tiles))

    def tokens_of_images(self, inputs: Mapping, counts: list[int], request: RequestInputs) -> list[torch.Tensor]:
        """
        Return the kept tokens of each image, which has as many rows (tiles or patches) of the pixels as `counts` says.
        vLLM plans by kept tokens, but patches take the memory, so a call of the encoder gets no more of them than
        without selection.
        """
        features = []
        sizes = [sum(sizes_of_tiles) for sizes_of_tiles in request.sizes]
        for images in split_calls(sizes, most=self.max_tokens, choices=request.choices):
            first = sum(counts[: images.start])
            rows = slice(first, first + sum(counts[images]))
            part = {SIZES: request.sizes[images]}
            for name, value in inputs.items():
                part[name] = take(value, images, len(counts), rows, sum(counts))
            tokens = self.visual_tokens(part, request[images])
            features += self.join(tokens, part)
        return features

    def join(self, tokens: VisualTokens, inputs: Mapping) -> list[torch.Tensor]:
        """Return the kept tokens of each image from those of its tiles."""
        return joined_by_image(tokens, inputs).features


class SelectingExit(SelectingModel):
    """Model of vLLM whose own class encodes images, and which drops visual tokens after that."""

    family_class: type[ServedFamily] = ServedFamily

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        family = self.family_class(self)
        self.select_patches(family, vllm_config)

    def get_input_embeddings(self) -> nn.Module:
        return self.get_language_model().model.embed_tokens

    def own_features(self, inputs: Mapping) -> Sequence[torch.Tensor]:
        return super().embed_multimodal(**inputs)

    def embed_multimodal(self, **kwargs) -> Sequence[torch.Tensor]:
        if CHOICE.format("image") not in kwargs:  # embeddings of the caller, or videos, which stay as they are
            return super().embed_multimodal(**kwargs)
        request = RequestInputs.of(kwargs)
        return self.tokens_of_images(kwargs, [len(sizes) for sizes in request.sizes], request)


def serve(own_class: Any, model_class: type, processor_class: type = SelectionProcessor) -> type:
    """Return a class of vLLM that selects as `model_class` does, with its registered processor."""
    factories = own_class._processor_factory
    name = f"Trips{own_class.__name__}"
    processor = processor_class
    if isinstance(factories.processor, type):  # that of LLaVA is a function
        processor = type(f"{name}Processor", (processor_class, factories.processor), {})
    register = MULTIMODAL_REGISTRY.register_processor(
        processor, info=factories.info, dummy_inputs=factories.dummy_inputs
    )
    return register(type(name, (model_class, own_class), {"__doc__": model_class.__doc__}))


def joined_by_image(tokens: VisualTokens, inputs: Mapping) -> VisualTokens:
    """Return the visual tokens of each image, whose tiles are joined."""
    num_tiles = [len(sizes) for sizes in inputs[SIZES]]
    return tokens.joined(num_tiles)


def take(value, images: slice, num_images: int, rows: slice, num_rows: int):
    """Return the part of an input that belongs to some images, of which it has an entry or a row of pixels each."""
    if isinstance(value, torch.Tensor) and value.dim() == 0:  # one for all images
        return value
    if len(value) == num_images:
        return value[images]
    if len(value) == num_rows:
        return value[rows]
    if value.shape[1] == num_rows:  # Idefics3 has one prompt before its tiles
        return value[:, rows]
    return value
