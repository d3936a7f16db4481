# Copyright 2026 The TRIPS for Transformers authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""
The bare TRIPS model, and the heads that write answers and captions.

`TripsTextModel` encodes a text, `TripsVisionModel` encodes an image and keeps the patches that the text scores
highest, and `TripsFusionModel` fuses both. A head reads the fused states.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import (
    BaseModelOutputWithCrossAttentions,
    BaseModelOutputWithPooling,
    Seq2SeqLMOutput,
)
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, auto_docstring, can_return_tuple

from .configuration_trips import SelectionSchedule, TripsConfig
from .modeling_trips_text import (
    CACHE_NAME,
    TripsDecoder,
    TripsFusionModel,
    TripsLMHead,
    TripsTextModel,
    accept_former_cache_name,
)
from .modeling_trips_vision import (
    SHARED_ARGS,
    TripsImageCache,
    TripsPreTrainedModel,
    TripsSelection,
    TripsSingleStreamModel,
    TripsVisionModel,
    TripsVisionModelOutput,
    check_shape,
    resolve_schedule,
    scores_of_tokens,
    select_rows,
)
from .patch_selection import RelevanceGradient, region_targets, selection_loss, union_of_targets
from .pipeline_trips import TripsImageToTextPipeline, TripsVisualQuestionAnsweringPipeline


# Losses


def weighted_sum(weighted_losses: Iterable[tuple[float, torch.Tensor | None]]) -> torch.Tensor | None:
    """Return the sum of pairs of weight and loss, without losses that are `None`; `None` if all of them are."""
    losses = [weight * loss for weight, loss in weighted_losses if loss is not None]
    return sum(losses) if losses else None


def mean_over_items(
    losses: torch.Tensor | None, item_counts: torch.Tensor, num_items_in_batch: int | torch.Tensor | None = None
) -> torch.Tensor | None:
    """
    Return the mean of the losses of rows, each weighted by its number of items, as a label loss is a mean over items.

    Args:
        losses (`torch.Tensor` of shape `(num_rows,)`, *optional*): `None` gives `None`.
        item_counts (`torch.Tensor` of shape `(num_rows,)`): Numbers of items of the rows.
        num_items_in_batch (`int` or `torch.Tensor`, *optional*): What `Trainer` counts: the number of items of the
            whole batch, of which this may be a part. By default the sum of `item_counts`.
    """
    if losses is None:
        return None
    num_items = item_counts.sum() if num_items_in_batch is None else num_items_in_batch
    return (losses * item_counts).sum() / num_items


# The bare model


@auto_docstring(custom_intro="Output of [`TripsModel`].")
@dataclass
class TripsModelOutput(BaseModelOutputWithCrossAttentions):
    r"""
    last_hidden_state (`torch.FloatTensor` of shape `(num_texts, text_length, hidden_size)`):
        The fused states: the text tokens after attention to the image tokens.
    selection (`tuple(TripsSelection)`):
        What each selection layer kept, in the order of the layers.
    hidden_states, attentions, cross_attentions (`tuple(torch.FloatTensor)`, *optional*):
        Of the fusion encoder; of the whole sequence in a single stream, which has no `cross_attentions`.
    selection_losses (`torch.FloatTensor` of shape `(num_texts,)`, *optional*):
        In training: the `selection_loss` of each text, 0 without a region, if regions are given.
    relevance_losses (`torch.FloatTensor` of shape `(num_texts,)`, *optional*):
        In training with layers that only score, or with `learns_relevance`: the loss that teaches the scores, see
        [`RelevanceGradient`]. It is 0.
    relevance_values (`tuple(torch.FloatTensor)`, *optional*):
        What it stands for, one entry per layer: the cross-entropy of the scores of a text, or an image, with the
        relevance. It is known after the backward pass, and 0 before.
    text_model_output (`BaseModelOutputWithPooling`):
        Output of the text encoder. Its `pooler_output` is the text guidance t, except in a single stream.
    vision_model_output (`TripsVisionModelOutput`):
        Output of the vision tower: the remaining image tokens.
    """

    selection: tuple[TripsSelection, ...] | None = None
    selection_losses: torch.FloatTensor | None = None
    relevance_losses: torch.FloatTensor | None = None
    relevance_values: tuple[torch.FloatTensor, ...] | None = None
    text_model_output: BaseModelOutputWithPooling | None = None
    vision_model_output: TripsVisionModelOutput | None = None


