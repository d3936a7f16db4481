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
"""TRIPS that writes: a decoder continues the text from the fused states, and makes captions or answers."""

import copy
from dataclasses import dataclass

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import Seq2SeqLMOutput
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, auto_docstring, can_return_tuple

from .configuration_trips import TripsConfig
from .losses_trips import weighted_sum
from .modeling_trips import TripsModel, TripsModelOutput, TripsPreTrainedModel
from .modeling_trips_layers import check_image_index
from .modeling_trips_pointing import pointing_losses, token_indices
from .modeling_trips_text import TripsDecoder, TripsLMHead
from .modeling_trips_vision import TripsSelection, TripsVisionPrefix
from .versions_trips import CACHE_NAME, accept_former_cache_name


# How many tokens `generate` writes unless a checkpoint or a call says otherwise: enough for a caption.
MAX_NEW_TOKENS = 32


@auto_docstring(custom_intro="Output of the heads that write text.")
@dataclass
class TripsSeq2SeqLMOutput(Seq2SeqLMOutput):
    r"""
    loss (`torch.FloatTensor` of shape `()`, *optional*, returned when `labels` is given):
        Cross-entropy of the labels, weighted by `loss_weights`, per label token, and in training
        `config.selection_loss_weight * selection_loss + config.pointing_loss_coefficient * pointing_loss`.
    selection_loss (`torch.FloatTensor` of shape `()`, *optional*):
        The part of `loss` that teaches texts to choose, before its weight. In training, if `regions` are given.
    pointing_loss (`torch.FloatTensor` of shape `()`, *optional*):
        The part that teaches the text's [CLS] to look at its region in the last cross-attention, before its weight. In
        training, if `regions` are given and `encoder_outputs` are not, unless its coefficient is 0.
    selection (`tuple(TripsSelection)`, *optional*):
        What each selection layer kept. `None` if `encoder_outputs` were given without it.
    """

    selection_loss: torch.FloatTensor | None = None
    pointing_loss: torch.FloatTensor | None = None
    selection: tuple[TripsSelection, ...] | None = None


