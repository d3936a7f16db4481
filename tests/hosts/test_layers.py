"""The selection layer: against loops over tokens, and its parts."""

import pytest
import torch
from naive_reference import naive_layers
from schedules import schedule_of
from timm.models.deit import VisionTransformerDistilled
from tiny_hosts import HOSTS, INPUT_IDS, KEPT, LAYERS, PAIRS, PIXELS, RATE, make_timm
from tiny_models import LargestSquare, compile_and_count, enable_checkpointing, gradients_of
from torch import nn
from torch.testing import assert_close
from transformers import PreTrainedModel

from modeling_trips.hosts import apply_patch_selection, record_patch_selection
from modeling_trips.hosts.layers import ModuleWrapper, project_rows


SLOW_TO_COMPILE = ("vilt", "clip", "blip_vqa")
each_guidance = pytest.mark.parametrize("guidance", ["text", "image", ["image", "text"], ["text", "image"]], ids=str)


def pair(linear):
    return linear.weight, linear.bias


def stacked(weight, bias):
    return dict(zip("qkv", zip(weight.chunk(3), bias.chunk(3))))


def parts_of(layer):
    """Return the parts of a layer of each patched model, before patching."""
    name = type(layer).__name__
    if name in ("CLIPEncoderLayer", "SiglipEncoderLayer"):
        return {
            "norm1": layer.layer_norm1,
            "q": pair(layer.self_attn.q_proj),
            "k": pair(layer.self_attn.k_proj),
            "v": pair(layer.self_attn.v_proj),
            "o": pair(layer.self_attn.out_proj),
            "norm2": layer.layer_norm2,
            "mlp": layer.mlp,
        }
    if name == "BlipEncoderLayer":
        return {
            "norm1": layer.layer_norm1,
            **stacked(*pair(layer.self_attn.qkv)),
            "o": pair(layer.self_attn.projection),
            "norm2": layer.layer_norm2,
            "mlp": layer.mlp,
        }
    if name == "BridgeTowerResidualAttention":
        return {
            "norm1": layer.ln_1,
            **stacked(layer.attn.in_proj_weight, layer.attn.in_proj_bias),
            "o": pair(layer.attn.out_proj),
            "norm2": layer.ln_2,
            "mlp": nn.Sequential(*layer.mlp.values()),
        }
    return {
        "norm1": layer.norm1,
        **stacked(*pair(layer.attn.qkv)),
        "q_norm": layer.attn.q_norm,
        "k_norm": layer.attn.k_norm,
        "o": pair(layer.attn.proj),
        "scale1": layer.ls1,
        "norm2": layer.norm2,
        "mlp": layer.mlp,
        "scale2": layer.ls2,
    }


def check_against_loops(model, guidance, tokens, layers, guides, num_prefix, run):
    """Compare `run` with selection and loops over `tokens`, the input of the layers, in float64."""
    model_layers = [parts_of(layer) for layer in layers]
    num_heads = 1 if type(layers[0]).__name__ == "BridgeTowerResidualAttention" else 2
    schedule = dict.fromkeys(LAYERS, RATE)
    expected_states = []
    expected_kept = []
    for row, row_guides in zip(tokens, guides):
        states, selections = naive_layers(row, model_layers, num_heads, num_prefix, row_guides, schedule)
        expected_states.append(states)
        expected_kept.append([kept for kept, *_ in selections])
    apply_patch_selection(model, schedule_of(LAYERS, RATE, guidance))
    with record_patch_selection(model) as selections:
        actual = run()
    assert_close(actual, torch.stack(expected_states), rtol=0, atol=1e-9)
    for i, selection in enumerate(selections):
        assert selection.kept_indices.tolist() == [kept[i] for kept in expected_kept]
        assert selection.kept_indices.shape[1] == KEPT[i]
    assert selections[1].candidate_indices.tolist() == [[*kept[0], -1] for kept in expected_kept]


def guides_of(guidance, text_guide, image_guide):
    """Return the guide of each selection layer, from the guides of a text and its image."""
    each = guidance if isinstance(guidance, list) else [guidance] * len(LAYERS)
    return {layer: text_guide if who == "text" else image_guide for layer, who in zip(LAYERS, each)}


@torch.no_grad()
@each_guidance
@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_clip_and_siglip_agree_with_loops(name, guidance):
    model = HOSTS[name].make_model().double()
    tower = model.vision_model
    pixels = PIXELS.double()
    texts = torch.randn(3, 32, dtype=torch.float64)
    tokens = tower.embeddings(pixels)
    if name == "clip":
        tokens = tower.pre_layrnorm(tokens)
        guides = [guides_of(guidance, text, 0) for text in texts]
    else:  # without [CLS]
        guides = [guides_of(guidance, text, None) for text in texts]

    def run():
        text_embeds = texts if "text" in guidance else None
        output = model.get_image_features(pixels, text_embeds=text_embeds, output_hidden_states=True)
        return output.hidden_states[-1]

    check_against_loops(model, guidance, tokens, tower.encoder.layers, guides, int(name == "clip"), run)