@auto_docstring(
    custom_intro="""
    The bare TRIPS model: text encoder -> vision tower, whose patches the text scores -> fusion encoder.
    `fusion_type` selects the form of ALBEF, mPLUG, or ViLT, where text embeddings and patches go through the vision
    tower together.
    """
)
class TripsModel(TripsPreTrainedModel):
    auto_classes = ("AutoModel",)

    def __init__(self, config: TripsConfig):
        super().__init__(config)
        config.validate()  # fields may have been set since the configuration was made
        self.text_model = TripsTextModel(config.text_config)
        # CODEPATH: ALBEF and mPLUG have two towers and a fusion encoder, ViLT a single stream.
        if config.fusion_encoder_config.fusion_type == "single_stream":
            self.vision_model = TripsSingleStreamModel(config.vision_config)
            self.fusion_model = None
        else:
            self.vision_model = TripsVisionModel(config.vision_config)
            self.fusion_model = TripsFusionModel(config.fusion_encoder_config)
        self.post_init()

    def get_input_embeddings(self):
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.text_model.set_input_embeddings(value)

    def encode_images(self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> TripsImageCache:
        """
        Return the `image_cache` of `forward`, the text-independent part of the vision tower: see
        [`TripsVisionModel.encode_images`]. `pixel_values` are of shape `(num_images, num_channels, height, width)`.
        """
        return self.vision_model.encode_images(pixel_values, **kwargs)

    def fuse(
        self,
        text_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_index: torch.LongTensor | None = None,
        image_cache: TripsImageCache | None = None,
        regions: torch.FloatTensor | None = None,
        schedule: SelectionSchedule | str | None = None,
        keep_rate: float | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TripsModelOutput:
        """
        Run everything after the text encoder, one row per pair of text and image. The output has no
        `text_model_output`.

        Args:
            text_states (`torch.Tensor` of shape `(num_pairs, text_length, hidden_size)`): The `last_hidden_state` of
                `text_model`, from which the text guidance t is pooled. Repeat a text that has several images. The
                other arguments are those of `forward`.

        Raises:
            ValueError: The layers only score, in a single stream.
        """
        schedule = resolve_schedule(self.vision_model.config, schedule, keep_rate)
        if schedule.scores_only and self.fusion_model is None:
            raise ValueError(f"A layer that only scores needs a fusion encoder, got {schedule} in a single stream.")
        selection_losses = None
        relevance_losses = None
        relevance_values = None
        # CODEPATH: ALBEF and mPLUG have two towers and a fusion encoder, ViLT a single stream.
        if self.fusion_model is None:
            vision = self.vision_model(
                text_states=text_states,
                pixel_values=pixel_values,
                attention_mask=attention_mask,
                image_index=image_index,
                image_cache=image_cache,
                schedule=schedule,
                **kwargs,
            )
            fused = vision
            fused_states = vision.text_states
        else:
            vision = self.vision_model(
                pixel_values=pixel_values,
                text_embeds=self.text_model.pooled(text_states, attention_mask),
                image_index=image_index,
                image_cache=image_cache,
                schedule=schedule,
                **kwargs,
            )
            image_states = vision.last_hidden_state
            states_index = vision.image_index
            # CODEPATH: relevance is learnt in training only, and in pruned passes if the configuration says so.
            if self.training and (schedule.scores_only or self.config.learns_relevance):
                taught = self.teach_relevance(vision, schedule)
                image_states, states_index, relevance_losses, relevance_values = taught
            fused = self.fusion_model(
                inputs_embeds=text_states,
                encoder_hidden_states=image_states,
                attention_mask=attention_mask,
                image_index=states_index,
                **kwargs,
            )
            fused_states = fused.last_hidden_state
        selection = tuple(
            layer if settings.guidance == "text" else layer.rows(vision.image_index)
            for settings, layer in zip(schedule.selections, vision.selection)
        )
        if relevance_losses is not None:  # a head that reads image states teaches, too
            vision = replace(vision, last_hidden_state=image_states, image_index=states_index)
        # CODEPATH: a weight of 0 turns the loss off, and so does evaluation.
        has_supervision = regions is not None and self.training and self.config.selection_loss_weight > 0
        if has_supervision and not schedule.scores_only:
            selection_losses = self.selection_losses(
                selection=selection,
                regions=regions,
                schedule=schedule,
                pixel_values=pixel_values,
                image_index=image_index,
                image_cache=image_cache,
            )
        return TripsModelOutput(
            last_hidden_state=fused_states,
            selection=selection,
            hidden_states=fused.hidden_states,
            attentions=fused.attentions,
            cross_attentions=fused.get("cross_attentions"),
            selection_losses=selection_losses,
            relevance_losses=relevance_losses,
            relevance_values=relevance_values,
            vision_model_output=vision,
        )

    def teach_relevance(
        self, vision: TripsVisionModelOutput, schedule: SelectionSchedule
    ) -> tuple[torch.Tensor, torch.LongTensor | None, torch.Tensor | None, tuple[torch.Tensor, ...] | None]:
        """
        Return the image states for the fusion encoder, the row of each text in them, and `relevance_losses` and
        `relevance_values` of [`TripsModelOutput`]. The texts of an image share the gradient of its states where the
        image scores; where a text scores, each has its own. In a pruned pass the last layer learns, of the tokens that
        it passes on.
        """
        image_states = vision.last_hidden_state
        image_index = vision.image_index
        scored = list(zip(schedule.selections, vision.selection))
        if not schedule.scores_only:
            scored = scored[-1:]
        losses = []
        values = []
        for settings, layer in sorted(scored, key=lambda pair: pair[0].guidance):  # "image" before "text"
            if settings.guidance == "random":
                continue
            if settings.guidance == "text":
                image_states = select_rows(image_states, image_index)
                image_index = None
            scores = layer.scores
            if not schedule.scores_only:
                scores = scores_of_tokens(layer, num_tokens=image_states.shape[1] - 1)
            values.append(torch.zeros_like(scores[:, 0]))
            image_states, losses_of_rows = RelevanceGradient.apply(image_states, scores, values[-1])
            losses.append(select_rows(losses_of_rows, image_index))
        if not losses:
            return image_states, image_index, None, None
        return image_states, image_index, torch.stack(losses).mean(dim=0), tuple(values)

    def grid_of(self, pixel_values: torch.Tensor | None, image_cache: TripsImageCache | None) -> tuple[int, int]:
        """Return the patches of each image, down and across."""
        if pixel_values is None:
            return image_cache.grid_size
        return self.vision_model.embeddings.grid_of(pixel_values)

    def selection_losses(
        self,
        selection: tuple[TripsSelection, ...],
        regions: torch.FloatTensor,
        schedule: SelectionSchedule,
        pixel_values: torch.Tensor | None,
        image_index: torch.LongTensor | None,
        image_cache: TripsImageCache | None,
    ) -> torch.Tensor | None:
        """
        Return the mean over the layers that the text or the image scores, `(num_texts,)`, or `None` without any such
        layer. The target is the text's region, or, of a layer that the image scores, the union of those of the image's
        texts.
        """
        text_targets = region_targets(regions, self.grid_of(pixel_values, image_cache))  # (num_texts, num_patches)
        image_targets = text_targets
        if image_index is not None:
            images = image_cache.hidden_states if pixel_values is None else pixel_values
            image_targets = union_of_targets(text_targets, image_index, num_images=images.shape[0])
        losses = []
        for layer, settings in zip(selection, schedule.selections):
            if settings.guidance != "random":
                targets = text_targets if settings.guidance == "text" else image_targets
                losses.append(selection_loss(layer.scores, layer.candidate_indices, targets))
        return torch.stack(losses).mean(dim=0) if losses else None

    @can_return_tuple
    @auto_docstring(custom_args=SHARED_ARGS)
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        image_index: torch.LongTensor | None = None,
        image_cache: TripsImageCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        regions: torch.FloatTensor | None = None,
        schedule: SelectionSchedule | str | None = None,
        keep_rate: float | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TripsModelOutput:
        r"""
        Example:

        ```python
        >>> import torch
        >>> from modeling_trips import TripsConfig, TripsModel

        >>> model = TripsModel(TripsConfig.from_preset("tiny")).eval()
        >>> outputs = model(torch.tensor([[2, 5, 6, 3]]), torch.randn(1, 3, 64, 64))
        >>> [tuple(layer.kept_indices.shape) for layer in outputs.selection]
        [(1, 32), (1, 17)]
        ```
        """
        text_output = self.text_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        outputs = self.fuse(
            text_states=text_output.last_hidden_state,
            attention_mask=attention_mask,
            pixel_values=pixel_values,
            image_index=image_index,
            image_cache=image_cache,
            regions=regions,
            schedule=schedule,
            keep_rate=keep_rate,
            **kwargs,
        )
        outputs.text_model_output = text_output
        return outputs


TripsModel.register_for_auto_class("AutoModel")


# Heads that write


# Own arguments of the heads' `forward`
SEQ2SEQ_ARGS = r"""
cache (`Cache`, *optional*):
    Keys and values of the tokens before `decoder_input_ids`.
labels (`torch.LongTensor` of shape `(num_labels, label_length)`, *optional*):
    Token ids of the answers or captions, ending with the end token; -100 is ignored.
loss_weights (`torch.FloatTensor` of shape `(num_labels,)`, *optional*):
    Weight of each row of `labels` in the loss, such as the share of VQAv2's ten answers. 1 by default.
text_index (`torch.LongTensor` of shape `(num_labels,)`, *optional*):
    Row j of `labels` follows text `text_index[j]`, so that several answers to one question share everything
    except the decoder. By default row j follows text j.
"""

SEQ2SEQ_EXAMPLE = """
Example:

```python
>>> from PIL import Image
>>> from modeling_trips import TripsForQuestionAnswering, TripsProcessor

>>> processor = TripsProcessor.from_pretrained("examples/trips-tiny-scenes")
>>> model = TripsForQuestionAnswering.from_pretrained("examples/trips-tiny-scenes")
>>> image = Image.open("examples/scene.png")  # eight shapes, one of them a purple cross
>>> inputs = processor(images=image, text="what color is the cross?", return_tensors="pt")
>>> processor.post_process_answers(model.generate(**inputs))
['purple']
>>> loss = model(**inputs, labels=processor.encode_answers(["purple"])).loss
```
"""


@auto_docstring(custom_intro="Output of the heads that write text.")
@dataclass
class TripsSeq2SeqLMOutput(Seq2SeqLMOutput):
    r"""
    loss (`torch.FloatTensor` of shape `()`, *optional*, returned when `labels` is given):
        Cross-entropy of the labels, weighted by `loss_weights`, per label token, and in training
        `config.selection_loss_weight * selection_loss`. NaN, as of Transformers' heads, if all labels are -100 and
        `num_items_in_batch` does not count other ones.
    selection_loss (`torch.FloatTensor` of shape `()`, *optional*):
        Selection supervision. In training, if `regions` are given.
    relevance_values (`tuple(torch.FloatTensor)`, *optional*):
        As in [`TripsModelOutput`]. The mean of its `relevance_losses` over the label tokens is a part of the loss.
    selection (`tuple(TripsSelection)`, *optional*):
        What each selection layer kept. `None` if `encoder_outputs` were given without it.
    """

    selection_loss: torch.FloatTensor | None = None
    relevance_values: tuple[torch.FloatTensor, ...] | None = None
    selection: tuple[TripsSelection, ...] | None = None


@auto_docstring(custom_intro="Base of the models with a decoder, whose word embeddings are not the text encoder's.")
class TripsWritingModel(TripsPreTrainedModel):
    def add_decoder(self):
        decoder = TripsDecoder(self.config.decoder_config)
        self.lm_head = TripsLMHead(self.config.decoder_config)
        self.decoder = decoder  # behind the head, or automatic device maps take `lm_head.decoder` for a part of it

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Embedding:
        """Resize the embeddings of the text encoder and of the decoder, and the heads."""
        size = self.decoder.resize_token_embeddings(*args, **kwargs).num_embeddings
        self.lm_head.decoder = self._get_resized_lm_head(self.lm_head.decoder, size)
        return super().resize_token_embeddings(*args, **kwargs)

    def prepare_decoder_input_ids_from_labels(self, labels: torch.LongTensor) -> torch.LongTensor:
        """
        Return the decoder's input for teacher forcing, `(num_labels, label_length)`: the labels shifted right after
        the start token, with padding in place of -100.
        """
        start = torch.full_like(labels[:, :1], self.config.decoder_start_token_id)
        shifted = torch.cat((start, labels[:, :-1]), dim=1)
        return shifted.masked_fill(shifted == -100, self.config.pad_token_id)


@auto_docstring(
    custom_intro="""
    TRIPS with a text decoder. The text (a prompt, a question, or an empty text) selects the patches and is fused with
    them. The decoder reads the fused states and writes a caption or an answer.
    """
)
class TripsForConditionalGeneration(TripsWritingModel, GenerationMixin):
    auto_classes: ClassVar[tuple[str, ...]] = ("AutoModelForImageTextToText",)
    pipeline_class: ClassVar[type | None] = TripsImageToTextPipeline
    _tied_weights_keys = {"lm_head.decoder.weight": "decoder.embeddings.word_embeddings.weight"}

    def __init__(self, config: TripsConfig):
        super().__init__(config)
        config.check_start_token()
        self.model = TripsModel(config)
        self.add_decoder()
        # The default of `generate`: enough for a caption.
        self.generation_config.max_new_tokens = min(32, config.decoder_config.max_position_embeddings)
        self.post_init()

    def adjust_generation_fn(self, *args, **kwargs):
        """
        As in Transformers. A checkpoint of a task without generation has no generation config, so that the special
        tokens come from the decoder's config.
        """
        names = ["bos_token_id", "eos_token_id", "max_new_tokens"]
        defaults = {name: getattr(self.generation_config, name) for name in names}
        super().adjust_generation_fn(*args, **kwargs)
        if self.generation_config.max_length is not None:
            del defaults["max_new_tokens"]
        self.generation_config.update(defaults_only=True, **defaults)

    def get_output_embeddings(self):
        """
        Return the head if its weights are not tied. PEFT and FSDP expect tied weights in `get_input_embeddings`, the
        text encoder's, but the head shares the decoder's: they would untie it or shard it twice.
        """
        return None if self.config.tie_word_embeddings else self.lm_head.decoder

    def set_output_embeddings(self, new_embeddings):
        self.lm_head.decoder = new_embeddings

    def _expand_inputs_for_generation(self, *args, **model_kwargs):
        if model_kwargs.get("encoder_outputs") is not None:  # the library expands them in place: spare the caller's
            model_kwargs["encoder_outputs"] = copy.copy(model_kwargs["encoder_outputs"])
        return super()._expand_inputs_for_generation(*args, **model_kwargs)

    def get_encoder(self, modality: str | None = None):
        return self.model

    @can_return_tuple
    @auto_docstring(custom_intro=SEQ2SEQ_EXAMPLE, custom_args=SHARED_ARGS + SEQ2SEQ_ARGS)
    @accept_former_cache_name
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        image_index: torch.LongTensor | None = None,
        image_cache: TripsImageCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.FloatTensor | None = None,
        encoder_outputs: TripsModelOutput | None = None,
        cache: Cache | None = None,
        labels: torch.LongTensor | None = None,
        loss_weights: torch.FloatTensor | None = None,
        text_index: torch.LongTensor | None = None,
        regions: torch.FloatTensor | None = None,
        schedule: SelectionSchedule | str | None = None,
        keep_rate: float | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TripsSeq2SeqLMOutput:
        if encoder_outputs is None:
            encoder_outputs = self.model(
                input_ids=input_ids,
                pixel_values=pixel_values,
                attention_mask=attention_mask,
                token_type_ids=token_type_ids,
                image_index=image_index,
                image_cache=image_cache,
                inputs_embeds=inputs_embeds,
                regions=regions,
                schedule=schedule,
                keep_rate=keep_rate,
                **kwargs,
            )
        elif not isinstance(encoder_outputs, ModelOutput):
            encoder_outputs = TripsModelOutput(last_hidden_state=encoder_outputs[0])
        fused_states = encoder_outputs[0]  # (num_texts, text_length, hidden_size)
        if labels is not None:
            use_cache = False
            _check_labels(labels, loss_weights, text_index, num_texts=fused_states.shape[0])
        if decoder_input_ids is None and decoder_inputs_embeds is None:
            if labels is None:
                raise ValueError("Give `labels` or `decoder_input_ids`, or call `generate`.")
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        decoded = self.decoder(
            decoder_input_ids,
            attention_mask=decoder_attention_mask,
            encoder_hidden_states=select_rows(fused_states, text_index),
            encoder_attention_mask=select_rows(attention_mask, text_index),
            inputs_embeds=decoder_inputs_embeds,
            cache=cache,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.lm_head(decoded.last_hidden_state)
        loss = None
        selection_loss = None
        if labels is not None:
            token_counts = (labels != -100).sum(dim=-1)  # (num_labels,)
            num_tokens = kwargs.get("num_items_in_batch")
            if num_tokens is None:
                num_tokens = token_counts.sum()
            selection_losses = select_rows(encoder_outputs.get("selection_losses"), text_index)
            selection_loss = mean_over_items(selection_losses, token_counts, num_tokens)
            relevance_losses = select_rows(encoder_outputs.get("relevance_losses"), text_index)
            relevance_loss = mean_over_items(relevance_losses, token_counts, num_tokens)
            loss = weighted_sum(
                [
                    (1.0, label_loss(logits, labels, num_tokens, loss_weights)),
                    (self.config.selection_loss_weight, selection_loss),
                    (1.0, relevance_loss),
                ]
            )
        return TripsSeq2SeqLMOutput(
            loss=loss,
            selection_loss=selection_loss,
            relevance_values=encoder_outputs.get("relevance_values"),
            logits=logits,
            **{CACHE_NAME: decoded.get(CACHE_NAME)},
            decoder_hidden_states=decoded.hidden_states,
            decoder_attentions=decoded.attentions,
            cross_attentions=decoded.cross_attentions,
            encoder_last_hidden_state=fused_states,
            encoder_hidden_states=encoder_outputs.get("hidden_states"),
            encoder_attentions=encoder_outputs.get("attentions"),
            selection=encoder_outputs.get("selection"),
        )

    @torch.no_grad()
    def score_labels(
        self,
        labels: torch.LongTensor,
        encoder_outputs: TripsModelOutput,
        attention_mask: torch.Tensor | None = None,
        text_index: torch.LongTensor | None = None,
        temperature: float = 1.0,
    ) -> torch.FloatTensor:
        """
        Return the log-likelihood of given answers or captions, `(num_labels,)`, float32: the sum over the tokens of
        each row. Call `eval()` first, as for `generate`.

        Args:
            labels, text_index: As in `forward`.
            encoder_outputs ([`TripsModelOutput`]): Output of `get_encoder()` for the texts and images.
            attention_mask (`torch.Tensor` of shape `(num_texts, text_length)`, *optional*): Of the texts.
            temperature (`float`, *optional*, defaults to 1.0): Divides the logits.
        """
        logits = self(
            attention_mask=attention_mask,
            encoder_outputs=encoder_outputs,
            decoder_input_ids=self.prepare_decoder_input_ids_from_labels(labels),
            text_index=text_index,
            use_cache=False,
        ).logits
        return -token_nll(logits / temperature, labels).sum(dim=-1)


def _check_labels(labels, loss_weights, text_index, num_texts: int):
    num_labels = len(labels)
    if text_index is None and num_labels != num_texts:
        raise ValueError(
            f"Got {num_labels} rows of `labels` for {num_texts} texts. Pass `text_index`, the text of each row."
        )
    check_shape("loss_weights", loss_weights, num_labels)
    check_shape("text_index", text_index, num_labels)


def token_nll(logits: torch.Tensor, labels: torch.LongTensor) -> torch.Tensor:
    """Return the negative log-likelihood of each label, float32 `(num_labels, label_length)`; 0 for -100."""
    # One row per token: with the vocabulary in the middle dimension, a CPU takes twice the time.
    losses = nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none")
    return losses.view(labels.shape)  # (num_labels, label_length)


def label_loss(
    logits: torch.Tensor,
    labels: torch.LongTensor,
    num_tokens: int | torch.Tensor,
    loss_weights: torch.FloatTensor | None = None,
) -> torch.Tensor:
    """
    Return the weighted cross-entropy, divided by the number of label tokens, whatever their weights.

    ALBEF divides by the number of questions. `Trainer` counts tokens (`num_items_in_batch`), so that gradient
    accumulation and several processes give the gradient of the whole batch.
    """
    nll = token_nll(logits, labels).sum(dim=-1)
    if loss_weights is not None:
        nll = nll * loss_weights.to(nll.dtype)
    return nll.sum() / num_tokens


TripsForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")


@auto_docstring(custom_intro="Output of [`TripsForQuestionAnswering.rank_answers`].")
@dataclass
class TripsAnswerRanking(ModelOutput):
    r"""
    answer_indices (`torch.LongTensor` of shape `(num_texts, k)`):
        Rows of `answer_ids`, the best first.
    scores (`torch.FloatTensor` of shape `(num_texts, k)`):
        Log-likelihood of each of these answers, the sum over its tokens. With `config.answer_ranking="albef"` it
        counts the first token twice.
    selection (`tuple(TripsSelection)`):
        What each selection layer kept.
    """

    answer_indices: torch.LongTensor | None = None
    scores: torch.FloatTensor | None = None
    selection: tuple[TripsSelection, ...] | None = None


@auto_docstring(
    custom_intro="""
    TRIPS that answers a question about an image. Use `generate` for free answers and `rank_answers` for the best of a
    given list.
    """
)
class TripsForQuestionAnswering(TripsForConditionalGeneration):
    auto_classes = ("AutoModelForVisualQuestionAnswering", "AutoModelForImageTextToText")
    pipeline_class = TripsVisualQuestionAnsweringPipeline

    @torch.no_grad()
    def rank_answers(
        self,
        answer_ids: torch.LongTensor,
        k: int = 128,
        answers_per_step: int = 16,
        attention_mask: torch.Tensor | None = None,
        **inputs,
    ) -> TripsAnswerRanking:
        """
        Rank given answers by their likelihood, or as ALBEF does (see `config.answer_ranking`), in ALBEF's two stages:
        the `k` answers with the most likely first token are scored in full. Call `eval()` first, as for `generate`.

        Args:
            answer_ids (`torch.LongTensor` of shape `(num_answers, answer_length)`): The answers without a start token,
                ending with the end token, padded with the padding token or -100.
            k (`int`, *optional*, defaults to 128): Number of answers that are scored in full.
            answers_per_step (`int`, *optional*, defaults to 16): Number of answers per question that the decoder
                scores at once, which bounds the memory.
            inputs: The question and image inputs of `forward`.

        Returns:
            [`TripsAnswerRanking`]: The `min(k, num_answers)` best answers of each question, the best first.

        Raises:
            ValueError: `k` is below 1, or an answer has no tokens.
        """
        labels = answer_ids.masked_fill(answer_ids == self.config.pad_token_id, -100)
        is_empty = labels[:, 0] == -100
        if k < 1 or is_empty.any():
            raise ValueError(
                f"`k` must be at least 1 (got {k}), and every row of `answer_ids` must begin with a token."
            )
        encoder_outputs = self.model(attention_mask=attention_mask, **inputs)
        num_texts = encoder_outputs.last_hidden_state.shape[0]
        start = torch.full((num_texts, 1), self.config.decoder_start_token_id, device=labels.device)
        first_outputs = self(
            attention_mask=attention_mask,
            encoder_outputs=encoder_outputs,
            decoder_input_ids=start,
            use_cache=False,
        )
        first_token_scores = first_outputs.logits[:, 0].float().log_softmax(dim=-1)  # (num_texts, vocab_size)
        first_token_scores = first_token_scores[:, labels[:, 0]]  # (num_texts, num_answers)
        order = first_token_scores.argsort(dim=-1, descending=True, stable=True)
        candidates = order[:, :k]  # (num_texts, k)

        chunks = []
        for chunk in candidates.split(answers_per_step, dim=1):
            text_index = torch.arange(num_texts, device=labels.device).repeat_interleave(chunk.shape[1])
            chunk_scores = self.score_labels(
                labels=labels[chunk.flatten()],
                encoder_outputs=encoder_outputs,
                attention_mask=attention_mask,
                text_index=text_index,
            )
            chunks.append(chunk_scores.view(chunk.shape))
        scores = torch.cat(chunks, dim=1)  # (num_texts, k)
        # CODEPATH: ALBEF adds the first stage's score to the whole answer's, which contains it (models/model_vqa.py)
        if self.config.answer_ranking == "albef":
            scores = scores + first_token_scores.gather(1, candidates)
        scores, order = scores.sort(dim=-1, descending=True, stable=True)
        return TripsAnswerRanking(
            answer_indices=candidates.gather(1, order),
            scores=scores,
            selection=encoder_outputs.selection,
        )


TripsForQuestionAnswering.register_for_auto_class("AutoModelForVisualQuestionAnswering")


__all__ = [
    "TripsAnswerRanking",
    "TripsForConditionalGeneration",
    "TripsForQuestionAnswering",
    "TripsModel",
    "TripsModelOutput",
    "TripsSeq2SeqLMOutput",
]
