"""Both losses of retrieval on captions of shared images, and their use in training."""

import pytest
import torch
from tiny_models import enable_checkpointing
from tiny_retrieval import (
    IMAGE_IDS,
    IMAGE_INDEX,
    MASK,
    PAIR_IDS,
    TEXTS,
    calls_of,
    captions,
    gradients,
    images,
    kept,
    make_model,
    matched_alone,
    pairs_of,
    run,
)
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from two_processes import results_of

from modeling_trips.modeling_trips import selection_loss
from modeling_trips.modeling_trips_pretraining import matching_pairs


GUIDANCES = ["text", "image", ["image", "text"]]  # the last schedule has a last layer scored by the text

# ---------------------------------------------------------------------------------------------------------------------
# Losses


@torch.no_grad()
def test_contrastive_loss_is_the_likelihood_of_the_right_ones():
    model = make_model()
    output = run(model)
    per_text, per_image = (
        logits.double().log_softmax(-1) for logits in (output.logits_per_text, output.logits_per_image)
    )
    total_per_text = total_per_image = 0.0
    for text in range(6):
        right = [image for image in range(4) if IMAGE_IDS[image] == PAIR_IDS[text]]
        total_per_text -= sum(per_text[text, image].item() for image in right) / len(right)
    for image in range(4):
        right = [text for text in range(6) if IMAGE_IDS[image] == PAIR_IDS[text]]
        total_per_image -= sum(per_image[image, text].item() for text in right) / len(right)
    assert output.itc_loss.item() == pytest.approx((total_per_text / 6 + total_per_image / 4) / 2, rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    "fields", [*({"selection_guidance": guidance} for guidance in GUIDANCES), {"pooling_mode": "mean"}], ids=str
)
def test_every_pair_is_matched_under_its_own_text(fields):
    model = make_model(**fields)
    output = run(model)
    pairs = pairs_of(output)
    images_of_pairs = IMAGE_INDEX[pairs.image_index]
    expected = [matched_alone(model, *pair) for pair in zip(pairs.text_index.tolist(), images_of_pairs.tolist())]
    torch.testing.assert_close(output.itm_logits, torch.stack(expected))
    torch.testing.assert_close(output.itm_loss, cross_entropy(torch.stack(expected), pairs.labels))
    assert pairs.text_index[:6].tolist() == list(range(6)) and images_of_pairs[:6].tolist() == IMAGE_INDEX.tolist()
    assert (PAIR_IDS[pairs.text_index[6:]] != IMAGE_IDS[images_of_pairs[6:]]).all()
    assert kept(output) == kept(model.model(TEXTS, images(), MASK, image_index=IMAGE_INDEX))


@torch.no_grad()
@pytest.mark.parametrize(
    ("selection_guidance", "attention", "mlp"),
    [
        ("text", [4, 18], [4, 18]),  # each image for its feature; true and negative pairs
        (["image", "text"], [4], [4, 18]),  # selection takes place between the last layer's two halves
        ("image", [4], [4]),
    ],
    ids=str,
)
def test_negatives_cost_no_second_pass_over_the_image(selection_guidance, attention, mlp):
    model = make_model(selection_guidance=selection_guidance)
    first, *_, last = model.model.vision_model.layers
    assert calls_of(first, lambda: run(model)) == [4]
    assert calls_of(last.attention.k_proj, lambda: run(model)) == attention
    assert calls_of(last.mlp.fc1, lambda: run(model)) == mlp
    assert calls_of(model.model.text_model, lambda: run(model)) == [6]


@torch.no_grad()
def test_features_are_of_the_trunk_that_texts_share():
    """If a text only selects in the last layer, the features equal those of a tower without text guidance."""
    model, by_image = make_model(selection_guidance=["image", "text"]), make_model(selection_guidance="image")
    features = run(model).image_embeds
    torch.testing.assert_close(features, model.get_image_features(images()).pooler_output)
    torch.testing.assert_close(features, by_image.get_image_features(images()).pooler_output)


