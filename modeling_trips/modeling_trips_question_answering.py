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
"""TRIPS for visual question answering: a decoder writes the answer from the fused states, or ranks given answers."""

import copy
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import Seq2SeqLMOutput
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, auto_docstring, can_return_tuple
from transformers.utils.deprecation import deprecate_kwarg

from .configuration_trips import TripsConfig
from .modeling_trips import TripsModel, TripsModelOutput, TripsPreTrainedModel
from .modeling_trips_text import TripsDecoder, TripsLMHead
from .modeling_trips_vision import TripsSelection, TripsVisionPrefix


@auto_docstring(custom_intro="Output of the heads that write text.")
@dataclass
class TripsSeq2SeqLMOutput(Seq2SeqLMOutput):
    r"""
    loss (`torch.FloatTensor` of shape `(1,)`, *optional*, returned when `labels` is given):
        Cross-entropy of the answers, weighted by `answer_weights`, per label token.
    selection (`tuple(TripsSelection)`, *optional*):
        What each selection layer kept. `None` if `encoder_outputs` were given without it.
    """

    selection: tuple[TripsSelection, ...] | None = None


@auto_docstring(custom_intro="Output of [`TripsForQuestionAnswering.rank_answers`].")
@dataclass
class TripsAnswerRanking(ModelOutput):
    r"""
    answer_indices (`torch.LongTensor` of shape `(num_texts, k)`):
        Rows of `answer_ids`, the best first.
    scores (`torch.FloatTensor` of shape `(num_texts, k)`):
        Log-likelihood of each of these answers: the sum over its tokens.
    selection (`tuple(TripsSelection)`):
        What each selection layer kept.
    """

    answer_indices: torch.LongTensor | None = None
    scores: torch.FloatTensor | None = None
    selection: tuple[TripsSelection, ...] | None = None


