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
"""TRIPS for visual question answering: the answer is written, or picked from a given list."""

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput, auto_docstring

from .modeling_trips_generation import TripsForConditionalGeneration
from .modeling_trips_vision import TripsSelection


@auto_docstring(custom_intro="Output of [`TripsForQuestionAnswering.rank_answers`].")
@dataclass
class TripsAnswerRanking(ModelOutput):
    r"""
    answer_indices (`torch.LongTensor` of shape `(num_texts, k)`):
        Rows of `answer_ids`, the best first.
    scores (`torch.FloatTensor` of shape `(num_texts, k)`):
        Log-likelihood of each of these answers: the sum over its tokens. With `config.answer_ranking="albef"` the
        first token's log-probability is in it twice.
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
        Ranks given answers by their likelihood, or as ALBEF does (see `config.answer_ranking`), in ALBEF's two stages:
        the `k` answers with the most likely first token are scored in full. Call `eval()` first, as for `generate`.

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
        num_texts = encoder_outputs.last_hidden_state.shape[0]
        start = torch.full((num_texts, 1), self.config.decoder_start_token_id, device=labels.device)
        first_logits = self(
            decoder_input_ids=start, attention_mask=attention_mask, encoder_outputs=encoder_outputs, use_cache=False
        ).logits[:, 0]
        first_token_scores = first_logits.float().log_softmax(dim=-1)[:, labels[:, 0]]
        candidates = first_token_scores.argsort(dim=-1, descending=True, stable=True)[:, :k]

        scores = []
        for chunk in candidates.split(answers_per_step, dim=1):
            text_index = torch.arange(num_texts, device=labels.device).repeat_interleave(chunk.shape[1])
            chunk_scores = self.score_labels(labels[chunk.flatten()], encoder_outputs, attention_mask, text_index)
            scores.append(chunk_scores.view(chunk.shape))
        scores = torch.cat(scores, dim=1)
        # CODEPATH: ALBEF adds the first stage's score to the whole answer's, which contains it (models/model_vqa.py)
        if self.config.answer_ranking == "albef":
            scores = scores + first_token_scores.gather(1, candidates)
        scores, order = scores.sort(dim=-1, descending=True, stable=True)
        return TripsAnswerRanking(candidates.gather(1, order), scores, encoder_outputs.selection)


TripsForQuestionAnswering.register_for_auto_class("AutoModelForVisualQuestionAnswering")

__all__ = ["TripsAnswerRanking", "TripsForQuestionAnswering"]
