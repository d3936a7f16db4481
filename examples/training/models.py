"""Initial model and processor of a run."""

import logging
from collections.abc import Iterable
from dataclasses import replace

import torch
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled

from modeling_trips import (
    TripsConfig,
    TripsModel,
    TripsPreTrainedModel,
    TripsProcessor,
    from_vision_text_pretrained,
)
from modeling_trips.conversion.processors import make_processor
from trips_examples.data.task_collators import a_text_per_image
from trips_examples.data.vocabulary import train_wordpiece_tokenizer
from trips_examples.training.options import ModelArguments


logger = logging.getLogger(__name__)


class ModelStart:
    """
    Initial model and processor of a run: a checkpoint, a model from a vision tower and a text encoder, or a model from
    scratch with a tokenizer. The constructor checks the options before data are read, and `finish` trains a tokenizer
    if needed.

    Args:
        model_class (`type[TripsPreTrainedModel]`): Class of the task's model.
        args (`ModelArguments`): Options.
        image_size (`int`, *optional*): Side of the images of a new model in pixels if `args` has none.
        late_choice (`bool`, *optional*, defaults to `False`): Use [`late_choice_fields`] in new models if `args` names
            no layers.
        config_fields: Fields of `TripsConfig` that the task sets.

    Attributes:
        config (`TripsConfig`): Configuration, without the vocabulary before a tokenizer is trained.
        model, processor: None until a tokenizer is trained.

    Raises:
        `ValueError`, `OSError`: The options do not fit, or the checkpoint or tokenizer does not exist.
    """

    def __init__(
        self,
        model_class: type[TripsPreTrainedModel],
        args: ModelArguments,
        image_size: int | None = None,
        late_choice: bool = False,
        **config_fields,
    ):
        self.model_class, self.args = model_class, args
        self.config_fields = {**args.config_overrides(), **config_fields}
        if late_choice and args.model_name_or_path is None and args.selection_layers is None:
            self.config_fields = {**late_choice_fields(num_vision_layers(args)), **self.config_fields}
        if args.image_size is None and args.model_name_or_path is None:
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
        most = self.config.vision_config.num_hidden_layers
        if args.freeze_vision_layers is not None and not 0 <= args.freeze_vision_layers <= most:
            raise ValueError(
                f"--freeze_vision_layers must be in 0..{most} for this vision tower, got {args.freeze_vision_layers}."
            )

    @property
    def patch_size(self) -> int:
        return self.config.vision_config.patch_shape[0]

    def finish(self, texts: Iterable[str]) -> tuple[TripsPreTrainedModel, TripsProcessor]:
        """Return the model and the processor, after training a tokenizer on `texts` if there is none."""
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
            **self.config_fields,
        )
        self.config = self.model.config
        if has_new_decoder(self.model, loading["missing_keys"]) and start_decoder_from_text(self.model):
            logger.info("%s has no decoder. The decoder starts from the text encoder.", args.model_name_or_path)

    def _load_parts(self):
        """Load fusion and decoder from the text encoder, and use the vision tower's normalization of images."""
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
            **self.config_fields,
        )

    def _make_model(self, tokenizer: PreTrainedTokenizerBase):
        for name in ("pad_token", "cls_token", "sep_token"):
            if getattr(tokenizer, name) is None:
                raise ValueError(
                    f"--tokenizer_name {self.args.tokenizer_name} has no `{name}`. Use a BERT-like tokenizer."
                )
        self.config = self._make_config(
            text_config={"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id},
            decoder_config={"bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.sep_token_id},
        )
        self.model = self.model_class._from_config(self.config, attn_implementation=self.args.attn_implementation)
        self.processor = make_processor(tokenizer, self.config)


def has_new_decoder(model: TripsPreTrainedModel, missing: Iterable[str]) -> bool:
    """Return whether the layers of a model's decoder are all among the `missing` names."""
    layers = {name for name, _ in model.named_parameters() if name.startswith("decoder.encoder.")}
    return bool(layers) and layers <= set(missing)


@torch.no_grad()
def start_decoder_from_text(model: TripsPreTrainedModel) -> bool:
    """
    Copy the embeddings and the upper layers of the text encoder to the decoder, whose cross-attention stays new.
    Return False if the sizes differ, if the text encoder has no layers (`fusion_type="single_stream"`), or under
    ZeRO-3.
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


def freeze_vision_layers(model: TripsPreTrainedModel, num_layers: int):
    """
    Freeze the embeddings and the first `num_layers` layers of the vision tower. Layers before the first trained one
    need no backward pass.
    """
    tower = model.base_model.vision_model
    for part in (tower.embeddings, getattr(tower, "pre_layernorm", None), *tower.layers[:num_layers]):
        if part is not None:
            part.requires_grad_(False)


def set_image_size(processor: TripsProcessor, side: int):
    """Make a processor resize whole images to squares of this side."""
    if side < 1 or side % processor.patch_size:
        raise ValueError(f"--image_size {side} must be a multiple of the model's patch size, {processor.patch_size}.")
    size = {"height": side, "width": side}
    processor.image_processor.size = size
    if getattr(processor.image_processor, "do_center_crop", False):  # CLIP crops; use the whole image
        processor.image_processor.crop_size = dict(size)


def late_choice_fields(num_layers: int) -> dict:
    """
    Return the fields of `TripsConfig` for new models with many texts per image: patches are scored by the image in the
    paper's layers, at 5/12 and 10/12 of `num_layers` (from layer 3 on), and by the text only in the last layer, so
    further texts cost little in the tower.
    """
    places = (round(num_layers * part / 12) for part in (5, 10))
    by_image = [layer for layer in places if 3 <= layer < num_layers]
    return {
        "selection_layers": [*by_image, num_layers],
        "keep_rate": [0.7] * len(by_image) + [0.3],
        "selection_guidance": ["image"] * len(by_image) + ["text"],
    }


def num_vision_layers(args: ModelArguments) -> int:
    """Return the depth of a new model's vision tower."""
    if not args.starts_from_parts:
        return TripsConfig.from_preset(args.preset).vision_config.num_hidden_layers
    config = AutoConfig.from_pretrained(args.vision_model_name_or_path)
    config = getattr(config, "vision_config", config)  # CLIP's
    return getattr(config, "num_hidden_layers", 12)  # loading rejects models without it


def make_selection_teacher(args: ModelArguments, device: torch.device) -> "SelectionTeacher | None":
    """Return the model of `--selection_teacher`, or None."""
    if args.selection_teacher is None:
        return None
    if args.selection_teacher != "start":
        return SelectionTeacher(args.selection_teacher, device)
    if args.model_name_or_path is None:
        raise ValueError("--selection_teacher start needs --model_name_or_path.")
    return SelectionTeacher(args.model_name_or_path, device)


class SelectionTeacher:
    """
    Unpruned model whose attention supervises the selection for data without regions: the attention of the text's [CLS]
    to the patches, averaged over heads and layers of the fusion encoder. It costs one forward pass per step.

    Args:
        name_or_path (`str`): TRIPS checkpoint of any task, which runs at a keep rate of 1.0.
        device (`torch.device`, *optional*, defaults to the CPU): Device.

    Raises:
        `ValueError`: The checkpoint is a single-stream model, which has no fusion encoder.
    """

    def __init__(self, name_or_path: str, device: torch.device | str = "cpu"):
        # Only eager attention returns its maps.
        self.model = TripsModel.from_pretrained(name_or_path, attn_implementation="eager", keep_rate=1.0).to(device)
        if self.model.fusion_model is None:
            raise ValueError(f"--selection_teacher {name_or_path}: a single-stream model has no fusion encoder.")
        self.model.requires_grad_(False)

    @torch.no_grad()
    def patch_targets(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """
        Return the teacher's attention to the patches.

        Args:
            inputs (`dict`): Inputs of any head, with `pixel_values` and `input_ids`.

        Returns:
            `torch.Tensor` of shape `(num_texts, num_patches)`, float32, whose rows sum to 1. A text with several
            images has a row for each.
        """
        outputs = self.model(**a_text_per_image(inputs), output_attentions=True)
        attention = torch.stack([layer[:, :, 0].float().mean(dim=1) for layer in outputs.cross_attentions]).mean(dim=0)
        to_patches = attention[:, 1:]
        return to_patches / to_patches.sum(dim=-1, keepdim=True)
