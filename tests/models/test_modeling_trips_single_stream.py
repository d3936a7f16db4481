"""Tests of the single stream: it is ViLT's transformer, and what it selects is what its definition says."""

import math
import os
import subprocess
import sys

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    ViltConfig,
    ViltForImagesAndTextClassification,
    ViltForQuestionAnswering,
    ViltModel,
)

import modeling_trips
from modeling_trips import (
    TripsConfig,
    TripsForImagesAndTextClassification,
    TripsForPreTraining,
    TripsForQuestionAnswering,
    TripsForRetrieval,
    TripsForVisualGrounding,
    TripsModel,
    TripsSingleStreamModel,
    TripsVisionModel,
)
from modeling_trips.conversion.rules import load_converted
from modeling_trips.conversion.vilt import vilt_plan
from modeling_trips.hosts.apply import apply_patch_selection, record_patch_selection


IDS = torch.tensor([[1, 5, 7, 9, 2], [1, 8, 2, 0, 0], [1, 4, 6, 2, 0], [1, 9, 9, 2, 0]])
MASK = (IDS != 0).long()
INDEX = torch.tensor([1, 0, 1, 1])
HEADS = [TripsForQuestionAnswering, TripsForImagesAndTextClassification, TripsForVisualGrounding]


def images(count):
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def randomize(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.5 * noise if parameter.ndim > 1 else 1 + 0.3 * noise)
    return model.eval()


def make_config(**fields):
    """16 patches -> 8 and 1 fused -> ceil(4.5) = 5 and 1 fused."""
    fields = {"selection_layers": [2, 3], "keep_rate": 0.5, **fields}
    return TripsConfig(
        vision_config={
            "hidden_size": 16,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "image_size": 16,
            "patch_size": 4,
            "hidden_act": "gelu",
        },
        text_config={
            "vocab_size": 20,
            "hidden_size": 16,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "max_position_embeddings": 12,
            "hidden_dropout_prob": 0.0,
        },
        decoder_config={"num_hidden_layers": 1, "bos_token_id": 1, "eos_token_id": 2},
        fusion_type="single_stream",
        **fields,
    )


def make_model(attn_implementation="sdpa", model_class=TripsModel, **fields):
    return randomize(model_class._from_config(make_config(**fields), attn_implementation=attn_implementation))


def kept(output):
    return [entry.kept_indices.tolist() for entry in output.selection]


# ---------------------------------------------------------------------------------------------------------------------
# It is ViLT


def make_vilt(model_class=ViltModel, **fields):
    config = ViltConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=16,
        patch_size=4,
        max_position_embeddings=12,
        layer_norm_eps=1e-5,
        **fields,
    )
    return randomize(model_class(config))


def from_vilt(vilt, model_class=TripsModel, **selection):
    plan = vilt_plan(vilt.state_dict(), vilt.config, model_class.__name__, **selection)
    model = model_class(plan.config)
    return model.eval(), load_converted(model, vilt.state_dict(), plan)


def run_vilt(vilt):
    """The states of text and image, the patches in the order of the grid: ViLT draws an order."""
    torch.manual_seed(0)
    states = vilt(IDS, MASK, pixel_values=images(4)).last_hidden_state
    torch.manual_seed(0)
    _, _, (places, _) = vilt.embeddings.visual_embed(images(4), torch.ones(4, 16, 16), max_image_length=-1)
    order = (places[..., 0] * 4 + places[..., 1]).argsort(dim=1)
    text, class_token, patches = states.split((5, 1, states.shape[1] - 6), dim=1)
    return text, torch.cat((class_token, patches.gather(1, order.unsqueeze(-1).expand(-1, -1, 16))), dim=1)


