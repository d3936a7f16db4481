"""Parts that both kinds of models share: the question in the hash of the image, and the selection itself."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial

import torch
from torch import nn
from vllm.distributed import get_tensor_model_parallel_rank, tensor_model_parallel_all_reduce
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.processing import BaseMultiModalProcessor, ProcessorInputs

from ..hosts.vlm.families import Family
from ..hosts.vlm.pruning import select_at_exit
from ..hosts.vlm.tower import TowerLayer
from .settings import ServingSettings


QUESTION = "question_ids"


class QuestionProcessor(BaseMultiModalProcessor):
    """
    Processor that passes the question to the model where it decides. The question becomes an option of the image's
    processor. vLLM hashes these options with the image, so its caches never mix questions.

    The question is the text after the last image, or all text if none follows.
    """

    @cached_property
    def settings(self) -> ServingSettings:
        return ServingSettings.of(self.info.get_hf_config())

    @property
    def image_token_id(self) -> int:
        return self.info.get_hf_config().image_token_id

    def apply(self, inputs: ProcessorInputs, *args, **kwargs):
        if self.settings.reads_prompt:
            ids = list(inputs.prompt)
            is_image = [token == self.image_token_id for token in ids]
            after = ids[len(ids) - is_image[::-1].index(True) :] if any(is_image) else []
            question = after or [token for token, image in zip(ids, is_image) if not image]
            options = {**inputs.hf_processor_mm_kwargs, QUESTION: question}
            inputs = replace(inputs, hf_processor_mm_kwargs=options)
        return super().apply(inputs, *args, **kwargs)

    def _apply_hf_processor_main(self, mm_items, hf_kwargs: Mapping[str, object]):
        outputs = super()._apply_hf_processor_main(mm_items, without_question(hf_kwargs))
        if "pixel_values" in outputs and self.settings.reads_prompt:
            outputs[QUESTION] = [torch.tensor(hf_kwargs[QUESTION], dtype=torch.long)] * mm_items.get_count("image")
        return outputs

    def _get_mm_fields_config(self, hf_inputs, hf_processor_mm_kwargs) -> Mapping[str, MultiModalFieldConfig]:
        fields = dict(super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs))
        if QUESTION in hf_inputs:
            fields[QUESTION] = MultiModalFieldConfig.batched("image")
        return fields

    def _get_prompt_updates(self, mm_items, hf_processor_mm_kwargs, out_mm_kwargs):
        return super()._get_prompt_updates(mm_items, without_question(hf_processor_mm_kwargs), out_mm_kwargs)


def without_question(options: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in options.items() if name != QUESTION}


class ServedLayer(TowerLayer):
    """Selection layer under tensor parallelism: each process scores by its own heads."""

    def score(self, query: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        num_heads = self.project_query(states[:, 0]).shape[1]
        if num_heads < query.shape[1]:  # a guide makes the query of all heads
            query = query.split(num_heads, dim=1)[get_tensor_model_parallel_rank()]
        return tensor_model_parallel_all_reduce(super().score(query, states))


class SelectingModel(nn.Module):
    """Model of vLLM that selects patches."""

    settings: ServingSettings
    family: Family

    def select_patches(self, family: Family, device: torch.device):
        """Replace layers of the tower by selection layers, where the settings fit the model."""
        self.settings, self.family = ServingSettings.of(family.config), family
        guide = self.settings.check_fits(family)
        # A list hides the guide from vLLM, which expects its weights in the model's checkpoint.
        self.guides = [] if guide is None else [guide.to(device)]
        family.wrap_layers(self.settings.schedule)

    def query(self, questions: Sequence[torch.Tensor] | None) -> torch.Tensor | None:
        """Return the queries of the guide, `(num_images, num_heads, head_dim)`, or `None` without one."""
        return self.guides[0](*self.embed_questions(questions)) if self.guides else None

    def embed_questions(self, questions: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the input embeddings `(num_images, length, width)` of the questions, and their mask."""
        # The padding also gives an empty question a position, which the mask leaves out.
        ids = nn.utils.rnn.pad_sequence([nn.functional.pad(own, (0, 1)) for own in questions], batch_first=True)
        mask = torch.arange(ids.shape[1]) < torch.tensor([[len(question)] for question in questions])
        return self.embed_input_ids(ids.flatten()).unflatten(0, ids.shape), mask.to(ids.device)

    def select_tokens(
        self, groups: Sequence[torch.Tensor], questions: Sequence[torch.Tensor] | None
    ) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
        """
        Select after the tower, in batches of images (or tiles) of equal size: `groups` of shape `(num_tokens, width)`.
        Return the kept tokens of each, and their positions in the group; `None` stands for all.
        """
        text, sizes = partial(self.embed_questions, questions), [len(group) for group in groups]
        return select_at_exit(text, list(range(len(groups))), sizes, list(groups), self.settings.at_exit)
