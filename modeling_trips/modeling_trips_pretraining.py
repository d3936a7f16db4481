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
"""TRIPS in pre-training: contrastive, matching, masked-language and prefix-language objectives on the same towers."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring, can_return_tuple

from .configuration_trips import TripsConfig
from .losses_contrastive_trips import contrastive_loss
from .losses_trips import masked_language_loss, mean_count, weighted_sum
from .modeling_trips_generation import label_loss, shift_right
from .modeling_trips_retrieval import TripsContrastiveModel, TripsRetrievalOutput
from .modeling_trips_text import TripsDecoder, TripsLMHead
from .modeling_trips_vision import TripsVisionPrefix
from .momentum_trips import MomentumTeacher


@auto_docstring(custom_intro="Output of [`TripsForPreTraining`].")
@dataclass
class TripsForPreTrainingOutput(TripsRetrievalOutput):
    r"""
    loss (`torch.FloatTensor` of shape `()`, *optional*):
        The weighted sum of the losses below.
    mlm_loss (`torch.FloatTensor` of shape `()`, *optional*):
        Masked language modelling: words are guessed from the rest of the text and the image.
    prefix_lm_loss (`torch.FloatTensor` of shape `()`, *optional*):
        The decoder continues a caption from its beginning and the image.
    mlm_logits (`torch.FloatTensor` of shape `(num_texts, text_length, vocab_size)`, *optional*):
        Scores of the masked text's tokens.
    """

    mlm_loss: torch.FloatTensor | None = None
    prefix_lm_loss: torch.FloatTensor | None = None
    mlm_logits: torch.FloatTensor | None = None


@auto_docstring(
    custom_intro="""
    TRIPS in pre-training (ALBEF's objectives, and mPLUG's prefix language modelling). The objectives share one pass of
    the vision tower up to the first layer that a text guides; from there on, every text selects for itself: a caption,
    its masked form, its beginning, and that of a negative pair.
    """
)
class TripsForPreTraining(TripsContrastiveModel):
    _tied_weights_keys = {
        "mlm_score.decoder.weight": "model.text_model.embeddings.word_embeddings.weight",
        "lm_head.decoder.weight": "decoder.embeddings.word_embeddings.weight",
    }

    def __init__(self, config: TripsConfig):
        super().__init__(config)
        # CODEPATH: without prefix language modelling nothing is written.
        if config.prefix_lm_weight > 0:
            config.check_start_token()
        self.mlm_score = TripsLMHead(config.text_config)
        decoder = TripsDecoder(config.decoder_config)
        self.lm_head = TripsLMHead(config.decoder_config)
        self.decoder = decoder  # behind the head, or automatic device maps take `lm_head.decoder` for a part of it
        self.post_init()

    def get_output_embeddings(self):
        return self.mlm_score.decoder

    def set_output_embeddings(self, new_embeddings):
        self.mlm_score.decoder = new_embeddings

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Embedding:
        """Resizes the embeddings of the text encoder and those of the decoder, which are not tied, and both heads."""
        size = self.decoder.resize_token_embeddings(*args, **kwargs).num_embeddings
        self.lm_head.decoder = self._get_resized_lm_head(self.lm_head.decoder, size)
        return super().resize_token_embeddings(*args, **kwargs)

    def parameters_by_objective(self) -> dict[str, list[nn.Parameter]]:
        mlm_score = self.mlm_score  # whose decoder's weight is that of the text encoder
        return {
            **super().parameters_by_objective(),
            "mlm_weight": [*mlm_score.dense.parameters(), *mlm_score.LayerNorm.parameters(), mlm_score.decoder.bias],
            "prefix_lm_weight": [*self.decoder.parameters(), *self.lm_head.parameters()],
        }

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        image_index: torch.LongTensor | None = None,
        image_ids: torch.LongTensor | None = None,
        mlm_input_ids: torch.LongTensor | None = None,
        mlm_labels: torch.LongTensor | None = None,
        prompt_input_ids: torch.LongTensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        teacher: MomentumTeacher | None = None,
        teacher_weight: float = 0.0,
        regions: torch.FloatTensor | None = None,
        patch_targets: torch.FloatTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | TripsForPreTrainingOutput:
        r"""
        image_index (`torch.LongTensor` of shape `(num_texts,)`, *optional*):
            Text i is a caption of image `image_index[i]`. By default text i is one of image i.
        image_ids (`torch.LongTensor` of shape `(num_images,)`, *optional*):
            Images of equal id are the same, in this batch and in those before, whose features the teacher's queues
            hold. Without a teacher all images are distinct by default.
        mlm_input_ids (`torch.LongTensor` of shape `(num_texts, text_length)`, *optional*):
            The texts with masked tokens, as [`~transformers.DataCollatorForLanguageModeling`] makes them.
        mlm_labels (`torch.LongTensor` of shape `(num_texts, text_length)`, *optional*):
            What was masked; -100 elsewhere.
        prompt_input_ids (`torch.LongTensor` of shape `(num_texts, prompt_length)`, *optional*):
            The beginnings of the texts.
        prompt_attention_mask (`torch.Tensor` of shape `(num_texts, prompt_length)`, *optional*):
            0 marks padding in them.
        labels (`torch.LongTensor` of shape `(num_texts, label_length)`, *optional*):
            How they go on, ending with the end token; -100 is ignored.
        teacher ([`MomentumTeacher`], *optional*):
            Softens the targets of the contrastive and the masked-language loss, and gives the former more candidates.
        teacher_weight (`float`, *optional*, defaults to 0.0):
            Share of the teacher's opinion in the targets (ALBEF's alpha).
        regions (`torch.FloatTensor` of shape `(num_texts, 4)`, *optional*):
            What each text is about, see [`TripsForRetrieval`].
        patch_targets (`torch.FloatTensor` of shape `(num_texts, num_patches)`, *optional*):
            Where a teacher looks, see [`TripsForRetrieval`].
        """
        config = self.config
        if teacher is not None and image_ids is None and config.itc_weight > 0:
            raise ValueError(
                "The teacher's queues hold images of past batches: say with `image_ids` which images are the same."
            )
        prefix = self.model.encode_images(pixel_values, **kwargs)
        text_outputs = self.get_text_features(input_ids, attention_mask, token_type_ids, **kwargs)
        find_contrastive_loss, teacher_logits = contrastive_loss, None
        if teacher is not None:
            taught = teacher(pixel_values, input_ids, attention_mask, token_type_ids, image_index, mlm_input_ids)
            teacher_logits = taught.mlm_logits
            find_contrastive_loss = partial(teacher.contrastive_loss, taught, teacher_weight, self.training)
        outputs = self.pair_losses(
            text_outputs,
            prefix,
            attention_mask,
            image_index,
            image_ids,
            find_contrastive_loss,
            regions,
            patch_targets,
            **kwargs,
        )
        mlm_loss = prefix_lm_loss = mlm_logits = None
        # CODEPATH: a weight of 0 leaves out an objective and its compute.
        if config.mlm_weight > 0 and mlm_labels is not None:
            mlm_logits = self.guess_words(mlm_input_ids, attention_mask, token_type_ids, image_index, prefix, **kwargs)
            num_masked = mean_count((mlm_labels != -100).sum())
            mlm_loss = masked_language_loss(mlm_logits, mlm_labels, teacher_logits, teacher_weight, num_masked)
        # CODEPATH: as above.
        if config.prefix_lm_weight > 0 and labels is not None:
            logits = self.continue_texts(
                prompt_input_ids, prompt_attention_mask, image_index, prefix, labels, **kwargs
            )
            num_tokens = mean_count((labels != -100).sum())  # there may be none: each text is too short to be cut
            prefix_lm_loss = label_loss(logits, labels, num_items_in_batch=num_tokens)
        losses = {"mlm_weight": mlm_loss, "prefix_lm_weight": prefix_lm_loss}
        outputs["loss"] = weighted_sum(
            (1.0, outputs["loss"]), *((getattr(self.config, name), loss) for name, loss in losses.items())
        )
        return TripsForPreTrainingOutput(
            **outputs, mlm_loss=mlm_loss, prefix_lm_loss=prefix_lm_loss, mlm_logits=mlm_logits
        )

    def guess_words(
        self,
        mlm_input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        image_index: torch.LongTensor | None = None,
        prefix: TripsVisionPrefix | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """
        Scores of the masked texts' tokens, `(num_texts, text_length, vocab_size)`. Arguments as in `forward`; the
        images are the `prefix` that `model.encode_images` makes of them.
        """
        fused = self.model(
            mlm_input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            image_index=image_index,
            prefix=prefix,
            **kwargs,
        )
        return self.mlm_score(fused.last_hidden_state)

    def continue_texts(
        self,
        prompt_input_ids: torch.LongTensor,
        prompt_attention_mask: torch.Tensor | None,
        image_index: torch.LongTensor | None,
        prefix: TripsVisionPrefix,
        labels: torch.LongTensor,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """
        Scores of what follows the beginnings, `(num_texts, label_length, vocab_size)`: of each label, given those
        before it. Arguments as in `forward` and `guess_words`.
        """
        fused = self.model(
            prompt_input_ids, attention_mask=prompt_attention_mask, image_index=image_index, prefix=prefix, **kwargs
        )
        decoded = self.decoder(
            shift_right(labels, self.config.decoder_start_token_id, self.config.pad_token_id),
            encoder_hidden_states=fused.last_hidden_state,
            encoder_attention_mask=prompt_attention_mask,
            use_cache=False,
            **kwargs,
        )
        return self.lm_head(decoded.last_hidden_state)


TripsForPreTraining.register_for_auto_class("AutoModelForPreTraining")

__all__ = ["TripsForPreTraining", "TripsForPreTrainingOutput"]
