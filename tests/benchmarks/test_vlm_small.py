"""The small LLaVA on busy scenes: stages, guides, compared methods and their costs."""

import json
import shutil

import compare
import guides
import pytest
import small_model
import torch
import train
import try_gate
from contestants import Contestant, costs, next_token, prefill, set_contestant
from safetensors.torch import load_file
from small_model import GRID, IMAGE_SIZE, NUM_PATCHES, features_of, llava_inputs
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlavaForConditionalGeneration

from modeling_trips.hosts import TextGuide, remove_patch_selection
from trips_examples.train_guide import GuideArguments, GuidedModel


NEW_STAGES = {
    "names": train.Stage(grid=2, steps=2, scenes=2, asks=False),
    "base": train.Stage(grid=4, steps=2, scenes=2),
}


@pytest.fixture(scope="module")
def model() -> LlavaForConditionalGeneration:
    return small_model.make_model(0).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def questions() -> tuple[torch.Tensor, list[list[int]]]:
    generator = torch.Generator().manual_seed(0)
    pixel_values = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    return pixel_values, torch.randint(4, len(small_model.WORDS), (2, 6), generator=generator).tolist()


def test_contestants_that_keep_all_tokens_match_the_model(model, questions):
    expected = model(**llava_inputs(*questions)).logits[:, -1]
    features = torch.stack([*model.model.get_image_features(questions[0]).pooler_output])
    torch.testing.assert_close(features_of(model, questions[0], GRID)[0], features)
    prompts = torch.tensor(questions[1])
    torch.testing.assert_close(prefill(model, features, prompts)[0], expected)
    torch.testing.assert_close(prefill(model, features, prompts, NUM_PATCHES)[0], expected)


def test_fastv_shortens_the_later_layers(model, questions):
    features, _ = features_of(model, questions[0])
    _, cache = prefill(model, features, torch.tensor(questions[1]), 16)
    whole, kept = 1 + NUM_PATCHES + 6, 1 + 16 + 6
    assert [layer.keys.shape[2] for layer in cache.layers] == [whole, whole, kept, kept]


@pytest.mark.parametrize(
    "contestant",
    [
        Contestant("unpruned"),
        Contestant("tower", 16, layer=2, guidance="image"),
        Contestant("guide", 9, layer=2, guidance="text"),
        Contestant("pixels", 36, side=6),
    ],
    ids=lambda contestant: contestant.variant,
)
def test_costs_of_the_tower_are_counted(model, questions, contestant):
    """PyTorch's count of matrix products agrees; selection itself is below one percent."""
    model.set_attn_implementation("eager")
    set_contestant(model, contestant, {"text": TextGuide.for_model(model)})
    with FlopCounterMode(display=False) as counter:
        next_token(model, contestant, *questions)
    set_contestant(model, Contestant("unpruned"), {})
    model.set_attn_implementation("sdpa")
    counted = counter.get_total_flops() / 2 / len(questions[0]) / 1e6
    expected = costs(model.config, contestant, 6)
    length = 7 + contestant.kept
    # Eager attention also computes the upper half of the map.
    upper_half = 4 * length * (length - 1) * 128 / 1e6
    assert counted == pytest.approx(expected["tower_mmacs"] + expected["prefill_mmacs"] + upper_half, rel=0.01)
    assert expected["kv_bytes"] == 2 * 4 * 4 * 128 * length


def test_a_pruned_tower_may_precede_fastv(model, questions):
    """With all tokens of the tower kept, FastV's rule alone is left; otherwise fewer tokens reach the decoder."""
    alone, both = (
        Contestant("", 4, fastv=True),
        Contestant("", 4, layer=2, guidance="image", tower_kept=NUM_PATCHES - 1, fastv=True),
    )
    logits = []
    for contestant in (alone, both):
        set_contestant(model, contestant, {})
        logits.append(next_token(model, contestant, *questions))
    set_contestant(model, Contestant("unpruned"), {})
    assert not torch.equal(*logits)
    fewer = Contestant("", 4, layer=2, guidance="image", tower_kept=20, fastv=True)
    prefills = [costs(model.config, contestant, 6)["prefill_mmacs"] for contestant in (alone, both, fewer)]
    assert prefills[0] > prefills[1] > prefills[2]


