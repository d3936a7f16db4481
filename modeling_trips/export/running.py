"""Loading of exported models: the class of the checkpoint with graphs as its parts."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import GenerationConfig
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.exporters import ExportedModel
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions, BaseModelOutputWithPooling

import modeling_trips
from modeling_trips import (
    TripsConfig,
    TripsImageCache,
    TripsModel,
    TripsModelOutput,
    TripsPreTrainedModel,
    TripsVisionModelOutput,
)

from ..inspection.checkpoints import EXPORT_MANIFEST, check_head, is_exported
from ..modeling_trips_text import check_text_length
from ..modeling_trips_vision import check_counts, check_image_source
from .graphs import image_shape, tensors_of


Runners = Mapping[str, Callable]  # name of a graph -> function from its keyword arguments to its outputs

# Weights of a head that stay in PyTorch.
HEAD_FILE = "head.safetensors"


def load_exported(
    folder: str | Path, heads: Sequence[type[TripsPreTrainedModel]] | None = None
) -> TripsPreTrainedModel:
    """
    Load a model that [`export_model`] wrote, to run on CPUs.

    The model has the class of the exported one, so `generate`, `rank_answers`, `match`, `get_text_features` and
    pipelines work. The image size and the schedule are fixed, hidden states and attentions are not returned, and
    training and `save_pretrained` are not supported.

    Args:
        folder (`str` or `Path`): Folder of the export.
        heads (`Sequence[type]`, *optional*): Accepted model classes. By default every model of this project.

    Returns:
        A model in evaluation mode on the CPU, with float32 outputs for every dtype of the graphs. The graphs run on as
        many threads as PyTorch.

    Raises:
        FileNotFoundError: The folder has no export.
        ImportError: onnxruntime or openvino is not installed.
        ValueError: The head is of another model.
    """
    folder = Path(folder)
    if not is_exported(folder):
        raise FileNotFoundError(f"{folder} has no exported model. Make one with `python -m modeling_trips.export`.")
    check_head(folder, heads)
    manifest = json.loads((folder / EXPORT_MANIFEST).read_text(encoding="utf-8"))
    if manifest["export_format"] == "onnx":
        import onnxruntime  # an extra

        session = onnxruntime.SessionOptions()
        session.intra_op_num_threads = torch.get_num_threads()
        options = {"session_options": session}
    else:
        # OpenVINO computes float32 weights in bfloat16 by default if the CPU supports it.
        precision = {torch.float32: "f32", torch.bfloat16: "bf16"}[TripsConfig.from_pretrained(folder).dtype]
        config = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": precision}
        options = {"config": config}
    exported = ExportedModel.from_pretrained(folder, device="cpu", **options)
    return assemble(exported.config, exported.runners, load_file(folder / HEAD_FILE), exported.generation_config)


def assemble(
    config: TripsConfig,
    runners: Runners,
    head: dict[str, torch.Tensor],
    generation_config: GenerationConfig | None = None,
) -> TripsPreTrainedModel:
    """Assemble a model of the configuration's class from its parts (`runners`) and its remaining weights (`head`)."""
    trunk = TripsGraphModel(config, runners)
    model_class = getattr(modeling_trips, config.architectures[0])
    if issubclass(model_class, TripsModel):
        return for_inference(trunk)
    with torch.device("meta"):  # its parts are replaced
        model = model_class(config)
    model.model = trunk
    if model.can_generate():
        model.decoder = GraphDecoder(config, runners)
        model.lm_head = nn.Identity()
        model.generation_config = generation_config
    missing, unexpected = model.load_state_dict(head, strict=False, assign=True)
    if unexpected or missing != ["model.no_parameter"]:
        raise ValueError(f"{HEAD_FILE} does not fit this {model_class.__name__}. Export the model again.")
    return for_inference(model)


def for_inference(model: TripsPreTrainedModel) -> TripsPreTrainedModel:
    """Return the model in evaluation mode, which refuses to be saved without its graphs."""
    model.save_pretrained = refuse_to_save  # type: ignore[method-assign]
    return model.eval()


def refuse_to_save(*args, **kwargs):
    raise NotImplementedError("An exported model is not saved: copy its folder, or export it again.")


def run(runner: Callable, options: dict, **inputs):
    """Run a graph. `options` are further arguments of PyTorch's forward pass, which graphs do not support."""
    given = [f"`{name}`" for name, value in options.items() if value is not None and value is not False]
    if given:
        raise ValueError(f"An exported model does not support {', '.join(given)}. Use the original model.")
    return runner(**inputs)


