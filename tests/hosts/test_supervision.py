"""Supervision of a text guide for each family: attention of its layer, and targets."""

import itertools
from dataclasses import replace

import PIL.Image
import pytest
import torch
from tiny_vlms import BY_NAME, IMAGE, OTHERS, SIZES, VLMS, Vlm, families, make_images, make_inputs, rows_alone
from torch import nn

from modeling_trips.hosts import TextGuide, apply_patch_selection, prune_inputs
from modeling_trips.hosts.layers import SelectionPass
from modeling_trips.hosts.vlm.families import find_family
from modeling_trips.hosts.vlm.supervision import (
    _attend_gated,
    answer_losses,
    guided_selection,
    region_masks,
    rows_of_images,
    targets_of_attention,
    targets_of_masks,
    targets_of_relevance,
)
from modeling_trips.hosts.vlm.tower import CURRENT_PASS
from modeling_trips.patch_selection import KeyInfo, selection_loss


PACKED_ANEW = ("llava_next", "llava_onevision")
GATED = ("llava", "paligemma", "smolvlm", "idefics3", "internvl")


def guided(vlm: Vlm):
    model = vlm.make().requires_grad_(False)
    guide = TextGuide.for_model(model)
    apply_patch_selection(model, "1:text:0.5", guide=guide)
    return model, guide


def inputs_of_masks(vlm: Vlm) -> tuple[dict, dict]:
    """
    Return inputs with values from -1 (black) to 1 (white), and black inputs. In each image or tile the first unit is
    white, and a half of the second is gray, as where resizing has mixed the edge of a region.
    """
    blanks = make_inputs(vlm)
    blanks["pixel_values"].fill_(-1)
    pixels = blanks["pixel_values"].clone()
    unit = find_family(vlm.make()).unit
    if vlm.kind == "packed":
        number = unit**2
        for first in (0, blanks["image_grid_thw"][0].prod()):
            pixels[first : first + number] = 1
            pixels[first + number : first + 2 * number, ::2] = 0
    else:
        side = 4 * unit
        pixels[..., :side, :side] = 1
        pixels[..., :side:2, side : 2 * side] = 0
    return {**blanks, "pixel_values": pixels}, blanks


@families
def test_scores_have_gradients_and_the_shape_of_targets(vlm):
    model, guide = guided(vlm)
    inputs = make_inputs(vlm)
    selection = guided_selection(model, inputs)
    targets = targets_of_masks(model, *inputs_of_masks(vlm))
    rows = rows_of_images(model, inputs)
    assert len(rows) == len(targets)
    assert set(rows) == {0, 1}
    assert rows == sorted(rows)
    assert targets.shape == selection.scores.shape
    torch.testing.assert_close(targets[:, :2], torch.tensor([[0.8, 0.2]]).expand(len(targets), -1))
    assert not targets[:, 2:].any()
    selection_loss(selection.scores, selection.candidate_indices, targets).mean().backward()
    assert guide.query.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in model.parameters())


@families
def test_attention_is_that_of_the_eager_map(vlm):
    """The rows that predict the answer equal those of the eager attention map."""
    model = vlm.make()
    inputs = make_inputs(vlm)
    if vlm.name in PACKED_ANEW:
        with pytest.raises(ValueError):
            targets_of_attention(model, inputs, [2, 3])
        return
    implementation = model.get_decoder().config._attn_implementation
    targets = targets_of_attention(model, inputs, [2, 3])
    assert model.get_decoder().config._attn_implementation == implementation
    assert targets.shape == guided_selection(guided(vlm)[0], inputs).scores.shape

    model.set_attn_implementation("eager")
    maps = model(**inputs, output_attentions=True).attentions
    attention = torch.stack(maps).mean(dim=(0, 2))  # (num_prompts, num_queries, num_keys)
    num_images = len(targets) // 2  # images or tiles per prompt
    expected = []
    for row, answer_length in enumerate([2, 3]):
        shares = attention[row, -answer_length - 1 : -1].mean(dim=0)
        expected += shares[inputs["input_ids"][row] == IMAGE].chunk(num_images)
    for image, target in zip(expected, targets):
        torch.testing.assert_close(target[: len(image)], image / image.sum(), atol=1e-5, rtol=1e-3)
        assert not target[len(image) :].any()


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
def test_relevance_is_gradient_times_embedding(vlm):
    """Gradients of what enters the language model, from the loss of each row's answer; a selection has no part."""
    counts = [2, 1]
    model = vlm.make()
    inputs = make_inputs(vlm, counts, seed=1)
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
    relevance = -(entered[0].grad * entered[0]).sum(dim=-1)
    relevance = relevance.clamp(min=0)[inputs["input_ids"] == IMAGE]
    expected = nn.utils.rnn.pad_sequence(units_of_images(vlm, relevance, counts), batch_first=True)
    total = expected.sum(dim=-1, keepdim=True)
    assert total.any()
    expected = torch.where(total > 0, expected / total, 0.0)

    if vlm in VLMS:
        apply_patch_selection(model, "1:image:0.5")
    with torch.no_grad():
        targets = targets_of_relevance(model, inputs, [2, 3])
    torch.testing.assert_close(targets, expected, rtol=1e-3, atol=1e-4)
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if "vision" in name)


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


