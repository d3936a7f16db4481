"""Supervision of a text guide for each family: attention of its layer, and targets."""

from dataclasses import replace

import pytest
import torch
from tiny_vlms import BY_NAME, IMAGE, OTHERS, SIZES, VLMS, Vlm, families, make_images, make_inputs, rows_alone
from torch import nn

from modeling_trips.hosts import TextGuide, apply_patch_selection, prune_inputs
from modeling_trips.hosts.vlm.supervision import guided_selection, targets_of_relevance
from modeling_trips.patch_selection import log_scores


def guided(vlm: Vlm):
    model = vlm.make().requires_grad_(False)
    guide = TextGuide.for_model(model)
    apply_patch_selection(model, "1:text:0.5", guide=guide)
    return model, guide


@families
def test_scores_have_gradients_and_the_shape_of_targets(vlm):
    model, guide = guided(vlm)
    inputs = make_inputs(vlm)
    selection = guided_selection(model, inputs)
    targets = targets_of_relevance(model, inputs, [2, 3])
    assert targets.shape == selection.scores.shape
    torch.testing.assert_close(targets.sum(dim=-1), torch.ones(len(targets)))
    (targets * selection.scores).sum().backward()
    assert guide.query.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in model.parameters())


def units_of_images(vlm: Vlm, values: torch.Tensor, counts: list[int]) -> list[torch.Tensor]:
    """Split one value per visual token of the batch into those of each image (or tile), without newlines."""
    units = []
    _, sizes = make_images(vlm, counts)
    for number, group in enumerate(values.split(sizes)):
        if vlm.kind == "tiles":
            units += group.split(vlm.tokens)
        elif vlm.kind == "anyres":
            height, width = SIZES[number % len(SIZES)]
            rows = group[64:].view(height // 4, width // 4 + 1)[:, :-1]
            tiles = rows.unflatten(0, (-1, 8)).unflatten(2, (-1, 8)).transpose(1, 2)
            units += [group[:64], *tiles.reshape(-1, 64)]
        else:
            units.append(group)
    return units


@pytest.mark.parametrize("vlm", [*VLMS, *OTHERS], ids=lambda vlm: vlm.name)
def test_relevance_comes_from_gradients_and_embeddings(vlm):
    """Gradients of what enters the language model, from the loss of each row's answer; a selection has no part."""
    counts = [2, 1]
    model = vlm.make()
    inputs = make_inputs(vlm, counts)
    entered = []

    def enter(module, args, kwargs):
        entered.append(kwargs["inputs_embeds"].detach().requires_grad_())
        return args, {**kwargs, "inputs_embeds": entered[0]}

    with model.get_decoder().register_forward_pre_hook(enter, with_kwargs=True):
        logits = model(**inputs).logits
    losses = []
    for row, length in enumerate([2, 3]):
        losses.append(nn.functional.cross_entropy(logits[row, -length - 1 : -1], inputs["input_ids"][row, -length:]))
    sum(losses).backward()
    is_visual = inputs["input_ids"] == IMAGE
    _, sizes = make_images(vlm, counts)
    if vlm.kind == "tiles":
        sizes = [vlm.tokens] * (sum(sizes) // vlm.tokens)
    relevance = []
    for h, g in zip(entered[0][is_visual].split(sizes), entered[0].grad[is_visual].split(sizes)):
        relevance.append((h - h.mean(dim=0)).square().sum(dim=-1) * g.square().sum(dim=-1))
    expected = nn.utils.rnn.pad_sequence(units_of_images(vlm, torch.cat(relevance), counts), batch_first=True)
    expected = expected / expected.sum(dim=-1, keepdim=True)

    if vlm in VLMS:
        apply_patch_selection(model, "1:image:0.5")
    with torch.no_grad():
        targets = targets_of_relevance(model, inputs, [2, 3])
    torch.testing.assert_close(targets, expected, rtol=1e-3, atol=1e-4)


@families
def test_padding_has_no_relevance(vlm):
    counts = [1, 2]
    model = vlm.make()
    targets = targets_of_relevance(model, make_inputs(vlm, counts), [2, 3])
    alone = []
    for inputs, length in zip(rows_alone(vlm, counts), [2, 3]):
        alone += targets_of_relevance(model, inputs, [length])
    expected = nn.utils.rnn.pad_sequence(alone, batch_first=True)
    torch.testing.assert_close(targets, expected, rtol=1e-2, atol=1e-3)


def test_a_class_token_in_the_prompt_is_no_patch():
    vlm = BY_NAME["llava"]
    vlm = replace(vlm, config={**vlm.config, "vision_feature_select_strategy": "full"}, tokens=65)
    assert targets_of_relevance(vlm.make(), make_inputs(vlm), [2, 3]).shape == (2, 64)


def test_a_layer_must_be_scored_by_the_text():
    vlm = BY_NAME["llava"]
    model = vlm.make()
    apply_patch_selection(model, "1:image:0.5")
    with pytest.raises(ValueError):
        guided_selection(model, make_inputs(vlm))


@torch.no_grad()
def test_the_answer_does_not_choose():
    """`guided_selection` and `prune_inputs` read the prompt without the answer."""
    vlm = BY_NAME["llava"]
    model, _ = guided(vlm)
    unpruned = vlm.make()
    inputs = make_inputs(vlm, [1])
    inputs["labels"] = inputs["input_ids"].clone()
    inputs["labels"][:, :-2] = -100
    scores = []
    features = []
    for answer in (7, 77):
        inputs["input_ids"][:, -2:] = answer
        scores.append(guided_selection(model, inputs).scores)
        pruned = prune_inputs(unpruned, inputs, 5)
        features.append(pruned["mm_encoder_outputs"]["image"].pooler_output[0])
    torch.testing.assert_close(*scores)
    assert torch.equal(*features)


def scenes_of_one_square(number: int, generator: torch.Generator) -> tuple[dict, torch.Tensor]:
    """Return noise with a square of 2 x 2 patches, whose color is the answer, and which patches lie in the square."""
    colors = torch.tensor([[2.0, -2, -2], [-2, 2, -2], [-2, -2, 2], [2, 2, -2]])
    answers = torch.randint(4, (number,), generator=generator)
    cells = torch.randint(16, (number,), generator=generator)
    squares = torch.arange(16).view(4, 4).repeat_interleave(2, 0).repeat_interleave(2, 1)  # one number per patch
    is_inside = squares.flatten() == cells[:, None]  # (number, num_patches)
    is_square = is_inside.view(number, 1, 8, 8).repeat_interleave(4, 2).repeat_interleave(4, 3)
    noise = 0.1 * torch.randn(number, 3, 32, 32, generator=generator)
    images = torch.where(is_square, colors[answers][..., None, None], noise)
    prompt = torch.tensor([2, *[IMAGE] * 64, 7, 8]).expand(number, -1)
    ids = torch.cat([prompt, 10 + answers[:, None]], dim=1)
    labels = torch.cat([torch.full_like(prompt, -100), ids[:, -1:]], dim=1)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": images,
        "labels": labels,
    }
    return inputs, is_inside


@pytest.mark.slow
def test_a_guide_learns_from_relevance():
    generator = torch.Generator().manual_seed(0)
    model = BY_NAME["llava"].make({"intermediate_size": 37, "vocab_size": 99})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(0.5)

    def train(module: nn.Module, num_steps: int, rate: float, loss_of):
        optimizer = torch.optim.AdamW(module.parameters(), rate)
        for _ in range(num_steps):
            inputs, _ = scenes_of_one_square(16, generator)
            loss_of(inputs).backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    @torch.no_grad()
    def evaluate() -> tuple[float, float]:
        inputs, is_inside = scenes_of_one_square(128, torch.Generator().manual_seed(1))
        selection = guided_selection(model, inputs)
        recall = is_inside.gather(1, selection.kept_indices).float().mean()
        return model(**inputs).loss.item(), recall.item()

    def loss_of_guide(inputs: dict) -> torch.Tensor:
        targets = targets_of_relevance(model, inputs, [1] * len(inputs["input_ids"]))
        scores = guided_selection(model, inputs).scores
        return -(targets * log_scores(scores)).sum(dim=-1).mean()

    train(model, 100, 3e-3, lambda inputs: model(**inputs).loss)
    model.requires_grad_(False)
    torch.manual_seed(1)  # a guide that starts by looking elsewhere
    guide = TextGuide.for_model(model)
    apply_patch_selection(model, "1:text:0.0625", guide=guide)  # as many patches as the square has
    loss, recall = evaluate()
    train(guide, 50, 1e-2, loss_of_guide)
    learned_loss, learned_recall = evaluate()
    assert learned_loss < 0.1 < 1 < loss
    assert recall < 0.2 < 0.4 < learned_recall  # one patch of the four is enough for the answer