def mask_of(tokens: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.LongTensor:
    """Return the mask of `(num_texts, text_length, ...)`, which graphs require."""
    return torch.ones(tokens.shape[:2], dtype=torch.long) if attention_mask is None else attention_mask.long()


class GraphTextModel(nn.Module):
    """Graph that replaces a [`TripsTextModel`]."""

    def __init__(self, config: TripsConfig, runners: Runners):
        super().__init__()
        self.config = config.text_config
        self.runners = runners

    def forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        # Graphs do not check bounds.
        check_text_length(input_ids.shape[1], self.config.max_position_embeddings)
        return run(
            self.runners["text"],
            {"inputs_embeds": inputs_embeds, **kwargs},
            input_ids=input_ids,
            attention_mask=mask_of(input_ids, attention_mask),
            token_type_ids=torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids,
        )


class GraphVisionModel(nn.Module):
    """Graphs that replace a [`TripsVisionModel`] in its two uses without a text."""

    def __init__(self, config: TripsConfig, runners: Runners):
        super().__init__()
        self.config = config.vision_config
        self.runners = runners

    def encode_images(self, pixel_values: torch.Tensor, **kwargs) -> TripsImageCache:
        size = image_shape(self.config)
        if tuple(pixel_values.shape[2:]) != size:
            raise ValueError(
                f"The graphs need images of {size[0]} x {size[1]} pixels, got {tuple(pixel_values.shape)}. Export "
                "again with another `image_size`."
            )
        fields = run(self.runners["images"], kwargs, pixel_values=pixel_values.float())
        return TripsImageCache(**{"selection": (), **fields}, grid_size=self.config.grid_size)

    def forward(
        self, pixel_values: torch.Tensor | None = None, image_cache: TripsImageCache | None = None, **kwargs
    ) -> TripsVisionModelOutput:
        check_image_source(pixel_values, image_cache)
        image_cache = self.encode_images(pixel_values) if image_cache is None else image_cache
        return run(self.runners["image_features"], kwargs, image_cache=tensors_of(image_cache))


class TripsGraphModel(TripsModel):
    """[`TripsModel`] whose parts are graphs."""

    def __init__(self, config: TripsConfig, runners: Runners):
        super(TripsModel, self).__init__(config)  # without the parts
        self.runners = runners
        self.text_model = GraphTextModel(config, runners)
        self.vision_model = GraphVisionModel(config, runners)
        # Models read their device and dtype from their parameters.
        self.no_parameter = nn.Parameter(torch.empty(0), requires_grad=False)

    def fuse(
        self,
        text_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_index: torch.LongTensor | None = None,
        image_cache: TripsImageCache | None = None,
        regions: torch.FloatTensor | None = None,
        **kwargs,
    ) -> TripsModelOutput:
        """As in the parent. The graph pools `text_states` itself."""
        check_image_source(pixel_values, image_cache)
        if image_cache is None:
            image_cache = self.encode_images(pixel_values)
        num_texts = len(text_states)
        num_images = len(image_cache.hidden_states)
        check_counts(num_texts, num_images, image_index)
        if image_index is None:
            image_index = torch.arange(num_texts)
        if ((image_index < 0) | (image_index >= num_images)).any():
            raise ValueError(f"`image_index` must be in [0, {num_images - 1}], got {image_index.tolist()}.")
        return run(
            self.runners["fusion"],
            {"regions": regions, **kwargs},
            text_states=text_states,
            attention_mask=mask_of(text_states, attention_mask),
            image_index=image_index,
            image_cache=tensors_of(image_cache),
        )

    def grid_of(self, pixel_values: torch.Tensor | None, image_cache: TripsImageCache | None) -> tuple[int, int]:
        """As in the parent."""
        return self.config.vision_config.grid_size


class GraphDecoder(nn.Module):
    """Graph that replaces a [`TripsDecoder`] with its head. Its states are logits, its cache is Transformers'."""

    def __init__(self, config: TripsConfig, runners: Runners):
        super().__init__()
        self.config = config.decoder_config
        self.runners = runners

    def forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        cache: EncoderDecoderCache | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        if cache is None:
            cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        own = cache.self_attention_cache
        cross = cache.cross_attention_cache
        check_text_length(own.get_seq_length() + input_ids.shape[1], self.config.max_position_embeddings)
        if not cache.is_updated.get(0):
            pairs = self.runners["cross_attention"](encoder_hidden_states=encoder_hidden_states)
            for number, pair in enumerate(pairs):
                cross.update(*pair, number)
                cache.is_updated[number] = True
        outputs = run(
            self.runners["decoder"],
            {"decoder_attention_mask": attention_mask, "decoder_inputs_embeds": inputs_embeds, **kwargs},
            input_ids=input_ids,
            encoder_attention_mask=mask_of(encoder_hidden_states, encoder_attention_mask),
            own=self.key_values(own, len(input_ids)),
            cross=[(layer.keys, layer.values) for layer in cross.layers],
        )
        for number, pair in enumerate(outputs["own"]):
            own.update(*pair, number)
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=outputs["logits"], cache=cache if use_cache else None
        )

    def key_values(self, cache: DynamicCache, num_texts: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return the keys and values of the generated tokens."""
        if not isinstance(cache, DynamicCache):
            raise ValueError(
                f"An exported model needs a DynamicCache, got {type(cache).__name__}. Omit `cache_implementation`."
            )
        if cache.get_seq_length() > 0:
            return [(layer.keys, layer.values) for layer in cache.layers]
        num_heads = self.config.num_attention_heads
        nothing = torch.empty(num_texts, num_heads, 0, self.config.hidden_size // num_heads)
        return [(nothing, nothing) for _ in range(self.config.num_hidden_layers)]