@torch.no_grad()
def test_without_selection_it_is_vilt():
    vilt = make_vilt()
    text, image = run_vilt(vilt)
    for selection in ({"keep_rate": 1.0, "selection_layers": [2, 3]}, {"selection_layers": []}):
        model, report = from_vilt(vilt, **selection)
        assert not report.new and report.left_out.keys() == {"pooler.dense.weight", "pooler.dense.bias"}
        output = model(IDS, images(4), MASK)
        torch.testing.assert_close(output.last_hidden_state, text, rtol=0, atol=1e-5)
        torch.testing.assert_close(output.vision_model_output.last_hidden_state, image, rtol=0, atol=1e-5)
        torch.testing.assert_close(output.vision_model_output.pooler_output, image[:, 0], rtol=0, atol=1e-5)
        assert output.selection == ()


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("guidance", ["text", "image"])
@torch.no_grad()
def test_with_selection_it_is_vilt_with_patch_selection(guidance, fuse):
    vilt = make_vilt()
    schedule = {"selection_layers": [2, 3], "keep_rate": 0.5}
    model, _ = from_vilt(vilt, selection_guidance=guidance, fuse_inattentive_tokens=fuse, **schedule)
    output = model(IDS, images(4), MASK)
    apply_patch_selection(vilt, **schedule, guidance=guidance, fuse_inattentive_tokens=fuse)
    with record_patch_selection(vilt) as selections:
        states = vilt(IDS, MASK, pixel_values=images(4)).last_hidden_state
    assert kept(output) == [entry.kept_indices.tolist() for entry in selections]
    for entry, expected in zip(output.selection, selections):
        assert torch.equal(entry.candidate_indices, expected.candidate_indices)
        torch.testing.assert_close(entry.scores, expected.scores, rtol=0, atol=1e-5)
    joint = torch.cat((output.last_hidden_state, output.vision_model_output.last_hidden_state), dim=1)
    torch.testing.assert_close(joint, states, rtol=0, atol=1e-5)


@pytest.mark.parametrize("model_class", HEADS)
def test_vilt_with_a_head_starts_any_head(model_class):
    vilt = make_vilt(ViltForQuestionAnswering, num_labels=3)
    model, report = from_vilt(vilt, model_class, selection_layers=[2], decoder_config={"num_hidden_layers": 1})
    assert {name.partition(".")[0] for name in report.left_out} == {"vilt", "classifier"}  # of ViLT itself: the pooler
    assert {name.partition(".")[0] for name in report.new} <= {"decoder", "lm_head", "classifier", "box_head"}
    expected = run_vilt(vilt.vilt)[0]
    model.model.vision_model.config.keep_rate = 1.0
    torch.testing.assert_close(model.model(IDS, images(4), MASK).last_hidden_state, expected, rtol=0, atol=1e-5)


def test_vilt_of_nlvr2_loses_the_embedding_of_its_second_image():
    vilt = make_vilt(ViltForImagesAndTextClassification, num_images=2, modality_type_vocab_size=3)
    model, _ = from_vilt(vilt, selection_layers=[2], image_size=20)
    table = vilt.vilt.embeddings.token_type_embeddings.weight
    assert torch.equal(model.vision_model.modality_embeddings.weight, table[:2])
    assert model.vision_model.embeddings.position_embeddings.shape == (1, 26, 16)


# ---------------------------------------------------------------------------------------------------------------------
# It is what its definition says


def naive_layer_norm(module, states):
    centered = states - states.mean(-1, keepdim=True)
    return centered / (centered.square().mean(-1, keepdim=True) + module.eps).sqrt() * module.weight + module.bias


def naive_run(model, ids, image):
    """One text without padding, one image: the states of the text, and what each selection layer kept."""
    config, tower = model.config.vision_config, model.vision_model
    text = model.text_model(ids[None]).last_hidden_state[0]
    image = tower.embeddings(image[None])[0]
    types = tower.modality_embeddings.weight
    tokens = list(text + types[0]) + list(image + types[1])
    first, original, selections = len(text) + 1, list(range(len(image) - 1)), []
    width = config.hidden_size // config.num_attention_heads
    for number, layer in enumerate(tower.layers, start=1):
        attention, normed = layer.attention, naive_layer_norm(layer.layernorm_before, torch.stack(tokens))
        query, key, value = (getattr(attention, f"{part}_proj")(normed).split(width, dim=1) for part in "qkv")
        mixed = [(q @ k.T / math.sqrt(width)).softmax(dim=1) @ v for q, k, v in zip(query, key, value)]
        tokens = list(torch.stack(tokens) + attention.o_proj(torch.cat(mixed, dim=1)))
        if number in config.selection_schedule:
            guide = {"text": 0, "image": len(text)}[config.selection_guidance]
            heads = [(k[first:] @ q[guide] / math.sqrt(width)).softmax(dim=0) for q, k in zip(query, key)]
            scores = (sum(heads) / len(heads)).tolist()
            num_kept = math.ceil(config.selection_schedule[number] * len(scores))
            kept = sorted(sorted(range(len(scores)), key=lambda i: -scores[i])[:num_kept])
            fused = sum(scores[i] * tokens[first + i] for i in range(len(scores)) if i not in kept)
            selections.append([original[i] for i in kept])
            tokens, original = tokens[:first] + [tokens[first + i] for i in kept] + [fused], selections[-1] + [-1]
        states = torch.stack(tokens)
        tokens = list(states + layer.mlp(naive_layer_norm(layer.layernorm_after, states)))
    return naive_layer_norm(tower.layernorm, torch.stack(tokens))[: len(text)], selections