def test_supervision_needs_the_unpruned_model_or_the_guide_alone():
    vlm = BY_NAME["llava"]
    model, guide = guided(vlm)
    inputs = make_inputs(vlm)
    with pytest.raises(ValueError):
        targets_of_attention(model, inputs, [1, 1])
    apply_patch_selection(model, "1:text:0.5", visual_tokens=4, guide=guide)
    with pytest.raises(ValueError):
        answer_losses(model, inputs, [1, 1], probe_share=0.2)
    for schedule in ("1:text:0.5,2:image:0.5", "1:text:0.999"):  # the second one drops nothing
        apply_patch_selection(model, schedule, guide=guide)
        with pytest.raises(ValueError):
            answer_losses(model, inputs, [1, 1], probe_share=0.2)
    apply_patch_selection(model, "1:image:0.5")
    with pytest.raises(ValueError):
        answer_losses(model, inputs, [1, 1], probe_share=0.2)
    with pytest.raises(ValueError):
        guided_selection(model, inputs)


def test_region_masks():
    images = [PIL.Image.new("RGB", (10, 6), "red")] * 3
    masks = region_masks(images, [(2, 1, 5, 3), None, (4, 4, 4, 4)])
    assert [mask.getbbox() for mask in masks] == [(2, 1, 5, 3), None, (4, 4, 5, 5)]
    assert all(mask.size == (10, 6) for mask in masks)


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


@pytest.mark.parametrize("counts", [[1, 1], [2, 1]], ids=str)
@families
def test_the_loss_of_answers_is_that_of_the_pruned_model(vlm, counts):
    """Dropped tokens run only for the gradient of the guide. Families without the gate are refused by name."""
    model, guide = guided(vlm)
    inputs = make_inputs(vlm, counts)
    if vlm.name not in GATED:
        with pytest.raises(TypeError, match=type(model).__name__):
            answer_losses(model, inputs, [2, 3], probe_share=0.5)
        return
    labels = inputs["input_ids"].clone()
    labels[0, :-2] = -100
    labels[1, :-3] = -100
    logits = model(**inputs, labels=labels).logits
    expected = []
    for row, length in enumerate([2, 3]):
        answer = labels[row, -length:]
        expected.append(nn.functional.cross_entropy(logits[row, -length - 1 : -1], answer))
    pruned, selection = answer_losses(model, inputs, [2, 3])
    torch.testing.assert_close(pruned, torch.stack(expected), rtol=1e-5, atol=1e-5)

    lengths = []

    def note_length(module, args, output):
        lengths.append(output[0].shape[1])

    parts = (find_family(model).tower, model.get_decoder())
    implementations = [part.config._attn_implementation for part in parts]
    with model.get_decoder().register_forward_hook(note_length):
        losses, same = answer_losses(model, inputs, [2, 3], probe_share=0.5)
        answer_losses(model, inputs, [2, 3])
    assert lengths[0] > lengths[1]
    assert implementations == [part.config._attn_implementation for part in parts]
    torch.testing.assert_close(losses, pruned, rtol=1e-5, atol=1e-5)
    assert torch.equal(same.kept_indices, selection.kept_indices)
    losses.sum().backward()
    assert guide.query.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_language_model_alone_teaches_the_last_layer():
    vlm = BY_NAME["llava"]
    model, guide = guided(vlm)
    apply_patch_selection(model, "2:text:0.5", guide=guide)  # no layer of the tower follows
    losses, _ = answer_losses(model, make_inputs(vlm), [2, 3], probe_share=0.5)
    losses.sum().backward()
    assert guide.query.weight.grad.abs().sum() > 0


