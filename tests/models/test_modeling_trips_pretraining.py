"""Pre-training: the sum of the objectives, shared cached image states, and weights of 0."""

from itertools import combinations

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import NoNumbers
from two_processes import results_of

from modeling_trips import TripsConfig, TripsForConditionalGeneration, TripsModel
from modeling_trips.modeling_trips_pretraining import TripsForPreTraining, TripsForRetrieval
from trips_examples.training.momentum import MomentumTeacher
from trips_examples.training.trainer import unused_parameters


# The paper's schedule, and one with layers scored by the image before a last layer scored by the text.
SCHEDULES = [
    {},
    {"selection_layers": [2, 3, 4], "keep_rate": [0.7, 0.7, 0.3], "selection_guidance": ["image", "image", "text"]},
]
WEIGHTS = {"itc_weight": 0.5, "itm_weight": 2.0, "mlm_weight": 3.0, "prefix_lm_weight": 5.0}


def make_model(text_width: int = 32, **fields) -> TripsForPreTraining:
    torch.manual_seed(0)
    config = TripsConfig.from_preset(
        "tiny",
        vision_config={"hidden_size": 32, "intermediate_size": 48, "image_size": 32, "patch_embedding_type": "linear"},
        text_config={
            "vocab_size": 20,
            "hidden_size": text_width,
            "intermediate_size": 48,
            "max_position_embeddings": 12,
        },
        projection_dim=8,
        **{**WEIGHTS, **fields},
    )
    return TripsForPreTraining(config).eval()


def make_batch() -> dict[str, torch.Tensor]:
    """Five captions of three images. Two tokens are masked, none in the last caption; each caption is cut in two."""
    texts = torch.tensor([[1, 5, 7, 9, 2], [1, 8, 2, 0, 0], [1, 4, 6, 2, 0], [1, 9, 9, 2, 0], [1, 3, 5, 8, 2]])
    masked, labels = texts.clone(), torch.full_like(texts, -100)
    for row, column in ((0, 2), (0, 3), (1, 1), (2, 1), (3, 2)):
        labels[row, column], masked[row, column] = texts[row, column], 19
    return {
        "input_ids": texts,
        "attention_mask": (texts != 0).long(),
        "pixel_values": torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1)),
        "image_index": torch.tensor([0, 0, 1, 2, 1]),
        "image_ids": torch.tensor([4, 9, 6]),
        "mlm_input_ids": masked,
        "mlm_labels": labels,
        "prompt_input_ids": texts[:, :3],
        "prompt_attention_mask": (texts[:, :3] != 0).long(),
        "labels": torch.tensor([[9, 2], [2, -100], [2, -100], [2, -100], [8, 2]]),
    }


@torch.no_grad()
def test_the_loss_is_the_weighted_sum_of_what_each_objective_is_on_its_own():
    model, batch = make_model(), make_batch()
    torch.manual_seed(3)
    outputs = model(**batch)
    parts = (outputs.itc_loss, outputs.itm_loss, outputs.mlm_loss, outputs.prefix_lm_loss)
    torch.testing.assert_close(outputs.loss, sum(weight * part for weight, part in zip(WEIGHTS.values(), parts)))

    retrieval = TripsForRetrieval(model.config).eval()
    retrieval.load_state_dict(model.state_dict(), strict=False)
    names = ("input_ids", "attention_mask", "pixel_values", "image_index", "image_ids")
    torch.manual_seed(3)
    alone = retrieval(**{name: batch[name] for name in names}, return_loss=True)
    torch.testing.assert_close((outputs.itc_loss, outputs.itm_loss), (alone.itc_loss, alone.itm_loss))


def count_calls(modules: dict[str, torch.nn.Module], run) -> dict[str, int]:
    calls = dict.fromkeys(modules, 0)

    def count(name):
        def hook(*_):
            calls[name] += 1

        return hook

    hooks = [module.register_forward_hook(count(name)) for name, module in modules.items()]
    run()
    for hook in hooks:
        hook.remove()
    return calls


