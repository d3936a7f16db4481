"""
What teaches a text guide on a frozen model: the scores of `guided_selection` learn the relevance of the visual tokens
to the unpruned model's answer.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from ...modeling_trips_vision import TripsSelection
from ..apply import record_patch_selection
from ..layers import selecting_layers
from .families import find_family
from .pruning import select_visual_tokens
from .visual_tokens import ExitSelection
from .wrapper import selection_of


def guided_selection(model: PreTrainedModel, inputs: Mapping) -> TripsSelection:
    """
    Return the selection of the guide's layer for prompts with images, without answers. The language model does not
    run. `scores` and `candidate_indices` have shape `(num_images, num_units)`, and scores carry gradients to the
    guide. Tiles count as images. Raise a ValueError if no layer of the model is scored by the text.
    """
    guidances = [layer.selection.guidance for layer in selecting_layers(model)]
    if "text" not in guidances:
        raise ValueError(f"No layer of this {type(model).__name__} is scored by the text. Pass a `guide`.")
    with record_patch_selection(model) as selections:
        selection_of(model).prune_call(dict(inputs))
    return selections[guidances.index("text")]


@torch.enable_grad()
def targets_of_relevance(model: PreTrainedModel, inputs: Mapping, num_answer_tokens: Sequence[int]) -> torch.Tensor:
    """
    Return the share of each unit of patches in what the unpruned model's answer depends on, `(num_images, num_units)`:
    (|g| |h - m|)^2 for the embedding h of a visual token as it enters the language model, the mean m of those of its
    image, and the gradient g of the answer's cross-entropy with respect to h. Each row sums to 1, or to 0 without a
    gradient. Tiles count as images; units of packed images are padded with zeros.

    |g| |h - m| is the most that the loss could change, to first order, by a step as long as that to the mean. A
    language model normalizes its tokens, so -g . h, the change by scaling a token, says little about it.

    Prompts end with their answers, of `num_answer_tokens` by row, and are padded on the left.
    """
    family = find_family(model)
    with torch.no_grad():
        whole, _, _ = select_visual_tokens(family, dict(inputs), ExitSelection())  # encoded, and all tokens kept
    whole.pop("labels", None)  # longer than the logits
    encoded = whole["mm_encoder_outputs"]["image"]
    groups = [group.detach().requires_grad_() for group in encoded.pooler_output]
    is_batch = isinstance(encoded.pooler_output, torch.Tensor)
    encoded.pooler_output = torch.stack(groups) if is_batch else groups

    longest = max(num_answer_tokens)
    answers = inputs["input_ids"][:, -longest:]
    counts = torch.tensor(num_answer_tokens, device=answers.device)
    places_from_end = torch.arange(longest, 0, -1, device=answers.device)
    is_answer = places_from_end <= counts[:, None]  # (batch_size, longest)
    logits = model(**whole, use_cache=False, logits_to_keep=longest + 1).logits
    logits = logits[:, :-1].float().transpose(1, 2)  # (batch_size, vocab_size, longest)
    losses = nn.functional.cross_entropy(logits, answers, reduction="none")
    losses = (losses * is_answer).sum(dim=1) / counts  # (batch_size,)
    gradients = torch.autograd.grad(losses.sum(), groups)
    relevance = []
    for group, gradient in zip(groups, gradients):
        offsets = (group - group.mean(dim=0)).detach().float()
        largest = gradient.float().norm(dim=-1) * offsets.norm(dim=-1)  # (num_tokens,)
        relevance.append(largest.square())
    relevance = family.to_units(relevance, inputs)
    targets = nn.utils.rnn.pad_sequence(relevance, batch_first=True)
    total = targets.sum(dim=-1, keepdim=True)
    return targets / total.clamp(min=torch.finfo(total.dtype).tiny)