@pytest.mark.parametrize("guidance", ["text", "image"])
@torch.no_grad()
def test_selection_follows_the_formula_for_each_pair_alone(guidance):
    model = make_model(selection_guidance=guidance, selection_layers=[1, 3]).double()
    output = model(IDS, images(4).double(), MASK)
    for row in range(4):
        length = int(MASK[row].sum())
        states, selections = naive_run(model, IDS[row, :length], images(4)[row].double())
        torch.testing.assert_close(output.last_hidden_state[row, :length], states)
        assert [entry[row] for entry in kept(output)] == selections


@torch.no_grad()
def test_the_text_picks_the_patches():
    model, same_image = make_model(), {"pixel_values": images(1), "image_index": torch.zeros(4, dtype=torch.long)}
    output = model(IDS, attention_mask=MASK, **same_image)
    assert all(len({tuple(row) for row in rows}) > 1 for rows in kept(output))
    # Of words that stand in the texts of both batches only [CLS] asks, and it has attended to the others.
    other_word = IDS.clone()
    other_word[:, 1] = 11
    changed = model(other_word, attention_mask=MASK, **same_image)
    assert (changed.selection[0].scores - output.selection[0].scores).abs().amax(dim=1).min() > 1e-4


@pytest.mark.parametrize("guidance", ["text", "image", "random"])
@torch.no_grad()
def test_padding_and_batch_change_nothing(guidance):
    model = make_model(selection_guidance=guidance)
    together = model(IDS, images(4), MASK)
    for row in range(4):
        length = int(MASK[row].sum())
        alone = model(IDS[row : row + 1, :length], images(4)[row : row + 1])
        torch.testing.assert_close(
            alone.last_hidden_state[0], together.last_hidden_state[row, :length], rtol=1e-4, atol=1e-5
        )
        assert [rows[0] for rows in kept(alone)] == [rows[row] for rows in kept(together)]
    more = torch.nn.functional.pad(IDS, (0, 4), value=13), images(4), torch.nn.functional.pad(MASK, (0, 4))
    padded = model(*more)
    torch.testing.assert_close(
        padded.last_hidden_state[:, :5][MASK == 1], together.last_hidden_state[MASK == 1], rtol=1e-4, atol=1e-5
    )
    image = together.vision_model_output.last_hidden_state
    torch.testing.assert_close(padded.vision_model_output.last_hidden_state, image, rtol=1e-4, atol=1e-5)
    assert kept(padded) == kept(together)
    order = torch.tensor([2, 0, 3, 1])
    shuffled = model(IDS[order], images(4)[order], MASK[order])
    torch.testing.assert_close(shuffled.last_hidden_state, together.last_hidden_state[order], rtol=1e-4, atol=1e-5)
    assert kept(shuffled) == [[rows[i] for i in order] for rows in kept(together)]


@pytest.mark.parametrize("as_prefix", [False, True], ids=["pixels", "prefix"])
@pytest.mark.parametrize("selection", [{}, {"selection_guidance": "image"}, {"keep_rate": 1.0}], ids=str)
def test_image_index_equals_repeated_images(selection, as_prefix):
    results = []
    for shared in (True, False):
        model, pixel_values = make_model(**selection).double(), images(2).double().requires_grad_()
        if not shared:
            output = model(IDS, pixel_values[INDEX], MASK)
        elif as_prefix:
            output = model(IDS, attention_mask=MASK, prefix=model.encode_images(pixel_values), image_index=INDEX)
        else:
            output = model(IDS, pixel_values, MASK, image_index=INDEX)
        output.last_hidden_state.sin().sum().backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        results.append((output, pixel_values.grad, gradients))
    (output, *gradients), (expected, *expected_gradients) = results
    torch.testing.assert_close(output.last_hidden_state, expected.last_hidden_state)
    assert kept(output) == kept(expected)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("fuse", [True, False])
def test_every_weight_is_trained_and_scores_get_their_gradient_through_the_fused_token(fuse):
    model = make_model(fuse_inattentive_tokens=fuse)
    output = model(IDS, images(4), MASK)
    output.last_hidden_state.sin().sum().backward(retain_graph=True)
    assert all(parameter.grad is not None for parameter in model.parameters())
    scores = output.selection[0].scores
    gradient = torch.autograd.grad(output.last_hidden_state.sin().sum(), scores, allow_unused=True)[0]
    assert (gradient is not None and gradient.norm() > 1e-4) == fuse


