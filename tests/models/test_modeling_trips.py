"""The model without a head: data flow, padding, batches, shared images, saving and loading."""

import pytest
import torch

from modeling_trips import UNPRUNED, TripsConfig, TripsModel, use_schedule


IDS = torch.tensor([[1, 5, 7, 9, 2], [1, 8, 2, 0, 0], [1, 4, 6, 2, 0], [1, 9, 9, 2, 0]])
MASK = (IDS != 0).long()
INDEX = torch.tensor([1, 0, 1, 1])


def make_config(text_width=16, **selection):
    selection = {"selection_layers": [2, 3], "keep_rate": 0.5, **selection}
    return TripsConfig(
        vision_config={
            "hidden_size": 16,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "image_size": 16,
            "patch_size": 4,
            "initializer_range": 0.4,
            **selection,
        },
        text_config={
            "vocab_size": 20,
            "hidden_size": text_width,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "max_position_embeddings": 12,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "initializer_range": 0.4,
        },
        fusion_encoder_config={"num_hidden_layers": 2},
        decoder_config={"num_hidden_layers": 1, "bos_token_id": 1, "eos_token_id": 2},
    )


def make_model(attn_implementation="sdpa", **fields):
    torch.manual_seed(0)
    return TripsModel._from_config(make_config(**fields), attn_implementation=attn_implementation).eval()


def images(count):
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def kept(output):
    return [entry.kept_indices.tolist() for entry in output.selection]


@pytest.mark.parametrize("text_width", [16, 24])
def test_it_is_its_three_parts_in_order(text_width):
    model = make_model(text_width=text_width)
    output = model(IDS, images(4), MASK)
    text = model.text_model(IDS, MASK)
    vision = model.vision_model(images(4), text.last_hidden_state[:, 0])
    fused = model.fusion_model(text.last_hidden_state, vision.last_hidden_state, MASK)
    torch.testing.assert_close(output.last_hidden_state, fused.last_hidden_state)
    torch.testing.assert_close(output.text_model_output.last_hidden_state, text.last_hidden_state)
    torch.testing.assert_close(output.vision_model_output.last_hidden_state, vision.last_hidden_state)
    assert output.last_hidden_state.shape == (4, 5, text_width)
    # 16 patches -> 8 and 1 fused -> ceil(4.5) = 5 and 1 fused
    assert vision.last_hidden_state.shape == (4, 1 + 5 + 1, 16)
    assert kept(output) == kept(vision)
    assert [entry.kept_indices.shape[1] for entry in output.selection] == [8, 5]


@pytest.mark.parametrize("guidance", ["text", "image", "random"])
def test_padding_and_batch_change_nothing_for_a_question(guidance):
    model = make_model(selection_guidance=guidance)
    pixel_values = images(4)
    together = model(IDS, pixel_values, MASK)
    for row in range(4):
        length = int(MASK[row].sum())
        alone = model(IDS[row : row + 1, :length], pixel_values[row : row + 1])
        torch.testing.assert_close(alone.last_hidden_state[0], together.last_hidden_state[row, :length])
        assert [rows[0] for rows in kept(alone)] == [rows[row] for rows in kept(together)]
    more_padding = torch.nn.functional.pad(IDS, (0, 4)), pixel_values, torch.nn.functional.pad(MASK, (0, 4))
    padded = model(*more_padding)
    torch.testing.assert_close(padded.last_hidden_state[:, :5][MASK == 1], together.last_hidden_state[MASK == 1])
    assert kept(padded) == kept(together)


def test_order_of_the_questions_changes_nothing():
    model, order = make_model(), torch.tensor([2, 0, 3, 1])
    output = model(IDS[order], images(2), MASK[order], image_index=INDEX[order])
    expected = model(IDS, images(2), MASK, image_index=INDEX)
    torch.testing.assert_close(output.last_hidden_state, expected.last_hidden_state[order])
    for entry, entry_expected in zip(output.selection, expected.selection):
        assert torch.equal(entry.kept_indices, entry_expected.kept_indices[order])


@pytest.mark.parametrize("as_cache", [False, True], ids=["pixels", "image_cache"])
@pytest.mark.parametrize(
    "selection",
    [
        {},
        {"selection_guidance": "image"},
        {"selection_guidance": ["image", "text"]},
        {"selection_guidance": ["text", "image"]},
        {"selection_layers": []},
        {"selection_layers": [1]},
        {"keep_rate": 1.0},
    ],
    ids=str,
)
def test_image_index_equals_repeated_images(selection, as_cache):
    results = []
    for shared in (True, False):
        model = make_model(**selection).double()
        pixel_values = images(2).double().requires_grad_()
        if not shared:
            output = model(IDS, pixel_values[INDEX], MASK)
        elif as_cache:
            output = model(IDS, attention_mask=MASK, image_cache=model.encode_images(pixel_values), image_index=INDEX)
        else:
            output = model(IDS, pixel_values, MASK, image_index=INDEX)
        output.last_hidden_state.sin().sum().backward()
        weights = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
        results.append((output, pixel_values.grad, weights))
    (output, *gradients), (expected, *expected_gradients) = results
    torch.testing.assert_close(output.last_hidden_state, expected.last_hidden_state)
    assert kept(output) == kept(expected)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-5)


def test_captured_outputs_of_every_part():
    output = make_model("eager")(IDS, images(4), MASK, output_attentions=True, output_hidden_states=True)
    lengths = [17, 17, 10, 7]  # tokens after the embeddings and after each layer: 1 + 16 -> 1 + 8 + 1 -> 1 + 5 + 1
    vision = output.vision_model_output
    assert [states.shape[1] for states in vision.hidden_states] == lengths
    assert [weights.shape[-1] for weights in vision.attentions] == lengths[:-1]
    assert [tuple(weights.shape) for weights in output.cross_attentions] == [(4, 2, 5, 7)] * 2
    assert [tuple(weights.shape) for weights in output.attentions] == [(4, 2, 5, 5)] * 2
    assert len(output.hidden_states) == len(output.text_model_output.hidden_states) == 3


@pytest.mark.parametrize("fuse", [True, False])
def test_text_encoder_is_trained_through_the_selection(fuse):
    model = make_model(fuse_inattentive_tokens=fuse)
    model(IDS, images(4), MASK).vision_model_output.last_hidden_state.sin().sum().backward()
    gradient = model.text_model.encoder.layer[0].attention.self.query.weight.grad
    assert (gradient is not None and gradient.norm() > 1e-4) == fuse


def test_a_checkpoint_is_the_same_for_every_selection(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    unpruned, report = TripsModel.from_pretrained(tmp_path, selection_layers=[], output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert unpruned(IDS, images(4), MASK).vision_model_output.last_hidden_state.shape[1] == 17
    with use_schedule(model, UNPRUNED):
        states = model(IDS, images(4), MASK).last_hidden_state
    torch.testing.assert_close(unpruned(IDS, images(4), MASK).last_hidden_state, states)


@pytest.mark.parametrize("guidance", ["text", "image", "random"])
@pytest.mark.parametrize("num_images", [1, 3])
def test_number_of_texts_and_images_must_agree(guidance, num_images):
    model = make_model(selection_guidance=guidance)
    with pytest.raises(ValueError, match="image_index"):
        model(IDS, images(num_images), MASK)
    with pytest.raises(ValueError, match="image_index"):
        model(IDS, images(num_images), MASK, image_index=torch.tensor([0]))
