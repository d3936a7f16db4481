"""Top-p selection (`selection_mode="mass"`): the rule by hand, and independence of padding."""

import math

import pytest
import torch
from tiny_models import (
    CASES,
    IMAGES,
    TEXTS,
    NoNumbers,
    each_model,
    gradients_of,
    kept_by,
    loss_of,
    main_output,
)

import modeling_trips.patch_selection
from modeling_trips import (
    SelectionSchedule,
    TripsConfig,
    TripsForRetrieval,
    TripsModel,
    TripsVisionConfig,
)
from modeling_trips.patch_selection import (
    keep_mass,
    num_kept_by_row,
    num_kept_tokens,
    select_mass,
)


# At most 39 of 64 patches stay, then at most 60% of the remaining ones.
MASS = {"selection_mode": "mass", "selection_mass": 0.5}
FORMS = {
    "text": {},
    "image": {"selection_guidance": "image"},
    "image_then_text": {"selection_guidance": ["image", "text"]},
    "text_then_image": {"selection_guidance": ["text", "image"]},
    "no_fusing": {"fuse_inattentive_tokens": False},
    "random": {"selection_guidance": "random"},
}
each_form = pytest.mark.parametrize("fields", FORMS.values(), ids=FORMS)
each_fusion = pytest.mark.parametrize("fusion_type", ["cross_attention", "skip_connected", "single_stream"])


def pad_further(monkeypatch):
    """Pad rows to the limit of the keep rate, as if host syncs were not possible."""
    monkeypatch.setattr(modeling_trips.patch_selection, "_longest_row", lambda kept, most: most)


def num_kept(outputs) -> list[list[int]]:
    return [[len(row) for row in layer] for layer in kept_by(outputs)]


# ---------------------------------------------------------------------------------------------------------------------
# The rule

SCORES = [0.05, 0.3, 0.1, 0.25, 0.3]


@pytest.mark.parametrize(
    ("mass", "keep_rate", "min_keep_rate", "expected"),
    [
        (0.2, 1.0, 0.0, [1]),  # ties: the first one
        (0.3, 1.0, 0.0, [1]),  # just enough
        (0.31, 1.0, 0.0, [1, 4]),
        (0.61, 1.0, 0.0, [1, 3, 4]),
        (0.95, 1.0, 0.0, [1, 2, 3, 4]),
        (1.0, 1.0, 0.0, [0, 1, 2, 3, 4]),
        (1.0, 0.6, 0.0, [1, 3, 4]),  # at most ceil(0.6 * 5) = 3
        (0.96, 0.3, 0.0, [1, 4]),
        (0.2, 1.0, 0.4, [1, 4]),  # at least ceil(0.4 * 5) = 2
        (0.96, 0.6, 0.6, [1, 3, 4]),
    ],
)
def test_the_rule_by_hand(mass, keep_rate, min_keep_rate, expected):
    kept = keep_mass(torch.tensor([SCORES]), mass, keep_rate, min_keep_rate)
    assert kept[0].nonzero().flatten().tolist() == expected


def test_all_of_the_mass_is_all_candidates_however_little_some_have():
    scores = torch.tensor([[1.0, 1e-12, 0.0, 1e-9]])
    assert keep_mass(scores, mass=1.0, keep_rate=0.99).all()
    assert keep_mass(scores, mass=0.9999, keep_rate=0.99).tolist() == [[True, False, False, False]]


def test_padding_is_never_kept_and_does_not_count():
    scores = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0, 0.0]])
    mask = torch.tensor([[False, True, False, True, True, False]])  # the last candidate's score is 0 after rounding
    assert keep_mass(scores, 1.0, 1.0, 1.0, mask).tolist() == mask.tolist()
    # At least ceil(0.6 * 3) = 2 and at most ceil(0.3 * 3) = 1 of three, not of six.
    assert keep_mass(scores, 0.1, 1.0, 0.6, mask).sum() == 2
    assert keep_mass(scores, 1.0, 0.3, 0.0, mask).sum() == 1


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("of_row", [slice(None), slice(2, 3)], ids=["all NaN", "one NaN"])
@pytest.mark.parametrize("rows", [[0], [1], [0, 1, 2]], ids=str)
def test_a_row_of_nan_keeps_candidates_and_changes_no_other(rows, of_row, fuse):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(3, 10, generator=generator).mul(3).softmax(dim=-1)
    tokens = torch.randn(3, 11, 4, generator=generator)
    mask = torch.arange(10) < torch.tensor([[10], [7], [8]])
    expected, kept_expected, mask_expected = select_mass(tokens, scores, 0.5, 0.9, fuse=fuse, candidate_mask=mask)
    scores[rows, of_row] = tokens[rows, 1:] = math.nan
    selected, kept, new_mask = select_mass(tokens, scores, 0.5, 0.9, fuse=fuse, candidate_mask=mask)
    for row in range(3):
        if row in rows:
            counted = kept[row, new_mask[row, : kept.shape[1]]]
            assert 1 <= len(counted) <= num_kept_tokens(int(mask[row].sum()), 0.9) and mask[row, counted].all()
            assert selected[row, 1:].isnan().all()
        else:
            same = selected[row, 1:][new_mask[row]], expected[row, 1:][mask_expected[row]]
            torch.testing.assert_close(*same)


