"""Supervision of a text guide for each family: attention of its layer, and targets."""

import itertools
from dataclasses import replace

import PIL.Image
import pytest
import torch
from tiny_vlms import BY_NAME, IMAGE, Vlm, families, make_inputs

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
    blanks["pixel_values"] = torch.full_like(blanks["pixel_values"], -1)
    pixels, unit = blanks["pixel_values"].clone(), find_family(vlm.make()).unit
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
    assert len(rows) == len(targets) and {*rows} == {0, 1} and rows == sorted(rows)
    assert targets.shape == selection.scores.shape
    torch.testing.assert_close(targets[:, :2], torch.tensor([[0.8, 0.2]]).expand(len(targets), -1))
    assert not targets[:, 2:].any()
    selection_loss(selection.scores, selection.candidate_indices, targets).mean().backward()
    assert guide.query.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in model.parameters())


@families
def test_attention_is_that_of_the_eager_map(vlm):
    """The rows that predict the answer equal those of the eager attention map."""
    model, inputs = vlm.make(), make_inputs(vlm)
    if vlm.name in PACKED_ANEW:
        with pytest.raises(ValueError):
            targets_of_attention(model, inputs, [2, 3])
        return
    family = find_family(model)
    own = model.get_decoder().config._attn_implementation
    targets = targets_of_attention(model, inputs, [2, 3])
    assert model.get_decoder().config._attn_implementation == own
    assert targets.shape == guided_selection(guided(vlm)[0], inputs).scores.shape

    model.set_attn_implementation("eager")
    maps = torch.stack(model(**inputs, output_attentions=True).attentions).mean(dim=(0, 2))
    rows = torch.stack([maps[0, -3:-1].mean(dim=0), maps[1, -4:-1].mean(dim=0)])
    visual = [row[ids == family.image_token_id] for row, ids in zip(rows, inputs["input_ids"])]
    numbers = [len(targets) // 2] * 2  # images or tiles per prompt
    expected = [image / image.sum() for own, number in zip(visual, numbers) for image in own.chunk(number)]
    for image, target in zip(expected, targets):
        torch.testing.assert_close(target[: len(image)], image, atol=1e-5, rtol=1e-3)
        assert not target[len(image) :].any()


def test_supervision_needs_the_unpruned_model_or_the_guide_alone():
    vlm = BY_NAME["llava"]
    (model, guide), inputs = guided(vlm), make_inputs(vlm)
    with pytest.raises(ValueError):
        targets_of_attention(model, inputs, [1, 1])
    alone = ("unpruned", "1:image:0.5", "1:text:0.5,2:image:0.5", "1:text:0.999")  # the last one drops nothing
    for schedule in alone:
        tokens, own = (4, None) if "text" not in schedule else (None, guide)
        apply_patch_selection(model, schedule, tokens, guide=own)
        with pytest.raises(ValueError):
            answer_losses(model, inputs, [1, 1], probe_share=0.2)
    apply_patch_selection(model, "1:image:0.5")
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
    (model, _), unpruned = guided(vlm), vlm.make()
    inputs = make_inputs(vlm, [1])
    labels = inputs["input_ids"].clone()
    labels[:, :-2] = -100
    scores, features = [], []
    for answer in (7, 77):
        own = {**inputs, "input_ids": inputs["input_ids"].clone(), "labels": labels}
        own["input_ids"][:, -2:] = answer
        scores.append(guided_selection(model, own).scores)
        features.append(prune_inputs(unpruned, own, 5)["mm_encoder_outputs"]["image"].pooler_output[0])
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
    expected = []
    labels = inputs["input_ids"].clone()
    labels[0, :-2] = labels[1, :-3] = -100
    logits = model(**inputs, labels=labels).logits
    for row, count in enumerate([2, 3]):
        expected.append(torch.nn.functional.cross_entropy(logits[row, -count - 1 : -1], labels[row, -count:]))
    pruned, selection = answer_losses(model, inputs, [2, 3])
    torch.testing.assert_close(pruned, torch.stack(expected), rtol=1e-5, atol=1e-5)

    lengths = []
    handle = model.get_decoder().register_forward_hook(lambda *args: lengths.append(args[-1][0].shape[1]))
    own = [part.config._attn_implementation for part in (find_family(model).tower, model.get_decoder())]
    losses, same = answer_losses(model, inputs, [2, 3], probe_share=0.5)
    answer_losses(model, inputs, [2, 3])
    handle.remove()
    assert lengths[0] > lengths[1]
    assert own == [part.config._attn_implementation for part in (find_family(model).tower, model.get_decoder())]
    torch.testing.assert_close(losses, pruned, rtol=1e-5, atol=1e-5)
    assert torch.equal(same.kept_indices, selection.kept_indices)
    losses.sum().backward()
    assert guide.query.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_language_model_alone_teaches_the_last_layer():
    model, inputs = BY_NAME["llava"].make().requires_grad_(False), make_inputs(BY_NAME["llava"])
    guide = TextGuide.for_model(model)
    apply_patch_selection(model, "2:text:0.5", guide=guide)  # no layer of the tower follows
    answer_losses(model, inputs, [2, 3], probe_share=0.5)[0].sum().backward()
    assert guide.query.weight.grad.abs().sum() > 0


def test_a_class_token_in_the_prompt_is_always_kept():
    vlm = BY_NAME["llava"]
    vlm = replace(vlm, config={**vlm.config, "vision_feature_select_strategy": "full"}, tokens=65)
    model, guide = guided(vlm)
    inputs = make_inputs(vlm, [2, 1])
    losses, _ = answer_losses(model, inputs, [2, 3], probe_share=0.5)
    torch.testing.assert_close(losses, answer_losses(model, inputs, [2, 3])[0], rtol=1e-5, atol=1e-5)


def test_the_gate_in_a_causal_attention_is_that_of_a_loop():
    """Sampled keys between the others, padding, and query heads that share a head of keys and values."""
    torch.manual_seed(0)
    query = torch.randn(2, 4, 5, 3, dtype=torch.float64)
    key, value = torch.randn(2, 2, 2, 5, 3, dtype=torch.float64).unbind()
    current = SelectionPass()
    gate = torch.rand(2, 5, dtype=torch.float64).requires_grad_()
    is_probed = torch.tensor([[False, True, False, True, False], [False, False, True, False, True]])
    current.key_info = KeyInfo(gate=gate, is_probed=is_probed)
    mask = torch.ones(5, 5, dtype=torch.bool).tril().repeat(2, 1, 1, 1)
    mask[1, ..., 0] = False  # the first token of the second row is padding
    module = torch.nn.Module()
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
        keys, values = key[row, head // 2], value[row, head // 2]
        powers = {j: (0.7 * query[row, head, i] @ keys[j]).exp() for j in seen}
        kept = [j for j in seen if not is_probed[row, j]]
        out = sum(powers[j] * values[j] for j in kept) / max(1e-9, sum(powers[j] for j in kept))
        for j in seen:
            torch.testing.assert_close(output[row, i, head], out)
            expected[row, j] += powers[j] / sum(powers.values()) * (weights[row, i, head] @ (values[j] - out))
    torch.testing.assert_close(gate.grad, expected)


def scenes_of_one_square(number: int, generator: torch.Generator) -> tuple[dict, torch.Tensor]:
    """Return noise with a square of 2 x 2 patches, whose color is the answer, and which patches lie in the square."""
    colors = torch.tensor([[2.0, -2, -2], [-2, 2, -2], [-2, -2, 2], [2, 2, -2]])
    answers, cells = (torch.randint(high, (number,), generator=generator) for high in (4, 16))
    patches = torch.arange(64)
    is_inside = patches // 8 // 2 * 4 + patches % 8 // 2 == cells[:, None]
    is_square = is_inside.view(number, 1, 8, 8).repeat_interleave(4, 2).repeat_interleave(4, 3)
    noise = 0.1 * torch.randn(number, 3, 32, 32, generator=generator)
    images = torch.where(is_square, colors[answers][..., None, None], noise)
    prompt = torch.tensor([2, *[IMAGE] * 64, 7, 8]).expand(number, -1)
    ids = torch.cat([prompt, 10 + answers[:, None]], dim=1)
    labels = torch.cat([torch.full_like(prompt, -100), ids[:, -1:]], dim=1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": images}
    return {**inputs, "labels": labels}, is_inside


@pytest.mark.slow
def test_a_guide_learns_from_answers_alone():
    generator, model = torch.Generator().manual_seed(0), BY_NAME["llava"].make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5 if parameter.dim() > 1 else 1.0)

    def train(module: torch.nn.Module, num_steps: int, rate: float, loss_of):
        optimizer = torch.optim.AdamW(module.parameters(), rate)
        for _ in range(num_steps):
            loss_of(scenes_of_one_square(16, generator)[0]).backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    @torch.no_grad()
    def evaluate() -> tuple[float, float]:
        inputs, is_inside = scenes_of_one_square(128, torch.Generator().manual_seed(1))
        losses, selection = answer_losses(model, inputs, [1] * 128)
        return losses.mean().item(), is_inside.gather(1, selection.kept_indices).float().mean().item()

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