@auto_docstring(
    custom_intro="""
    TRIPS with a text decoder that writes the answer to a question about an image. Use `generate` for free answers and
    `rank_answers` for the best of a given list.
    """
)
class TripsForQuestionAnswering(TripsPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.decoder.weight": "decoder.embeddings.word_embeddings.weight"}

    def __init__(self, config: TripsConfig):
        super().__init__(config)
        self.model = TripsModel(config)
        self.decoder = TripsDecoder(config.decoder_config)
        self.lm_head = TripsLMHead(config.decoder_config)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self):
        return self.lm_head.decoder

    def set_output_embeddings(self, new_embeddings):
        self.lm_head.decoder = new_embeddings

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Embedding:
        """Resizes the embeddings of the text encoder and those of the decoder, which are not tied, and the head."""
        self.decoder.resize_token_embeddings(*args, **kwargs)
        return super().resize_token_embeddings(*args, **kwargs)

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
            labels (`torch.LongTensor` of shape `(num_answers, answer_length)`)

        Returns:
            `torch.LongTensor` of the same shape.
        """
        start = torch.full_like(labels[:, :1], self.config.decoder_start_token_id)
        decoder_input_ids = torch.cat((start, labels[:, :-1]), dim=1)
        return decoder_input_ids.masked_fill(decoder_input_ids == -100, self.config.pad_token_id)

    @can_return_tuple
    @auto_docstring
    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
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
        answer_weights: torch.FloatTensor | None = None,
        question_index: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TripsSeq2SeqLMOutput:
        r"""
        image_index (`torch.LongTensor` of shape `(num_texts,)`, *optional*):
            Text i looks at image `image_index[i]`. By default text i looks at image i.
        prefix (`TripsVisionPrefix`, *optional*):
            Result of `model.encode_images`, in place of `pixel_values`.
        labels (`torch.LongTensor` of shape `(num_answers, answer_length)`, *optional*):
            Token ids of the answers, ending with the end token; -100 is ignored.
        answer_weights (`torch.FloatTensor` of shape `(num_answers,)`, *optional*):
            Weight of each answer in the loss, as VQAv2 has ten answers of which some are equal. 1 by default.
        question_index (`torch.LongTensor` of shape `(num_answers,)`, *optional*):
            Answer j answers question `question_index[j]`. By default answer j answers question j.
        """
        if encoder_outputs is None:
            encoder_outputs = self.model(
                input_ids, pixel_values, attention_mask, token_type_ids, image_index, prefix, inputs_embeds, **kwargs
            )
        elif not isinstance(encoder_outputs, ModelOutput):
            encoder_outputs = TripsModelOutput(last_hidden_state=encoder_outputs[0])
        if labels is not None:
            use_cache = False
            if decoder_input_ids is None and decoder_inputs_embeds is None:
                decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        elif decoder_input_ids is None and decoder_inputs_embeds is None:
            raise ValueError("Give `labels` or `decoder_input_ids`, or call `generate` or `rank_answers`.")
        fused_states = encoder_outputs[0]
        if labels is not None:
            _check_labels(labels, answer_weights, question_index, num_questions=len(fused_states))
        if question_index is not None:
            fused_states = fused_states[question_index]
            attention_mask = attention_mask[question_index] if attention_mask is not None else None
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
        loss = None
        if labels is not None:
            loss = answer_loss(logits, labels, answer_weights, kwargs.get("num_items_in_batch"))
        return TripsSeq2SeqLMOutput(
            loss=loss,
            logits=logits,
            cache=decoded.cache,
            decoder_hidden_states=decoded.hidden_states,
            decoder_attentions=decoded.attentions,
            cross_attentions=decoded.cross_attentions,
            encoder_last_hidden_state=encoder_outputs[0],
            encoder_hidden_states=encoder_outputs.get("hidden_states"),
            encoder_attentions=encoder_outputs.get("attentions"),
            selection=encoder_outputs.get("selection"),
        )

    @torch.no_grad()
    def rank_answers(
        self,
        answer_ids: torch.LongTensor,
        answer_attention_mask: torch.Tensor | None = None,
        k: int = 128,
        answers_per_step: int = 16,
        attention_mask: torch.Tensor | None = None,
        **inputs,
    ) -> TripsAnswerRanking:
        """
        Ranks given answers by their likelihood, in ALBEF's two stages: the `k` answers with the most likely first
        token are scored in full. Call `eval()` first, as for `generate`.

        Args:
            answer_ids (`torch.LongTensor` of shape `(num_answers, answer_length)`): the answers as labels, that is
                without the start token and ending with the end token; padded with the padding token or -100.
            answer_attention_mask (`torch.Tensor` of shape `(num_answers, answer_length)`, *optional*): 0 marks
                padding. By default padding and -100 are told from `answer_ids`.
            k (`int`, *optional*, defaults to 128): how many answers are scored in full.
            answers_per_step (`int`, *optional*, defaults to 16): how many answers per question the decoder scores at
                once, which bounds the memory.
            inputs: the question and image inputs of `forward`.

        Returns:
            [`TripsAnswerRanking`]: the `min(k, num_answers)` best answers of each question, the best first.

        Raises:
            ValueError: if `k` is below 1 or an answer has no tokens.
        """
        if answer_attention_mask is None:
            answer_attention_mask = (answer_ids != self.config.pad_token_id) & (answer_ids != -100)
        labels = answer_ids.masked_fill(answer_attention_mask == 0, -100)
        if k < 1 or (labels[:, 0] == -100).any():
            raise ValueError(
                f"`k` must be at least 1 (got {k}), and every row of `answer_ids` must begin with a token."
            )
        encoder_outputs = self.model(attention_mask=attention_mask, **inputs)
        decode = partial(self, attention_mask=attention_mask, encoder_outputs=encoder_outputs, use_cache=False)

        num_texts = encoder_outputs.last_hidden_state.shape[0]
        start = torch.full((num_texts, 1), self.config.decoder_start_token_id, device=labels.device)
        first_token_scores = decode(decoder_input_ids=start).logits[:, 0].log_softmax(dim=-1)[:, labels[:, 0]]
        candidates = first_token_scores.argsort(dim=-1, descending=True, stable=True)[:, :k]

        scores = []
        for chunk in candidates.split(answers_per_step, dim=1):
            chunk_labels = labels[chunk.flatten()]
            logits = decode(
                decoder_input_ids=self.prepare_decoder_input_ids_from_labels(chunk_labels),
                question_index=torch.arange(num_texts, device=labels.device).repeat_interleave(chunk.shape[1]),
            ).logits
            scores.append(-token_nll(logits, chunk_labels).sum(dim=-1).view(chunk.shape))
        scores, order = torch.cat(scores, dim=1).sort(dim=-1, descending=True, stable=True)
        return TripsAnswerRanking(candidates.gather(1, order), scores, encoder_outputs.selection)


def _check_labels(labels, answer_weights, question_index, num_questions: int):
    num_answers = len(labels)
    if question_index is None and num_answers != num_questions:
        raise ValueError(
            f"Got {num_answers} answers (`labels`) for {num_questions} questions. Say with `question_index` which "
            "question each of them answers."
        )
    for name, value in (("answer_weights", answer_weights), ("question_index", question_index)):
        if value is not None and tuple(value.shape) != (num_answers,):
            raise ValueError(f"`{name}` must have shape ({num_answers},), one entry per row of `labels`.")


def token_nll(logits: torch.Tensor, labels: torch.LongTensor) -> torch.Tensor:
    """Negative log-likelihood of each label, float32 `(num_answers, answer_length)`; 0 where the label is -100."""
    return nn.functional.cross_entropy(logits.float().transpose(1, 2), labels, reduction="none")


def answer_loss(
    logits: torch.Tensor,
    labels: torch.LongTensor,
    answer_weights: torch.FloatTensor | None = None,
    num_items_in_batch: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Weighted cross-entropy of the answers, divided by the number of label tokens.

    ALBEF divides by the number of questions instead. Tokens are what `Trainer` counts (`num_items_in_batch`), so that
    gradient accumulation and several processes give the gradient of the whole batch. All label tokens count in full,
    whatever the weights: the more distinct answers a batch has, the smaller its loss.
    """
    nll = token_nll(logits, labels).sum(dim=-1)
    if answer_weights is not None:
        nll = nll * answer_weights.to(nll.dtype)
    num_tokens = (labels != -100).sum() if num_items_in_batch is None else num_items_in_batch
    return nll.sum() / num_tokens


TripsForQuestionAnswering.register_for_auto_class("AutoModelForVisualQuestionAnswering")

__all__ = ["TripsAnswerRanking", "TripsForQuestionAnswering", "TripsSeq2SeqLMOutput"]