@torch.no_grad()
def test_weights_add_up_the_losses():
    expected, output = run(make_model()), run(make_model(itc_weight=0.5, itm_weight=2.0))
    torch.testing.assert_close(expected.loss, expected.itc_loss + expected.itm_loss)
    torch.testing.assert_close(output.loss, 0.5 * expected.itc_loss + 2.0 * expected.itm_loss)
    assert expected.to_tuple()[0] is expected.loss


@torch.no_grad()
def test_a_weight_of_0_skips_the_matching_loss():
    model = make_model(itm_weight=0.0)
    output = run(model)
    assert output.itm_loss is output.itm_logits is None
    assert torch.equal(output.loss, run(make_model()).itc_loss) and torch.equal(output.loss, output.itc_loss)
    assert calls_of(model.model.fusion_model, lambda: run(model)) == []
    assert kept(output) == kept(model.get_image_features(images()))


@torch.no_grad()
def test_a_weight_of_0_skips_the_contrastive_loss():
    model = make_model(itc_weight=0.0)
    output = run(model)
    assert output.itc_loss is output.image_embeds is output.logits_per_text is None
    assert torch.equal(output.loss, output.itm_loss)
    assert calls_of(model.model.vision_model.layers[-1], lambda: run(model)) == [18]
    torch.manual_seed(0)
    pairs = matching_pairs(torch.zeros(6, 6), PAIR_IDS)  # all as likely
    expected = model.match(
        TEXTS, images(), MASK, text_index=pairs.text_index, image_index=IMAGE_INDEX[pairs.image_index]
    )
    torch.testing.assert_close(output.itm_logits, expected.itm_logits)


@torch.no_grad()
def test_defaults_of_images_and_ids():
    model = make_model()
    torch.manual_seed(0)
    output = model(TEXTS[:4], images(), MASK[:4], return_loss=True)
    torch.manual_seed(0)
    expected = model(TEXTS[:4], images(), MASK[:4], image_index=torch.arange(4), image_ids=torch.tensor([9, 3, 5, 1]))
    torch.testing.assert_close(output.loss, expected.loss)
    assert run(model, return_loss=False).loss is None


@torch.no_grad()
def test_negatives_are_the_same_for_the_same_seed_only():
    model = make_model()
    assert torch.equal(run(model, 1).itm_logits, run(model, 1).itm_logits)
    losses = {run(model, seed).itm_loss.item() for seed in range(20)}
    assert len(losses) > 1


@pytest.mark.parametrize("num_texts", [1, 3])
def test_a_batch_of_one_image_trains_on_its_true_pairs(num_texts):
    model = make_model()
    index = torch.zeros(num_texts, dtype=torch.long)
    output = model(TEXTS[:num_texts], images(1), MASK[:num_texts], image_index=index, return_loss=True)
    labels = torch.ones(num_texts, dtype=torch.long)
    torch.testing.assert_close(output.itm_loss, cross_entropy(output.itm_logits[:num_texts], labels))
    output.loss.backward()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


@pytest.mark.parametrize("value, used", [(0.07, 0.07), (0.0001, 0.001), (-1.0, 0.001), (3.0, 0.5)])
def test_temperature_is_clamped_when_it_is_used(value, used):
    model = make_model()
    with torch.no_grad():
        model.temp.weight.fill_(value)
    output = run(model)
    torch.testing.assert_close(output.logits_per_text, output.text_embeds @ output.image_embeds.T / used)
    output.itc_loss.backward()
    assert model.temp.weight.item() == pytest.approx(value)
    assert (model.temp.weight.grad.item() != 0) == (value == used)


# ---------------------------------------------------------------------------------------------------------------------
# Training


@pytest.mark.parametrize("selection_guidance", ["text", ["image", "text"]], ids=str)
def test_every_parameter_gets_a_gradient(selection_guidance):
    model = make_model(selection_guidance=selection_guidance).train()
    assert model.model.vision_model.selection_projection is not None
    run(model).loss.backward()
    without = [name for name, gradient in gradients(model).items() if gradient is None or not gradient.abs().sum() > 0]
    assert without == []


