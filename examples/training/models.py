"""The model and the processor that a run starts with."""

import logging
from collections.abc import Iterable
from dataclasses import replace

import torch
from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled

from modeling_trips import TripsConfig, TripsPreTrainedModel, TripsProcessor, from_vision_text_pretrained
from modeling_trips.conversion.processors import make_processor
from trips_examples.data.vocabulary import train_wordpiece_tokenizer
from trips_examples.training.options import ModelArguments


logger = logging.getLogger(__name__)


class ModelStart:
    """
    What a run starts with: a checkpoint and its processor, a model of two towers that were trained apart, or one from
    scratch with a tokenizer to go with it. All that needs no texts happens here, so that wrong options are told before
    any data are read; `finish` does the rest.

    Args:
        model_class (`type[TripsPreTrainedModel]`): the task's.
        args (`ModelArguments`)
        image_size (`int`, *optional*): side in pixels that images get where `args` has no other.
        config_fields: fields of `TripsConfig` that the task fixes.

    Attributes:
        config (`TripsConfig`): the model's, but for the vocabulary, if a tokenizer is to be trained.
        model, processor: those of the run, or None until a tokenizer is trained.

    Raises:
        `ValueError`, `OSError`: Where options make no model, or there is no such checkpoint or tokenizer.
    """

    def __init__(
        self,
        model_class: type[TripsPreTrainedModel],
        args: ModelArguments,
        image_size: int | None = None,
        **config_fields,
    ):
        self.model_class, self.args, self.config_fields = model_class, args, config_fields
        if args.image_size is None:
            self.args = replace(args, image_size=image_size)
        self.model: TripsPreTrainedModel | None = None
        self.processor: TripsProcessor | None = None
        if args.model_name_or_path is not None:
            self._load_checkpoint()
        elif args.starts_from_parts:
            self._load_parts()
        elif args.tokenizer_name is not None:
            self._make_model(AutoTokenizer.from_pretrained(args.tokenizer_name))
        else:
            self.config = self._make_config()
        check_frozen_layers(self.config, args.freeze_vision_layers)

    @property
    def patch_size(self) -> int:
        return self.config.vision_config.patch_shape[0]

    def finish(self, texts: Iterable[str]) -> tuple[TripsPreTrainedModel, TripsProcessor]:
        """The model and the processor. `texts` are what a tokenizer is trained on, and not read if there is one."""
        if self.model is None:
            self._make_model(train_wordpiece_tokenizer(texts))
        if self.args.freeze_vision_layers is not None:
            freeze_vision_layers(self.model, self.args.freeze_vision_layers)
        schedule = self.model.config.vision_config.schedule
        logger.info("%s parameters, %s", f"{self.model.num_parameters():,}", schedule)
        return self.model, self.processor

    def _load_checkpoint(self):
        args = self.args
        self.processor = TripsProcessor.from_pretrained(args.model_name_or_path)
        if args.image_size is not None:
            set_image_size(self.processor, args.image_size)
        self.model, loading = self.model_class.from_pretrained(
            args.model_name_or_path,
            attn_implementation=args.attn_implementation,
            output_loading_info=True,
            **args.config_overrides(),
            **self.config_fields,
        )
        self.config = self.model.config
        if has_new_decoder(self.model, loading["missing_keys"]) and start_decoder_from_text(self.model):
            logger.info("%s has no decoder: it starts from the text encoder.", args.model_name_or_path)

    def _load_parts(self):
        """The fusion and the decoder start from the text encoder; pixels are normalised as the vision tower's."""
        args = self.args
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer_name or args.text_model_name_or_path)
        self.model = from_vision_text_pretrained(
            self.model_class,
            args.vision_model_name_or_path,
            args.text_model_name_or_path,
            num_fusion_layers=args.num_fusion_layers,
            image_size=args.image_size,
            decoder_from_text=True,
            decoder_config={"bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.sep_token_id},
            **args.config_overrides(),
            **self.config_fields,
        )
        if args.attn_implementation is not None:
            self.model.set_attn_implementation(args.attn_implementation)
        self.config = self.model.config
        self.processor = make_processor(tokenizer, self.config)
        source = AutoImageProcessor.from_pretrained(args.vision_model_name_or_path)
        for name in ("image_mean", "image_std"):
            setattr(self.processor.image_processor, name, getattr(source, name))

    def _make_config(self, **vocabulary) -> TripsConfig:
        return TripsConfig.from_preset(
            self.args.preset,
            vision_config={} if self.args.image_size is None else {"image_size": self.args.image_size},
            **vocabulary,
            **self.args.config_overrides(),
            **self.config_fields,
        )

    def _make_model(self, tokenizer: PreTrainedTokenizerBase):
        for name in ("pad_token", "cls_token", "sep_token"):
            if getattr(tokenizer, name) is None:
                raise ValueError(
                    f"--tokenizer_name {self.args.tokenizer_name}: it has no `{name}`. Take a BERT-like tokenizer."
                )
        self.config = self._make_config(
            text_config={"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id},
            decoder_config={"bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.sep_token_id},
        )
        self.model = self.model_class._from_config(self.config, attn_implementation=self.args.attn_implementation)
        self.processor = make_processor(tokenizer, self.config)


def has_new_decoder(model: TripsPreTrainedModel, missing: Iterable[str]) -> bool:
    """Whether a model has a decoder of which all layers are among the `missing` names of a checkpoint."""
    layers = {name for name, _ in model.named_parameters() if name.startswith("decoder.encoder.")}
    return bool(layers) and layers <= set(missing)


@torch.no_grad()
def start_decoder_from_text(model: TripsPreTrainedModel) -> bool:
    """
    Copies the embeddings and the upper layers of the text encoder to the decoder, whose cross-attention stays new, as
    `from_vision_text_pretrained` does with `decoder_from_text`. Returns whether it did: not where their sizes differ,
    the text encoder has no layers of its own (`fusion_type="single_stream"`), or DeepSpeed has the weights in pieces.
    """
    text, decoder = model.base_model.text_model, model.decoder
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size", "max_position_embeddings")
    agree = all(getattr(text.config, size) == getattr(decoder.config, size) for size in sizes)
    if not agree or text.config.num_hidden_layers == 0 or is_deepspeed_zero3_enabled():
        return False
    decoder.embeddings.load_state_dict(text.embeddings.state_dict())
    model.lm_head.decoder.weight.copy_(text.embeddings.word_embeddings.weight)
    layers = decoder.encoder.layer
    for layer, source in zip(layers, text.encoder.layer[-len(layers) :]):
        layer.load_state_dict(source.state_dict(), strict=False)
    return True


def check_frozen_layers(config: TripsConfig, num_layers: int | None):
    most = config.vision_config.num_hidden_layers
    if num_layers is not None and not 0 <= num_layers <= most:
        raise ValueError(f"--freeze_vision_layers {num_layers}: the vision tower has {most} layers, give 0 to {most}.")


def freeze_vision_layers(model: TripsPreTrainedModel, num_layers: int):
    """
    Leaves the embeddings and the lowest `num_layers` layers of the vision tower as they are. Nothing is recorded for a
    backward pass, nor kept, up to the first layer that is trained or that a trained text guides.
    """
    tower = model.base_model.vision_model
    for part in (tower.embeddings, getattr(tower, "pre_layernorm", None), *tower.layers[:num_layers]):
        if part is not None:
            part.requires_grad_(False)


def set_image_size(processor: TripsProcessor, side: int):
    """Makes a processor squash whole images to squares of this side."""
    if side < 1 or side % processor.patch_size:
        raise ValueError(f"--image_size {side} must be a multiple of the model's patch size, {processor.patch_size}.")
    size = {"height": side, "width": side}
    processor.image_processor.size = size
    if getattr(processor.image_processor, "do_center_crop", False):  # as CLIP's do: of the whole image, then
        processor.image_processor.crop_size = dict(size)