def test_outputs_of_every_layer():
    output = make_model("eager")(IDS, images(4), MASK, output_attentions=True, output_hidden_states=True)
    lengths = [5 + length for length in (17, 17, 10, 7, 7)]  # after the embeddings and after each layer
    assert [states.shape[1] for states in output.hidden_states] == lengths
    assert [tuple(weights.shape) for weights in output.attentions] == [(4, 2, n, n) for n in lengths[:-1]]
    assert output.cross_attentions is None
    assert output.vision_model_output.last_hidden_state.shape == (4, 7, 16)
    for weights in output.attentions:  # nothing attends to padding
        assert weights[..., :5].amax(dim=(1, 2))[MASK == 0].max() == 0


# ---------------------------------------------------------------------------------------------------------------------
# Shapes and graphs


@pytest.mark.parametrize("training", [False, True])
def test_no_shape_depends_on_a_value(training):
    with torch.device("meta"):
        model = TripsSingleStreamModel(make_config().vision_config).train(training)
        output = model(torch.empty(4, 5, 16), torch.empty(4, 3, 16, 16), torch.ones(4, 5))
    assert output.text_states.shape == (4, 5, 16)
    assert output.last_hidden_state.shape == (4, 7, 16)
    assert [entry.kept_indices.shape for entry in output.selection] == [(4, 8), (4, 5)]


def test_one_graph_serves_all_batches_of_a_shape():
    torch._dynamo.reset()
    model, graphs = make_model(), []

    def count_graphs(graph_module, example_inputs):
        graphs.append(graph_module)
        return graph_module.forward

    compiled = torch.compile(model, backend=count_graphs, fullgraph=True)
    with torch.no_grad():
        for order in (torch.tensor([0, 1, 2, 3]), torch.tensor([3, 1, 0, 2])):
            inputs = IDS[order], images(4), MASK[order]
            actual, expected = compiled(*inputs), model(*inputs)
            torch.testing.assert_close(actual.last_hidden_state, expected.last_hidden_state, rtol=1e-4, atol=1e-5)
            assert kept(actual) == kept(expected)
    assert len(graphs) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Heads, saving and loading


def head_inputs(model_class):
    inputs = {"input_ids": IDS, "attention_mask": MASK, "pixel_values": images(4)}
    if model_class is TripsForImagesAndTextClassification:
        return {**inputs, "pixel_values": images(8), "labels": torch.tensor([0, 1, 1, 0])}
    if model_class is TripsForVisualGrounding:
        return {**inputs, "labels": torch.tensor([[0.5, 0.5, 0.2, 0.4]] * 4)}
    return {**inputs, "labels": torch.tensor([[5, 2]] * 4)}


@pytest.mark.parametrize("model_class", HEADS)
def test_heads_are_trained_saved_and_loaded_by_auto_classes(model_class, tmp_path):
    model = make_model(model_class=model_class)
    output = model(**head_inputs(model_class))
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.save_pretrained(tmp_path)
    auto_class = next(
        name for name, models in modeling_trips.registration_trips.MODELS.items() if model_class in models
    )
    loaded = getattr(transformers, auto_class).from_pretrained(tmp_path)
    assert torch.equal(loaded(**head_inputs(model_class)).loss, output.loss)
    base, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(base) is TripsModel and not report["missing_keys"]
    inputs = IDS, images(4), MASK
    assert torch.equal(base(*inputs).last_hidden_state, model.model(*inputs).last_hidden_state)
    part, report = TripsSingleStreamModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    part.save_pretrained(tmp_path / "part")
    assert type(AutoModel.from_pretrained(tmp_path / "part")) is TripsSingleStreamModel
    assert load_file(tmp_path / "part" / "model.safetensors").keys() == part.state_dict().keys()


LOAD_AS_A_STRANGER = """
import sys
from safetensors.torch import load_file, save_file
from transformers import AutoModel

whole, part = (AutoModel.from_pretrained(folder, trust_remote_code=True).eval() for folder in sys.argv[1:3])
assert "modeling_trips" not in sys.modules
results = {f"part.{name}": value for name, value in part.state_dict().items()}
results["states"] = whole(**load_file(sys.argv[3])).last_hidden_state.detach().contiguous()
save_file(results, sys.argv[4])
"""


def test_a_checkpoint_holds_its_code(tmp_path):
    model, inputs = make_model(), {"input_ids": IDS, "pixel_values": images(4), "attention_mask": MASK}
    paths = [str(tmp_path / name) for name in ("whole", "part", "inputs.safetensors", "results.safetensors")]
    model.save_pretrained(paths[0])
    model.vision_model.save_pretrained(paths[1])
    save_file(inputs, paths[2])
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LOAD_AS_A_STRANGER, *paths]  # another process: this one knows the classes
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    results = load_file(paths[3])
    assert torch.equal(results.pop("states"), model(**inputs).last_hidden_state)
    expected = {f"part.{name}": value for name, value in model.vision_model.state_dict().items()}
    assert results.keys() == expected.keys()
    assert all(torch.equal(results[name], value) for name, value in expected.items())