@pytest.mark.parametrize("selection_guidance", GUIDANCES, ids=str)
def test_no_shape_of_the_losses_depends_on_a_value(selection_guidance):
    """Meta tensors have no values, so that a host sync raises on them."""
    with torch.device("meta"):
        model = make_model(selection_guidance=selection_guidance).train()
    inputs = {**captions(), "image_ids": IMAGE_IDS}
    del inputs["attention_mask"]  # the library looks at its values
    output = model(**{name: tensor.to("meta") for name, tensor in inputs.items()})
    output.loss.backward()
    assert output.itm_logits.shape == (18, 2) and model.temp.weight.grad.shape == (1,)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(use_reentrant):
    expected, model = make_model().train(), make_model().train()
    enable_checkpointing(model, use_reentrant=use_reentrant)
    for each in (expected, model):
        run(each).loss.backward()
    torch.testing.assert_close(gradients(model), gradients(expected))


def test_bfloat16_keeps_features_and_losses_in_full_precision():
    expected, model = run(make_model()), make_model().bfloat16()
    output = run(model, pixel_values=images().bfloat16())
    assert output.loss.dtype == output.image_embeds.dtype == output.text_embeds.dtype == torch.float32
    torch.testing.assert_close(output.text_embeds.norm(dim=-1), torch.ones(6))
    torch.testing.assert_close(output.itc_loss, expected.itc_loss, rtol=0.1, atol=0)
    output.loss.backward()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(run(make_model()).itc_loss, expected.itc_loss, rtol=0.1, atol=0)


def test_six_captions_can_be_learned():
    model = make_model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(80):
        optimizer.zero_grad()
        run(model, seed=step).loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        output = model(**captions())
        assert IMAGE_IDS[output.logits_per_text.argmax(-1)].tolist() == PAIR_IDS.tolist()
        assert PAIR_IDS[output.logits_per_image.argmax(-1)].tolist() == IMAGE_IDS.tolist()
        every_text, every_image = torch.arange(6).repeat_interleave(4), torch.arange(4).repeat(6)
        matched = model.match(TEXTS, images(), MASK, text_index=every_text, image_index=every_image)
    margins = (matched.itm_logits[:, 1] - matched.itm_logits[:, 0]).view(6, 4)
    assert IMAGE_IDS[margins.argmax(1)].tolist() == PAIR_IDS.tolist()
    assert PAIR_IDS[margins.argmax(0)].tolist() == IMAGE_IDS.tolist()


# Images and captions of each process: two images each, one of them equal; or three and one.
SPLITS = {"even": ([0, 1], [2, 3]), "uneven": ([0, 1, 3], [2])}


def part_of_the_batch(images_of_process):
    captions_of_process = [text for text in range(6) if IMAGE_INDEX[text] in images_of_process]
    return {
        "input_ids": TEXTS[captions_of_process],
        "attention_mask": MASK[captions_of_process],
        "pixel_values": images()[images_of_process],
        "image_index": torch.tensor([images_of_process.index(IMAGE_INDEX[text]) for text in captions_of_process]),
        "image_ids": IMAGE_IDS[images_of_process],
    }


def loss_and_gradients(model, name, inputs):
    torch.manual_seed(0)
    loss = model(**inputs)[name]
    loss.backward()
    model = model.module if isinstance(model, DistributedDataParallel) else model
    grads = {name: gradient for name, gradient in gradients(model).items() if gradient is not None}
    return {"loss": loss.detach(), "gradients": grads}


def make_contrastive_model():
    """Return a model with only the parameters of the contrastive loss, as data parallel training needs it."""
    model = make_model(itm_weight=0.0)
    for parameter in model.unused_parameters():
        parameter.requires_grad_(False)
    return model