@each_fusion
@each_form
@torch.no_grad()
def test_an_image_of_nan_makes_its_own_outputs_nan(fields, fusion_type):
    fields = {**MASS, **fields, "fusion_type": fusion_type, "vision_config": {"patch_embedding_type": "linear"}}
    torch.manual_seed(0)
    model = TripsModel(TripsConfig.from_preset("tiny", selection_layers=[1, 3], keep_rate=0.6, **fields)).eval()
    images = IMAGES[:3, 0].clone()
    images[1] = math.nan
    states = model(TEXTS[:3], images, (TEXTS[:3] != 0).long()).last_hidden_state
    assert states.isnan().flatten(1).any(dim=1).tolist() == [False, True, False]


@pytest.mark.parametrize("rate", [1e-9, 0.07, 0.1, 0.29, 0.3, 0.31, 0.7, 0.999, 1.0])
def test_counts_of_rows_are_those_of_a_number(rate):
    counts = torch.arange(1, 1000)
    assert num_kept_by_row(counts, rate).tolist() == [num_kept_tokens(count, rate) for count in counts.tolist()]


def test_a_batch_by_hand():
    """The rows keep one, two and all of three candidates. The last row has nothing to fuse."""
    scores = torch.tensor([[0.1, 0.7, 0.2], [0.4, 0.2, 0.4], [0.34, 0.33, 0.33]])
    tokens = torch.tensor([9.0, 10.0, 20.0, 30.0]).expand(3, 4)[:, :, None]
    selected, kept, mask = select_mass(tokens, scores, mass=0.7, keep_rate=1.0)
    assert mask.tolist() == [[True, False, False, True], [True, True, False, True], [True, True, True, False]]
    rows = [row[[True, *of_row.tolist()], 0].tolist() for row, of_row in zip(selected, mask)]
    assert rows[0] == pytest.approx([9.0, 20.0, 0.1 * 10 + 0.2 * 30])
    assert rows[1] == pytest.approx([9.0, 10.0, 30.0, 0.2 * 20])
    assert rows[2] == pytest.approx([9.0, 10.0, 20.0, 30.0])
    assert kept.tolist() == [[1, 1, 1], [0, 2, 0], [0, 1, 2]]


# ---------------------------------------------------------------------------------------------------------------------
# Every head: padding, other rows, order, shared images


@each_model
@torch.no_grad()
def test_rows_keep_different_numbers(case):
    outputs = case.make_model(**MASS)(**case.make_inputs(6))
    assert any(len(set(counts)) > 1 for counts in num_kept(outputs))
    kept = [(layer.kept_indices != -2).sum(dim=-1).tolist() for layer in outputs.selection]
    assert kept == num_kept(outputs)
    assert all(torch.equal(layer.scores == 0, layer.candidate_indices == -2) for layer in outputs.selection)