@auto_docstring(
    custom_intro="""
    TRIPS with a text decoder. The text (a prompt, a question, or nothing) selects the patches and is fused with them;
    the decoder reads the fused states and writes what follows the text: a caption, an answer.
    """
)
class TripsForConditionalGeneration(TripsPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.decoder.weight": "decoder.embeddings.word_embeddings.weight"}

    def __init__(self, config: TripsConfig):
        super().__init__(config)
        config.check_start_token()
        self.model = TripsModel(config)
        decoder = TripsDecoder(config.decoder_config)
        self.lm_head = TripsLMHead(config.decoder_config)
        self.decoder = decoder  # behind the head, or automatic device maps take `lm_head.decoder` for a part of it
        self.generation_config.max_new_tokens = min(MAX_NEW_TOKENS, config.decoder_config.max_position_embeddings)
        self.post_init()

    def adjust_generation_fn(self, *args, **kwargs):
        """
        As in Transformers. But a checkpoint of a task that does not write has no generation config, and its model
        config does not say which token ends a text: its decoder's does.
        """
        of_decoder = self.generation_config
        super().adjust_generation_fn(*args, **kwargs)
        names = ["bos_token_id", "eos_token_id"]
        if self.generation_config.max_length is None:
            names.append("max_new_tokens")
        for name in names:
            if getattr(self.generation_config, name) is None:
                setattr(self.generation_config, name, getattr(of_decoder, name))

    def get_input_embeddings(self):
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self):
        """
        The head, if it has weights of its own. PEFT and FSDP know of heads that share those of `get_input_embeddings`,
        which are the text encoder's, but not of one that shares the decoder's: they would untie it or shard it twice.
        """
        return None if self.config.tie_word_embeddings else self.lm_head.decoder

    def set_output_embeddings(self, new_embeddings):
        self.lm_head.decoder = new_embeddings

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Embedding:
        """Resizes the embeddings of the text encoder and those of the decoder, which are not tied, and the head."""
        size = self.decoder.resize_token_embeddings(*args, **kwargs).num_embeddings
        self.lm_head.decoder = self._get_resized_lm_head(self.lm_head.decoder, size)
        return super().resize_token_embeddings(*args, **kwargs)

    def _validate_model_kwargs(self, model_kwargs: dict):
        super()._validate_model_kwargs(model_kwargs)
        index, prefix = model_kwargs.get("image_index"), model_kwargs.get("prefix")
        images = model_kwargs.get("pixel_values") if prefix is None else prefix.hidden_states
        # Of another device than the CPU, the values are known only when it has finished all its work.
        if index is not None and images is not None and index.device.type == "cpu":
            check_image_index(index, num_images=len(images))

    def _expand_inputs_for_generation(self, *args, **model_kwargs):
        if model_kwargs.get("encoder_outputs") is not None:  # the library expands them in place: spare the caller's
            model_kwargs["encoder_outputs"] = copy.copy(model_kwargs["encoder_outputs"])
        return super()._expand_inputs_for_generation(*args, **model_kwargs)

    def get_encoder(self, modality: str | None = None):
        return self.model

    def get_decoder(self):
        return self.decoder

    def prepare_decoder_input_ids_from_labels(self, labels: torch.LongTensor) -> torch.LongTensor:
        """
        The decoder's input for teacher forcing: labels shifted right behind the start token, -100 replaced by padding.

        Args:
            labels (`torch.LongTensor` of shape `(num_labels, label_length)`)

        Returns:
            `torch.LongTensor` of the same shape.
        """
        return shift_right(labels, self.config.decoder_start_token_id, self.config.pad_token_id)

    @can_return_tuple
    @auto_docstring
    @accept_former_cache_name
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        image_index: torch.LongTensor | None = None,
        prefix: TripsVisionPrefix | None = None,
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
        patch_targets: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TripsSeq2SeqLMOutput:
        r"""
        image_index (`torch.LongTensor` of shape `(num_texts,)`, *optional*):
            Text i looks at image `image_index[i]`. By default text i looks at image i.
        prefix (`TripsVisionPrefix`, *optional*):
            Result of `model.encode_images`, in place of `pixel_values`.
        cache (`Cache`, *optional*):
            Keys and values of the tokens before `decoder_input_ids`.
        labels (`torch.LongTensor` of shape `(num_labels, label_length)`, *optional*):
            Token ids of the answers or captions, ending with the end token; -100 is ignored.
        loss_weights (`torch.FloatTensor` of shape `(num_labels,)`, *optional*):
            Weight of each row of `labels` in the loss, as VQAv2 has ten answers of which some are equal. 1 by default.
        text_index (`torch.LongTensor` of shape `(num_labels,)`, *optional*):
            Row j of `labels` follows text `text_index[j]`, so that the answers to one question, or the captions of one
            image, share all but the decoder. By default row j follows text j.
        regions (`torch.FloatTensor` of shape `(num_texts, 4)`, *optional*):
            What each text is about, see [`TripsModel`].
        patch_targets (`torch.FloatTensor` of shape `(num_texts, num_patches)`, *optional*):
            Where a teacher looks, see [`TripsModel`].
        """
        # CODEPATH: a coefficient of 0, the default, leaves the loss out.
        is_taught = self.training and labels is not None and regions is not None and encoder_outputs is None
        is_pointed = is_taught and self.config.pointing_loss_coefficient > 0
        if encoder_outputs is None:
            encoder_outputs = self.model(
                input_ids,
                pixel_values,
                attention_mask,
                token_type_ids,
                image_index,
                prefix,
                inputs_embeds,
                regions,
                patch_targets,
                output_cls_attention=is_pointed,
                **kwargs,
            )
        elif not isinstance(encoder_outputs, ModelOutput):
            encoder_outputs = TripsModelOutput(last_hidden_state=encoder_outputs[0])
        if labels is not None:
            use_cache = False
            if decoder_input_ids is None and decoder_inputs_embeds is None:
                decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        elif decoder_input_ids is None and decoder_inputs_embeds is None:
            raise ValueError("Give `labels` or `decoder_input_ids`, or call `generate`.")
        fused_states = encoder_outputs[0]
        if labels is not None:
            _check_labels(labels, loss_weights, text_index, num_texts=len(fused_states))
        if text_index is not None:
            fused_states = fused_states[text_index]
            attention_mask = attention_mask[text_index] if attention_mask is not None else None
        decoded = self.decoder(
            decoder_input_ids,
            decoder_attention_mask,
            encoder_hidden_states=fused_states,
            encoder_attention_mask=attention_mask,
            inputs_embeds=decoder_inputs_embeds,
            cache=cache,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.lm_head(decoded.last_hidden_state)
        loss, of_texts = None, {}
        if labels is not None:
            num_items = kwargs.get("num_items_in_batch")
            of_texts["selection_loss"] = encoder_outputs.get("selection_losses")
            if is_pointed:
                of_texts["pointing_loss"] = self._pointing_losses(encoder_outputs, regions, pixel_values, prefix)
            for name, losses in of_texts.items():
                if losses is not None:
                    losses = losses if text_index is None else losses[text_index]
                    of_texts[name] = mean_over_labels(losses, labels, num_items)
            loss = weighted_sum(
                (1, label_loss(logits, labels, loss_weights, num_items)),
                (self.config.selection_loss_weight, of_texts["selection_loss"]),
                (self.config.pointing_loss_coefficient, of_texts.get("pointing_loss")),
            )
        return TripsSeq2SeqLMOutput(
            loss=loss,
            **of_texts,
            logits=logits,
            **{CACHE_NAME: decoded.get(CACHE_NAME)},
            decoder_hidden_states=decoded.hidden_states,
            decoder_attentions=decoded.attentions,
            cross_attentions=decoded.cross_attentions,
            encoder_last_hidden_state=encoder_outputs[0],
            encoder_hidden_states=encoder_outputs.get("hidden_states"),
            encoder_attentions=encoder_outputs.get("attentions"),
            selection=encoder_outputs.get("selection"),
        )

    def _pointing_losses(
        self,
        encoder_outputs: TripsModelOutput,
        regions: torch.FloatTensor,
        pixel_values: torch.FloatTensor | None,
        prefix: TripsVisionPrefix | None,
    ) -> torch.Tensor:
        """How far each text's [CLS] looks from its region in the last cross-attention, all heads: `(num_texts,)`."""
        weights, vision = encoder_outputs.cls_attention, encoder_outputs.vision_model_output
        if vision.attention_mask is not None:
            weights = weights * vision.attention_mask[:, None].to(weights.device)
            weights = weights / weights.sum(dim=-1, keepdim=True)
        indices = token_indices(encoder_outputs.selection, vision.last_hidden_state[:, 1:])
        return pointing_losses(weights.mean(dim=1)[:, 1:], indices, regions, self.model.grid_of(pixel_values, prefix))

    @torch.no_grad()
    def score_labels(
        self,
        labels: torch.LongTensor,
        encoder_outputs: TripsModelOutput,
        attention_mask: torch.Tensor | None = None,
        text_index: torch.LongTensor | None = None,
    ) -> torch.FloatTensor:
        """
        Log-likelihood of given answers or captions. Call `eval()` first, as for `generate`.

        Args:
            labels, text_index: as in `forward`.
            encoder_outputs ([`TripsModelOutput`]): what `get_encoder()` returned for the texts and images.
            attention_mask (`torch.Tensor` of shape `(num_texts, text_length)`, *optional*): of the texts.

        Returns:
            `torch.FloatTensor` of shape `(num_labels,)`, float32: the sum over the tokens of each row.
        """
        logits = self(
            attention_mask=attention_mask,
            encoder_outputs=encoder_outputs,
            decoder_input_ids=self.prepare_decoder_input_ids_from_labels(labels),
            text_index=text_index,
            use_cache=False,
        ).logits
        return -token_nll(logits, labels).sum(dim=-1)


def _check_labels(labels, loss_weights, text_index, num_texts: int):
    num_labels = len(labels)
    if text_index is None and num_labels != num_texts:
        raise ValueError(
            f"Got {num_labels} rows of `labels` for {num_texts} texts. Say with `text_index` which text each of them "
            "follows."
        )
    for name, value in (("loss_weights", loss_weights), ("text_index", text_index)):
        if value is not None and tuple(value.shape) != (num_labels,):
            raise ValueError(f"`{name}` must have shape ({num_labels},), one entry per row of `labels`.")


def shift_right(labels: torch.LongTensor, start_token_id: int, pad_token_id: int) -> torch.LongTensor:
    """`(num_labels, label_length)` -> the same: a start token and all but the last label; -100 becomes padding."""
    start = torch.full_like(labels[:, :1], start_token_id)
    shifted = torch.cat((start, labels[:, :-1]), dim=1)
    return shifted.masked_fill(shifted == -100, pad_token_id)


def token_nll(logits: torch.Tensor, labels: torch.LongTensor) -> torch.Tensor:
    """Negative log-likelihood of each label, float32 `(num_labels, label_length)`; 0 where the label is -100."""
    return nn.functional.cross_entropy(logits.float().transpose(1, 2), labels, reduction="none")


def mean_over_labels(
    losses: torch.Tensor, labels: torch.LongTensor, num_items_in_batch: int | torch.Tensor | None = None
) -> torch.Tensor:
    """
    The mean over the label tokens of what each row of labels costs as a whole, `(num_labels,)`: as `label_loss`
    counts, so that gradient accumulation and several processes give the gradient of the whole batch.
    """
    num_tokens = (labels != -100).sum(dim=-1)
    return (losses * num_tokens).sum() / (num_tokens.sum() if num_items_in_batch is None else num_items_in_batch)


def label_loss(
    logits: torch.Tensor,
    labels: torch.LongTensor,
    loss_weights: torch.FloatTensor | None = None,
    num_items_in_batch: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Weighted cross-entropy, divided by the number of label tokens.

    ALBEF divides by the number of questions instead. Tokens are what `Trainer` counts (`num_items_in_batch`), so that
    gradient accumulation and several processes give the gradient of the whole batch. All label tokens count in full,
    whatever the weights: the more distinct answers a batch has, the smaller its loss.
    """
    nll = token_nll(logits, labels).sum(dim=-1)
    if loss_weights is not None:
        nll = nll * loss_weights.to(nll.dtype)
    num_tokens = (labels != -100).sum() if num_items_in_batch is None else num_items_in_batch
    return nll.sum() / num_tokens


TripsForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

__all__ = ["TripsForConditionalGeneration", "TripsSeq2SeqLMOutput", "token_nll"]