@pytest.mark.parametrize("kept", compare.KEPT)
def test_rivals_cost_at_most_what_a_guide_costs(model, kept):
    limit = compare.cost_of(model.config, Contestant("guide", kept, 3, "answers"))
    rivals = compare.rivals_at_equal_cost(model.config, 3, kept)
    assert all(rivals.values())
    for contestant in (one for group in rivals.values() for one in group):
        assert 0.8 * limit < compare.cost_of(model.config, contestant) <= limit
    side = compare.largest_side(model.config, 3, kept)
    sizes = [Contestant("", number**2, side=number) for number in (side, side + 1)]
    within, above = (compare.cost_of(model.config, contestant) for contestant in sizes)
    assert within <= limit < above


def test_training_resumes_and_leaves_finished_stages_out(tmp_path):
    stage, options = NEW_STAGES["base"], ["--warmup_steps=1", "--save_steps=1"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train.train_stage("base", stage, whole, None, options)
    shutil.copytree(whole / "base/checkpoint-1", parts / "base/checkpoint-1")
    train.train_stage("base", stage, parts, None, options)
    resumed, expected = (load_file(folder / "base/model.safetensors") for folder in (parts, whole))
    assert resumed.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(resumed[name], weight)
    train.train_stage("base", stage, whole, None, ["--seed=1", *options])
    again = load_file(whole / "base/model.safetensors")
    assert all(torch.equal(again[name], weight) for name, weight in expected.items())


@torch.no_grad()
def loss_of(model, guide: TextGuide) -> float:
    """Return the loss of the regions of new scenes by the model with the guide."""
    guided = GuidedModel(guide, model, GuideArguments("", layer=2))
    loss = guided(**guides.make_batch(1000, 0, "regions"))["loss"].item()
    remove_patch_selection(model)
    return loss


@pytest.mark.parametrize("teacher", ["regions", "attention", "answers"])
def test_guides_are_trained_on_the_frozen_model(model, teacher):
    before = [parameter.clone() for parameter in model.parameters()]
    guide = guides.train_guide(model, 2, teacher, seed=0, steps=60 if teacher == "regions" else 2)
    assert all(torch.equal(one, other) for one, other in zip(before, model.parameters()))
    torch.manual_seed(0)
    untrained = TextGuide.for_model(model)
    assert not torch.equal(guide.query.weight, untrained.query.weight)
    if teacher == "regions":
        assert loss_of(model, guide) < 0.995 * loss_of(model, untrained)


def test_a_constant_guide_reads_nothing(model):
    guide, reader = guides.ConstantGuide.for_model(model), TextGuide.for_model(model)
    prompts, mask = torch.randn(2, 5, 128), torch.ones(2, 5, dtype=torch.bool)
    assert torch.equal(*guide(prompts, mask)) and not torch.equal(*reader(prompts, mask))


def test_all_methods_and_settings_are_compared(monkeypatch, tmp_path):
    monkeypatch.setattr(train, "STAGES", NEW_STAGES)
    monkeypatch.setattr(compare, "FEWER_PIXELS", {"fewer pixels": NEW_STAGES["base"]})
    monkeypatch.setattr(compare, "train_guide", lambda *args: guides.train_guide(*args, steps=2))
    output = tmp_path / "rows.json"
    output.write_text(json.dumps([{"seed": seed, "variant": "unpruned"} for seed in (1, 0)]))
    train.main([f"--folder={tmp_path}", "--seed=0", "--save_strategy=no"])
    options = ["--test_scenes=4", "--validation_scenes=2"]
    compare.main([f"--folder={tmp_path}", f"--output_json={output}", "--seed=0", *options])
    other, *rows = json.loads(output.read_text())
    assert other["seed"] == 1 and all(row["seed"] == 0 for row in rows)
    variants = [row["variant"] for row in rows]
    assert len({*variants}) == len(variants)
    assert all(row["split"] == "test" and 0 <= row["mean"] <= 1 for row in rows)

    monkeypatch.setattr(try_gate, "train_guide", lambda *args, **own: guides.train_guide(*args, **own, steps=2))
    names = ("7, all dropped patches run", "1 patch kept in training")
    monkeypatch.setattr(try_gate, "TRIALS", {name: try_gate.TRIALS[name] for name in names})
    trials = tmp_path / "trials.json"
    try_gate.main([f"--folder={tmp_path}", f"--output_json={trials}", "--seed=0", *options])
    assert [row["variant"] for row in json.loads(trials.read_text())] == [
        f"{trial} {kept}" for trial in try_gate.TRIALS for kept in compare.KEPT
    ]