def test_a_class_token_in_the_prompt_is_always_kept():
    vlm = BY_NAME["llava"]
    vlm = replace(vlm, config={**vlm.config, "vision_feature_select_strategy": "full"}, tokens=65)
    model, _ = guided(vlm)
    inputs = make_inputs(vlm, [2, 1])
    losses, _ = answer_losses(model, inputs, [2, 3], probe_share=0.5)
    expected, _ = answer_losses(model, inputs, [2, 3])
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)


def test_the_gate_in_a_causal_attention_is_that_of_a_loop():
    """Sampled keys between the others, padding, and query heads that share a head of keys and values."""
    torch.manual_seed(0)
    query = torch.randn(2, 4, 5, 3, dtype=torch.float64)
    key = torch.randn(2, 2, 5, 3, dtype=torch.float64)
    value = torch.randn(2, 2, 5, 3, dtype=torch.float64)
    gate = torch.rand(2, 5, dtype=torch.float64).requires_grad_()
    is_probed = torch.tensor([[False, True, False, True, False], [False, False, True, False, True]])
    current = SelectionPass()
    current.key_info = KeyInfo(gate=gate, is_probed=is_probed)
    mask = torch.ones(5, 5, dtype=torch.bool).tril().repeat(2, 1, 1, 1)
    mask[1, ..., 0] = False  # the first token of the second row is padding
    module = nn.Module()
    module.num_key_value_groups = 2
    token = CURRENT_PASS.set(current)
    output, _ = _attend_gated(module, query, key, value, mask, scaling=0.7)
    CURRENT_PASS.reset(token)
    weights = torch.randn_like(output)
    weights[1, 0] = 0.0  # no loss comes from padding
    (output * weights).sum().backward()

    expected = torch.zeros(2, 5, dtype=torch.float64)
    for row, head, i in itertools.product(range(2), range(4), range(5)):
        seen = [j for j in range(i + 1) if mask[row, 0, i, j]]
        if not seen:
            continue
        values = value[row, head // 2]
        powers = (0.7 * key[row, head // 2] @ query[row, head, i]).exp()
        kept = [j for j in seen if not is_probed[row, j]]
        attended = powers[kept] @ values[kept] / powers[kept].sum()
        torch.testing.assert_close(output[row, i, head], attended)
        for j in seen:
            share = powers[j] / powers[seen].sum()
            expected[row, j] += share * (weights[row, i, head] @ (values[j] - attended))
    torch.testing.assert_close(gate.grad, expected)


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
def test_a_guide_learns_from_answers_alone():
    generator = torch.Generator().manual_seed(0)
    model = BY_NAME["llava"].make()
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
        losses, selection = answer_losses(model, inputs, [1] * 128)
        recall = is_inside.gather(1, selection.kept_indices).float().mean()
        return losses.mean().item(), recall.item()

    train(model, 100, 3e-3, lambda inputs: model(**inputs).loss)
    model.requires_grad_(False)
    torch.manual_seed(1)  # a guide that starts by looking elsewhere
    guide = TextGuide.for_model(model)
    apply_patch_selection(model, "1:text:0.0625", guide=guide)  # as many patches as the square has
    loss, recall = evaluate()
    train(guide, 50, 1e-2, lambda inputs: answer_losses(model, inputs, [1] * 16, 0.2)[0].mean())
    learned_loss, learned_recall = evaluate()
    assert learned_loss < 0.1 < 1 < loss
    assert recall < 0.2 < 0.4 < learned_recall  # one patch of the four is enough for the answer