@pytest.mark.parametrize(
    ("off", "text_passes", "unused"),
    [
        (None, {"text": 3, "fusion": 3}, set()),
        ("itc_weight", {"text": 3, "fusion": 3}, {"vision_proj", "temp"}),
        ("itm_weight", {"text": 3, "fusion": 2}, {"itm_head"}),
        ("mlm_weight", {"text": 2, "fusion": 2}, {"mlm_score"}),
        ("prefix_lm_weight", {"text": 2, "fusion": 2}, {"decoder", "lm_head"}),
    ],
)
def test_a_weight_of_zero_skips_an_objective_and_the_image_cache_is_always_shared(off, text_passes, unused):
    model, batch = make_model(**({off: 0.0} if off else {})), make_batch()
    modules = {
        "images": model.model.vision_model.embeddings,
        "text": model.model.text_model,
        "fusion": model.model.fusion_model,
        "decoder": model.decoder,
        "mlm_score": model.mlm_score,
        "itm_head": model.itm_head,
        "vision_proj": model.vision_proj,
    }
    losses = {}
    calls = count_calls(modules, lambda: losses.update(model(**batch)))
    assert calls["images"] == 1
    assert {name: calls[name] for name in text_passes} == text_passes
    for name in unused & calls.keys():
        assert calls[name] == 0
    losses["loss"].backward()
    tied = {"mlm_score.decoder", "lm_head.decoder"}
    without_gradient = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without_gradient - {"text_proj"} == unused - tied


@pytest.mark.parametrize("on", [subset for size in (1, 2, 3, 4) for subset in combinations(sorted(WEIGHTS), size)])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_with_the_unused_parameters_frozen_every_parameter_has_a_gradient(on, schedule):
    weights = {name: 0.0 for name in WEIGHTS if name not in on}
    model = make_model(text_width=48, **weights, **schedule)
    projection = model.model.vision_model.selection_projection  # text and vision differ in width
    text_selects = set(on) != {"itc_weight"}
    assert text_selects == all(projection.weight is not parameter for parameter in unused_parameters(model))
    for parameter in unused_parameters(model):
        parameter.requires_grad_(False)
    model(**make_batch()).loss.backward()
    missing = [name for name, value in model.named_parameters() if value.requires_grad and value.grad is None]
    assert missing == []


@torch.no_grad()
def test_captions_that_are_too_short_to_be_cut_add_nothing():
    model, batch = make_model(), make_batch()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    assert model(**batch).prefix_lm_loss == 0


def test_accumulated_batches_are_averaged_by_the_trainer():
    # Each loss is a mean over its own items, so that the number of label tokens does not scale their sum.
    assert TripsForPreTraining.accepts_loss_kwargs is False


def test_a_checkpoint_holds_no_teacher_and_serves_the_other_heads(tmp_path):
    model = make_model()
    teacher = MomentumTeacher(model, queue_size=8)
    model.train()(**teacher.teach(make_batch(), 0.4)).loss.backward()
    model.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
    assert load_file(tmp_path / "model.safetensors").keys() <= model.state_dict().keys()
    for head in (TripsForConditionalGeneration, TripsForRetrieval, TripsModel):
        _, info = head.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"], head


def test_nothing_waits_for_the_device():
    model, teacher = make_model().train(), MomentumTeacher(make_model(), queue_size=8)
    with NoNumbers():
        inputs = teacher.teach(make_batch(), 0.4)
        model(**inputs).loss.backward()
        teacher.push(inputs["teacher"])
        teacher.update(model)


def test_a_teacher_needs_to_know_the_images():
    """Otherwise images of different batches would have equal ids in the queue."""
    model, batch = make_model(), make_batch()
    del batch["image_ids"]
    with pytest.raises(ValueError, match="image_ids"):
        MomentumTeacher(model, queue_size=8).teach(batch, 0.4)
    model = make_model(itc_weight=0.0)  # no features, no queues
    model(**MomentumTeacher(model, queue_size=8).teach(batch, 0.4))


# ---------------------------------------------------------------------------------------------------------------------
# Several processes


def part_of(batch: dict[str, torch.Tensor], first_half: bool) -> dict[str, torch.Tensor]:
    """Return two captions of image 0 with three masked words, or the three others with two masked words."""
    texts, images = (slice(2), slice(1)) if first_half else (slice(2, None), slice(1, None))
    part = {name: value[images if name in ("pixel_values", "image_ids") else texts] for name, value in batch.items()}
    return {**part, "image_index": part["image_index"] - (0 if first_half else 1)}


def losses_and_gradients(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model = make_model(itm_weight=0.0)  # whose negatives are drawn among those of a process
    outputs = model(**batch)
    outputs.loss.backward()
    gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    return {name: outputs[name].detach() for name in ("itc_loss", "mlm_loss", "prefix_lm_loss")} | gradients


def run_process(rank: int) -> dict[str, torch.Tensor]:
    return losses_and_gradients(part_of(make_batch(), rank == 0))


@pytest.mark.slow
def test_two_processes_with_unequal_numbers_of_words_give_the_losses_and_gradients_of_one(tmp_path):
    first, second = results_of(run_process, tmp_path)
    expected = losses_and_gradients(make_batch())
    assert first.keys() == second.keys() == expected.keys()
    for name, value in expected.items():
        mean = (first[name] + second[name]) / 2  # as data parallel training takes it
        torch.testing.assert_close(mean, value, rtol=1e-3, atol=1e-5, msg=name)