@each_model
@each_form
def test_padding_changes_neither_outputs_nor_losses_nor_gradients(case, fields, monkeypatch):
    results = []
    for change in (lambda monkeypatch: None, pad_further):
        change(monkeypatch)
        model = case.make_model(**MASS, **fields)
        outputs = model(**case.make_inputs())
        model.train()
        if fields.get("selection_guidance") == "random":  # in training, the scores are drawn
            model.base_model.vision_model.eval()
        loss = loss_of(model(**case.make_inputs(training=True)))
        loss.backward()
        results.append((outputs, loss, gradients_of(model)))
    (outputs, loss, gradients), (padded, padded_loss, padded_gradients) = results
    assert padded.selection[0].kept_indices.shape[1] == 39 > outputs.selection[0].kept_indices.shape[1]
    assert kept_by(padded) == kept_by(outputs)
    torch.testing.assert_close(main_output(padded), main_output(outputs), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(padded_loss, loss, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(padded_gradients, gradients, rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_matching_does_not_depend_on_other_pairs():
    model = next(case for case in CASES if case.model_class is TripsForRetrieval).make_model(**MASS)
    logits = model.match(TEXTS, IMAGES[:, 0], (TEXTS != 0).long()).itm_logits
    for row in range(6):
        alone = model.match(TEXTS[row, None], IMAGES[row, :1], (TEXTS[row, None] != 0).long()).itm_logits
        torch.testing.assert_close(alone[0], logits[row], rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Limits: nothing dropped, equal scores, and cost


@each_model
@torch.no_grad()
def test_a_keep_rate_of_1_is_the_plain_vit(case):
    outputs = case.make_model(**MASS, keep_rate=1.0)(**case.make_inputs())
    expected = case.make_model(selection_layers=[])(**case.make_inputs())
    assert not outputs.selection and torch.equal(main_output(outputs), main_output(expected))


@each_model
@torch.no_grad()
def test_with_floor_and_ceiling_alike_a_model_is_that_of_topk(case):
    outputs = case.make_model(**MASS, min_keep_rate=0.6)(**case.make_inputs())
    expected = case.make_model()(**case.make_inputs())
    assert kept_by(outputs) == kept_by(expected)
    torch.testing.assert_close(main_output(outputs), main_output(expected), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_each_layer_asks_the_device_once():
    class Count(NoNumbers):
        asked = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.asked += function is torch.ops.aten._local_scalar_dense.default
            return function(*args, **(kwargs or {}))

    for fusion_type in ("cross_attention", "single_stream"):
        model = CASES[0].make_model(**MASS, fusion_type=fusion_type)
        with Count() as count:
            model(**CASES[0].make_inputs())
        assert count.asked == 2


def test_where_there_is_no_device_to_ask_shapes_are_those_of_topk():
    with torch.device("meta"):
        model = TripsModel(TripsConfig.from_preset("tiny", selection_layers=[1, 3], keep_rate=0.6, **MASS)).eval()
    inputs = {"input_ids": torch.ones(4, 6, dtype=torch.long), "pixel_values": torch.randn(4, 3, 64, 64)}
    output = model(**{name: tensor.to("meta") for name, tensor in inputs.items()})
    assert output.vision_model_output.last_hidden_state.shape == (4, 26, 128)
    assert [layer.kept_indices.shape for layer in output.selection] == [(4, 39), (4, 24)]


# ---------------------------------------------------------------------------------------------------------------------
# Configuration and checkpoints


def test_a_configuration_of_before_keeps_a_share():
    fields = TripsConfig().to_dict()
    for name in ("selection_mode", "selection_mass", "min_keep_rate"):
        del fields["vision_config"][name]
    config = TripsConfig(**fields)
    assert config.selection_mode == "topk"
    assert str(config.vision_config.schedule) == "5:text:0.7,10:text:0.7"


def test_each_layer_has_its_own_numbers():
    config = TripsVisionConfig(
        selection_layers=[2, 4, 6],
        keep_rate=[0.7, 1.0, 0.5],
        selection_mode="mass",
        selection_mass=[0.9, 0.8, 0.7],
        min_keep_rate=0.1,
        selection_guidance=["image", "text", "text"],
    )
    assert str(config.schedule) == "2:image:0.7:0.9:0.1,6:text:0.5:0.7:0.1"
    assert SelectionSchedule.parse(str(config.schedule)) == config.schedule


@torch.no_grad()
def test_a_checkpoint_keeps_its_mode_and_another_can_be_chosen(tmp_path):
    model = CASES[0].make_model(**MASS, min_keep_rate=[0.1, 0.2])
    model.save_pretrained(tmp_path)
    loaded = TripsModel.from_pretrained(tmp_path)
    inputs = CASES[0].make_inputs()
    assert loaded.config.selection_mode == "mass" and loaded.config.min_keep_rate == [0.1, 0.2]
    assert kept_by(loaded(**inputs)) == kept_by(model(**inputs))
    fixed = TripsModel.from_pretrained(tmp_path, selection_mode="topk")
    assert num_kept(fixed(**inputs)) == [[39] * 4, [24] * 4]