@torch.no_grad()
@each_guidance
def test_blip_agrees_with_loops(guidance):
    """The text's guide is the [CLS] of the contrastive path: the text encoder without cross-attention."""
    model = HOSTS["blip_retrieval"].make_model().double()
    tower = model.vision_model
    inputs = {**PAIRS, "pixel_values": PIXELS.double()}
    text_states = model(**inputs, use_itm_head=False).question_embeds
    guides = [guides_of(guidance, states[0], 0) for states in text_states]

    def run():
        return model(**inputs, output_hidden_states=True).hidden_states[-1]

    tokens = tower.embeddings(inputs["pixel_values"])
    check_against_loops(model, guidance, tokens, tower.encoder.layers, guides, 1, run)


@torch.no_grad()
def test_bridgetower_agrees_with_loops():
    model = HOSTS["bridgetower"].make_model().double()
    inputs = {**PAIRS, "pixel_values": PIXELS.double()}
    visual = model.vision_model.visual
    tokens = visual.forward_pre(inputs["pixel_values"]).transpose(0, 1)

    def run():
        return model(**inputs).hidden_states[1][-1].transpose(0, 1)

    guides = [dict.fromkeys(LAYERS, 0)] * 3
    check_against_loops(model, "image", tokens, visual.transformer.resblocks, guides, 1, run)


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {"reg_tokens": 2, "qk_norm": True, "init_values": 0.5},
        {"class_token": False, "global_pool": "avg"},
        {"model_class": VisionTransformerDistilled},
    ],
    ids=["registers, norms and scales", "no class token", "distilled"],
)
def test_timm_agrees_with_loops(options):
    torch.manual_seed(0)
    model = make_timm(**options).double().eval()
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    model.norm = nn.Identity()
    tokens = model._pos_embed(model.patch_embed(PIXELS.double()))
    guides = [dict.fromkeys(LAYERS, 0 if model.has_class_token else None)] * 3

    check_against_loops(
        model,
        "image",
        tokens,
        model.blocks,
        guides,
        model.num_prefix_tokens,
        run=lambda: model.forward_features(PIXELS.double()),
    )


def test_a_part_matches_the_whole_projection():
    class Adapted(nn.Linear):
        def forward(self, states):
            return 2 * super().forward(states) + 1

    states = torch.randn(4, 6)
    for linear in (nn.Linear(6, 9), nn.Linear(6, 9, bias=False), Adapted(6, 9)):
        assert_close(project_rows(linear, slice(3, 6), states), linear(states)[:, 3:6])


def test_text_embeds_get_a_gradient_through_the_fused_token():
    model = HOSTS["clip"].make_model()
    text_embeds = torch.randn(3, 32, requires_grad=True)
    apply_patch_selection(model, schedule_of(LAYERS, RATE, "text"))
    features = model.get_image_features(PIXELS, text_embeds=text_embeds).pooler_output
    (gradient,) = torch.autograd.grad(features.square().sum(), text_embeds)
    assert (gradient.abs().amax(dim=1) > 0).all()


def test_selection_computes_no_attention_map():
    model = HOSTS["clip"].make_model()
    HOSTS["clip"].apply(model)
    for num_candidates in (16, 13, 11):
        with torch.no_grad(), LargestSquare(1 + num_candidates) as mode:
            HOSTS["clip"].run(model)
        assert not mode.found


@pytest.mark.parametrize("name", ["timm", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_TO_COMPILE)])
def test_compiles_once_without_graph_breaks(name):
    torch._dynamo.reset()
    host = HOSTS[name]
    model = host.make_model()
    inputs = host.inputs
    if name == "vilt":  # ViLT's pixel embedding loops over values, which breaks graphs
        inputs = {"input_ids": INPUT_IDS, "image_embeds": torch.randn(3, 17, 32), "pixel_mask": torch.ones(3, 17)}
    host.apply(model)
    compiled, graphs = compile_and_count(model)
    image = next(key for key in inputs if key in ("x", "pixel_values", "image_embeds"))
    with torch.no_grad():
        for batch in (inputs, {**inputs, image: -inputs[image]}):
            actual = host.main_output(compiled(**batch))
            assert_close(actual, host.run(model, batch), rtol=0, atol=1e-5)
    assert len(graphs) == (2 if name == "blip_vqa" else 1)  # text guidance is a hook, a graph of its own


@pytest.mark.parametrize("name", [name for name in HOSTS if name != "bridgetower"])  # which does not support it
def test_activation_checkpointing_changes_no_gradient(name):
    host = HOSTS[name]
    model = host.make_model().train()
    host.apply(model)
    layer = next(part for part in model.modules() if isinstance(part, ModuleWrapper) and hasattr(part, "selection"))
    norm = next(part for part in layer.children() if isinstance(part, nn.LayerNorm))
    calls = []
    norm.register_forward_hook(lambda *_: calls.append(1))
    gradients = []
    for num_calls in (1, 3):  # the selection layer runs again in the second backward pass
        model.zero_grad(set_to_none=True)
        host.run(model).square().mean().backward()
        assert len(calls) == num_calls
        gradients.append(gradients_of(model))
        if isinstance(model, PreTrainedModel):
            enable_checkpointing(model)
        else:
            model.set_grad_checkpointing()
    assert_close(gradients[1], gradients[0], rtol=0, atol=1e-6)