def make_matching_batch():
    """
    Return two groups of two nearly equal pairs. At the lowest temperature the hardest negative of each pair is the
    other one of its group, for any noise.
    """
    generator = torch.Generator().manual_seed(201)
    pixel_values = torch.randn(2, 1, 3, 16, 16, generator=generator) + 0.02 * torch.randn(
        2, 2, 3, 16, 16, generator=generator
    )
    texts = torch.tensor([[1, 5, 7, 9, 2], [1, 5, 7, 9, 4], [1, 8, 3, 3, 2], [1, 8, 3, 3, 6]])
    return {"input_ids": texts, "pixel_values": pixel_values.flatten(0, 1).double(), "image_ids": torch.arange(4)}


def make_matching_model():
    """Return a model in double precision, since the temperature multiplies rounding errors by a thousand."""
    model = make_model().double()
    with torch.no_grad():
        model.temp.weight.fill_(0.001)
    return model


def run_process(rank):
    torch.set_num_threads(1)
    results = {}
    for name, split in SPLITS.items():
        model = DistributedDataParallel(make_contrastive_model())
        results[name] = loss_and_gradients(model, "itc_loss", part_of_the_batch(split[rank]))
    model = make_matching_model()
    half = {name: tensor.chunk(2)[rank] for name, tensor in make_matching_batch().items()}
    results["matching"] = loss_and_gradients(DistributedDataParallel(model), "loss", half)
    both = DistributedDataParallel(make_model())  # an unused parameter would be an error in the second step
    for _ in range(2):
        both(**part_of_the_batch(SPLITS["even"][rank])).loss.backward()
    return results


@torch.no_grad()
def test_the_hardest_negative_of_each_is_the_other_of_its_group():
    """The distances exceed the noise of the draw, about 20 at most. The next test relies on it."""
    model = make_matching_model()
    logits = model(**make_matching_batch()).logits_per_text
    for matrix in (logits, logits.T):
        for row, other in enumerate([1, 0, 3, 2]):
            apart = [column for column in range(4) if column not in (row, other)]
            assert matrix[row, other] > matrix[row, apart].max() + 40


@pytest.mark.slow
def test_two_processes_have_the_losses_and_gradients_of_one(tmp_path):
    outputs = results_of(run_process, tmp_path)
    whole = {**captions(), "image_ids": IMAGE_IDS}
    expected = {name: loss_and_gradients(make_contrastive_model(), "itc_loss", whole) for name in SPLITS}
    model = make_matching_model()
    expected["matching"] = loss_and_gradients(model, "loss", make_matching_batch())
    for name, results in expected.items():
        torch.testing.assert_close((outputs[0][name]["loss"] + outputs[1][name]["loss"]) / 2, results["loss"])
        for output in outputs:
            torch.testing.assert_close(output[name]["gradients"], results["gradients"], rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Patch selection


@pytest.mark.parametrize("selection_guidance", ["text", ["image", "text"]], ids=str)
def test_texts_are_taught_what_to_see_of_their_own_images(selection_guidance):
    model = make_model(selection_guidance=selection_guidance).train()
    num_patches = model.config.vision_config.grid_size[0] * model.config.vision_config.grid_size[1]
    targets = torch.rand(len(TEXTS), num_patches).softmax(dim=-1)
    output, plain = run(model, patch_targets=targets), run(model)
    union = torch.stack([targets[IMAGE_INDEX == image].amax(dim=0) for image in IMAGE_INDEX])
    guidances = [settings.guidance for settings in model.model.vision_model.schedule.selections]
    expected = [
        selection_loss(layer.scores, layer.candidate_indices, targets if guide == "text" else union)
        for layer, guide in zip(output.selection, guidances)
    ]
    torch.testing.assert_close(output.selection_loss, torch.stack(expected).mean())
    torch.testing.assert_close(output.loss, plain.loss + 0.5 * output.selection_loss)
    assert plain.selection_loss is None and run(model.eval(), patch_targets=targets).selection_loss is None


def test_nothing_is_taught_where_nothing_is_matched():
    model = make_model(itm_weight=0.0).train()
    output = run(model, regions=torch.tensor([[0.5, 0.5, 0.5, 0.5]] * len(TEXTS)))
    assert output.selection_loss is None