def test_statements_about_two_images_are_those_about_each():
    model = make_model(model_class=TripsForImagesAndTextClassification)
    output = model(IDS, images(8), MASK)
    for image in range(2):
        alone = model.model(IDS, images(8)[image::2], MASK)
        assert [rows[image::2] for rows in kept(output)] == kept(alone)


def test_answers_are_written_from_the_fused_states():
    model = make_model(model_class=TripsForQuestionAnswering)
    answers = model.generate(IDS, pixel_values=images(2), attention_mask=MASK, image_index=INDEX, max_new_tokens=4)
    outputs = model.model(IDS, images(2), MASK, image_index=INDEX)
    given = model.generate(attention_mask=MASK, encoder_outputs=outputs, max_new_tokens=4)
    assert torch.equal(answers, given)


def test_a_vision_tower_gives_a_single_stream_all_but_the_embeddings_of_modalities(tmp_path):
    tower = randomize(TripsVisionModel(make_config().vision_config))
    tower.save_pretrained(tmp_path)
    stream, report = TripsSingleStreamModel.from_pretrained(tmp_path, output_loading_info=True)
    assert report["missing_keys"] == {"modality_embeddings.weight"} and not report["unexpected_keys"]
    weights = stream.state_dict()
    assert all(torch.equal(weights[name], weight) for name, weight in tower.state_dict().items())


def test_a_checkpoint_is_the_same_for_every_selection(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    unpruned, report = TripsModel.from_pretrained(tmp_path, keep_rate=1.0, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert unpruned(IDS, images(4), MASK).vision_model_output.last_hidden_state.shape[1] == 17


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


def test_presets_and_configurations_of_a_single_stream():
    for preset in TripsConfig.presets():
        config = TripsConfig.from_preset(preset, fusion_type="single_stream")
        assert config.fusion_type == config.fusion_encoder_config.fusion_type == "single_stream"
        assert config.text_config.num_hidden_layers == 0
        assert TripsConfig(**config.to_diff_dict()).text_config.num_hidden_layers == 0
    config.fusion_type = "cross_attention"
    assert config.fusion_encoder_config.fusion_type == "cross_attention"


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"text_config": {"hidden_size": 384}}, r"`text_config.hidden_size` must be 768.*got 384"),
        ({"vision_config": {"use_pre_layernorm": True}}, "`vision_config.use_pre_layernorm` must be False"),
    ],
)
def test_parts_that_cannot_be_joined_are_refused(fields, message):
    with pytest.raises(StrictDataclassError, match=message):
        TripsConfig(**fields, fusion_type="single_stream")


def test_two_towers_do_not_become_one_stream_by_chance(tmp_path):
    TripsModel(TripsConfig.from_preset("tiny")).save_pretrained(tmp_path)
    with pytest.raises(StrictDataclassError, match="`text_config.num_hidden_layers` must be 0.*got 1"):
        TripsModel.from_pretrained(tmp_path, fusion_type="single_stream")
    no_layers = {"fusion_type": "single_stream", "text_config": {"num_hidden_layers": 0}}
    model, report = TripsModel.from_pretrained(tmp_path, **no_layers, output_loading_info=True)
    assert report["missing_keys"] == {"vision_model.modality_embeddings.weight"}


@pytest.mark.parametrize("model_class", [TripsForRetrieval, TripsForPreTraining])
def test_features_of_an_image_alone_are_refused(model_class):
    with pytest.raises(ValueError, match=f"{model_class.__name__} compares features.*`fusion_type='cross_attention'`"):
        model_class(make_config())


def test_bad_inputs():
    model = make_model()
    with pytest.raises(ValueError, match="4 texts for 3 images"):
        model(IDS, images(3), MASK)
    with pytest.raises(ValueError, match=r"`image_index` must have shape \(4,\).*got \(1,\)"):
        model(IDS, images(3), MASK, image_index=torch.tensor([0]))
    for wrong in ({}, {"pixel_values": images(4), "prefix": model.encode_images(images(4))}):
        with pytest.raises(ValueError, match="exactly one of `pixel_values` and `prefix`"):
            model(IDS, attention_mask=MASK, **wrong)
    with pytest.raises(ValueError, match="13 tokens, `max_position_embeddings` allows 12"):
        model(torch.ones(4, 13, dtype=torch.long), images(4))
