"""Patch selection inside models of Transformers and timm: against loops over tokens, and without a trace after."""

import copy
import math
import time
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

import benchmark_hosts
import pytest
import torch
import transformers
from accelerate.hooks import ModelHook, add_hook_to_module
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer
from tiny_models import LargestSquare
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    BridgeTowerConfig,
    BridgeTowerForMaskedLM,
    BridgeTowerModel,
    CLIPConfig,
    CLIPForImageClassification,
    CLIPModel,
    PreTrainedModel,
    SiglipConfig,
    SiglipModel,
    ViltConfig,
    ViltForImagesAndTextClassification,
    ViltForMaskedLM,
    ViltForQuestionAnswering,
    ViltModel,
)

from modeling_trips.hosts.apply import apply_patch_selection, record_patch_selection, remove_patch_selection
from modeling_trips.hosts.layers import StandIn, project_rows


# 16 patches -> ceil(.7 * 16) = 12 and 1 fused -> ceil(.7 * 13) = 10 and 1 fused; the third layer doesn't select.
LAYERS, RATE = [1, 2], 0.7
KEPT = [12, 10]
VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 50,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
INPUT_IDS = torch.tensor([[1, 7, 9, 4, 2], [1, 30, 2, 0, 0], [1, 8, 21, 2, 0]])
PIXELS = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
# Images of 32 x 32, 16 x 32 and 32 x 24 pixels, padded: 16, 8 and 12 patches.
PIXEL_MASK = torch.ones(3, 32, 32, dtype=torch.long)
PIXEL_MASK[1, 16:] = 0
PIXEL_MASK[2, :, 24:] = 0


def make_clip(model_class=CLIPModel, **text):
    return model_class(CLIPConfig(vision_config=VISION, text_config={**TEXT, **text}, projection_dim=16))


def make_siglip():
    return SiglipModel(SiglipConfig(vision_config=VISION, text_config={**TEXT, "projection_size": 32}))


def make_blip(model_class: type[PreTrainedModel]):
    text = {**TEXT, **NO_DROPOUT, "encoder_hidden_size": 32, "sep_token_id": 2}
    return model_class(BlipConfig(vision_config=VISION, text_config=text, image_text_hidden_size=16))


def make_bridgetower(model_class=BridgeTowerModel):
    # BridgeTower's heads are 64 wide. The first bridge to the cross-modal layers starts from layer 2.
    vision = {"hidden_size": 64, "num_hidden_layers": 3, "image_size": 32, "patch_size": 8}
    text = {**TEXT, **NO_DROPOUT, "hidden_size": 64, "num_hidden_layers": 3, "max_position_embeddings": 20}
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return model_class(BridgeTowerConfig(vision_config=vision, text_config=text, **sizes))


def make_vilt(model_class=ViltForQuestionAnswering, **options):
    sizes = {**VISION, "vocab_size": 50, "max_position_embeddings": 16, **NO_DROPOUT, **options}
    return model_class(ViltConfig(**sizes))


def make_timm(model_class=VisionTransformer, **options):
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5}
    return model_class(**{**sizes, **options})


class Host(NamedTuple):
    make: Callable[[], nn.Module]
    guidance: str
    inputs: dict[str, torch.Tensor]
    main_output: Callable  # of the model's output: a tensor that depends on all that selection touches

    def make_model(self, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        model = self.make().eval()
        with torch.no_grad():  # attention that differs from head to head, token to token
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
        return model

    def apply(self, model: nn.Module, rate=RATE, **options):
        apply_patch_selection(model, LAYERS, rate, **{"guidance": self.guidance, **options})

    def run(self, model: nn.Module, inputs: dict | None = None) -> torch.Tensor:
        torch.manual_seed(0)  # ViLT draws the order of its patches
        return self.main_output(model(**(self.inputs if inputs is None else inputs)))


PAIRS = {"input_ids": INPUT_IDS, "attention_mask": (INPUT_IDS != 0).long(), "pixel_values": PIXELS}
ANSWERS = {"decoder_input_ids": INPUT_IDS[:, :3], "labels": INPUT_IDS[:, :3]}
HOSTS = {
    "vilt": Host(make_vilt, "text", {**PAIRS, "pixel_mask": PIXEL_MASK}, lambda output: output.logits),
    "blip_vqa": Host(
        lambda: make_blip(BlipForQuestionAnswering), "text", {**PAIRS, **ANSWERS}, lambda output: output.loss[None]
    ),
    "blip_retrieval": Host(
        lambda: make_blip(BlipForImageTextRetrieval), "text", PAIRS, lambda output: output.itm_score
    ),
    "blip_captioning": Host(
        lambda: make_blip(BlipForConditionalGeneration), "image", PAIRS, lambda output: output.logits
    ),
    "bridgetower": Host(make_bridgetower, "image", PAIRS, lambda output: output.pooler_output),
    "clip": Host(make_clip, "image", PAIRS, lambda output: output.logits_per_image),
    "siglip": Host(make_siglip, "image", PAIRS, lambda output: output.logits_per_image),
    "timm": Host(lambda: make_timm(reg_tokens=2), "image", {"x": PIXELS}, lambda output: output),
}
each_host = pytest.mark.parametrize("host", HOSTS.values(), ids=HOSTS)


def kept_by(host: Host, model: nn.Module, inputs: dict | None = None) -> list[torch.Tensor]:
    with torch.no_grad(), record_patch_selection(model) as selections:
        host.run(model, inputs)
    return [selection.kept_indices for selection in selections]


# ---- Against loops -------------------------------------------------------------------------------------------------


def naive_tower(tokens, layers, num_heads, num_prefix, guide, schedule):
    """
    One image through pre-norm layers with selection, token by token, with the whole attention map.

    Args:
        tokens: tensor (n, width). The first `num_prefix` always stay.
        layers: per layer a dict with norm1, norm2 (callables), q, k, v, out ((weight, bias) pairs), mlp (callable) and
            optionally q_norm, k_norm, scale1, scale2 (callables).
        guide: the position of the guiding token, None for the mean of all queries, or a vector.
        schedule: keep rate by layer number.

    Returns:
        The tokens after the last layer, and per selection layer the kept candidates' original numbers, -1 if fused.
    """

    def same(x):
        return x

    numbers, kept_numbers = list(range(len(tokens) - num_prefix)), []
    for number, layer in enumerate(layers, start=1):
        normed = torch.stack([layer["norm1"](token) for token in tokens])
        width = len(normed[0]) // num_heads

        def heads(state, name, layer=layer, width=width):
            weight, bias = layer[name]
            vectors = (weight @ state + bias).split(width)
            return [layer.get(f"{name}_norm", same)(vector) for vector in vectors]

        queries, keys, values = ([heads(state, name) for state in normed] for name in "qkv")
        updated = []
        for i in range(len(tokens)):
            attended = []
            for head in range(num_heads):
                row = torch.stack([queries[i][head] @ key[head] / math.sqrt(width) for key in keys]).softmax(0)
                attended.append(sum(weight * value[head] for weight, value in zip(row, values)))
            weight, bias = layer["out"]
            updated.append(tokens[i] + layer.get("scale1", same)(weight @ torch.cat(attended) + bias))
        tokens = torch.stack(updated)
        if number in schedule:
            if isinstance(guide, torch.Tensor):
                query = heads(guide, "q")
            elif guide is None:
                query = [sum(q[head] for q in queries) / len(queries) for head in range(num_heads)]
            else:
                query = queries[guide]
            scores = torch.zeros(len(tokens) - num_prefix, dtype=tokens.dtype)
            for head in range(num_heads):
                logits = torch.stack([query[head] @ key[head] / math.sqrt(width) for key in keys[num_prefix:]])
                scores = scores + logits.softmax(0) / num_heads
            num_kept = math.ceil(Fraction(str(schedule[number])) * len(scores))
            if num_kept < len(scores):
                ranked = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
                kept, dropped = sorted(ranked[:num_kept]), ranked[num_kept:]
                fused = sum(scores[i] * tokens[num_prefix + i] for i in dropped)
                tokens = torch.stack([*tokens[:num_prefix], *(tokens[num_prefix + i] for i in kept), fused])
                numbers = [*(numbers[i] for i in kept), -1]
                kept_numbers.append(numbers[:-1])
        mlp = torch.stack([layer.get("scale2", same)(layer["mlp"](layer["norm2"](token))) for token in tokens])
        tokens = tokens + mlp
    return tokens, kept_numbers


def pair(linear):
    return linear.weight, linear.bias


def stacked(weight, bias):
    return dict(zip("qkv", zip(weight.chunk(3), bias.chunk(3))))


def parts_of(layer: nn.Module) -> dict:
    """Where each host keeps the parts of a layer (the host's own layer, without selection)."""
    name = type(layer).__name__
    if name in ("CLIPEncoderLayer", "SiglipEncoderLayer"):
        attention = layer.self_attn
        parts = {"q": pair(attention.q_proj), "k": pair(attention.k_proj), "v": pair(attention.v_proj)}
        parts["out"] = pair(attention.out_proj)
        return {**parts, "norm1": layer.layer_norm1, "norm2": layer.layer_norm2, "mlp": layer.mlp}
    if name == "BlipEncoderLayer":
        parts = {**stacked(*pair(layer.self_attn.qkv)), "out": pair(layer.self_attn.projection)}
        return {**parts, "norm1": layer.layer_norm1, "norm2": layer.layer_norm2, "mlp": layer.mlp}
    if name == "BridgeTowerResidualAttention":
        parts = {**stacked(layer.attn.in_proj_weight, layer.attn.in_proj_bias), "out": pair(layer.attn.out_proj)}
        mlp = nn.Sequential(*layer.mlp.values())
        return {**parts, "norm1": layer.ln_1, "norm2": layer.ln_2, "mlp": mlp}
    if name == "ViltLayer":
        attention = layer.attention.attention
        parts = {"q": pair(attention.query), "k": pair(attention.key), "v": pair(attention.value)}
        mlp = nn.Sequential(layer.intermediate, layer.output.dense)
        parts |= {"out": pair(layer.attention.output.dense), "mlp": mlp}
        return {**parts, "norm1": layer.layernorm_before, "norm2": layer.layernorm_after}
    parts = {**stacked(*pair(layer.attn.qkv)), "out": pair(layer.attn.proj)}
    parts |= {"q_norm": layer.attn.q_norm, "k_norm": layer.attn.k_norm, "scale1": layer.ls1, "scale2": layer.ls2}
    return {**parts, "norm1": layer.norm1, "norm2": layer.norm2, "mlp": layer.mlp}


def check_against_loops(tokens, layers, guides, num_prefix, run: Callable[[], torch.Tensor], apply: Callable):
    """`tokens` enter the layers; `run` gives what comes out of the last; `apply` selects. All in float64."""
    model_layers = [parts_of(layer) for layer in layers]
    num_heads = 1 if type(layers[0]).__name__ == "BridgeTowerResidualAttention" else 2
    expected = [
        naive_tower(row, model_layers, num_heads, num_prefix, guide, dict.fromkeys(LAYERS, RATE))
        for row, guide in zip(tokens, guides)
    ]
    model = apply()
    with record_patch_selection(model) as selections:
        actual = run()
    torch.testing.assert_close(actual, torch.stack([states for states, _ in expected]), rtol=0, atol=1e-9)
    for i, selection in enumerate(selections):
        assert selection.kept_indices.tolist() == [kept[i] for _, kept in expected]
        assert selection.kept_indices.shape[1] == KEPT[i]


@torch.no_grad()
@pytest.mark.parametrize("guidance", ["text", "image"])
@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_clip_and_siglip_agree_with_loops(name, guidance):
    model = HOSTS[name].make_model().double()
    tower, pixels, num_prefix = model.vision_model, PIXELS.double(), int(name == "clip")
    tokens = tower.embeddings(pixels)
    tokens = tower.pre_layrnorm(tokens) if name == "clip" else tokens
    texts = torch.randn(3, 32, dtype=torch.float64)
    guides, given = (texts, {"text_embeds": texts}) if guidance == "text" else ([0 if num_prefix else None] * 3, {})

    def apply():
        apply_patch_selection(model, LAYERS, RATE, guidance)
        return model

    def run():
        output = model.get_image_features(pixels, output_hidden_states=True, **given)
        return output.hidden_states[-1]

    check_against_loops(tokens, tower.encoder.layers, guides, num_prefix, run, apply)


@torch.no_grad()
@pytest.mark.parametrize("guidance", ["text", "image"])
def test_blip_agrees_with_loops(guidance):
    """The text's guide is the [CLS] that the contrastive path shows: the text encoder without cross-attention."""
    model = HOSTS["blip_retrieval"].make_model().double()
    tower, inputs = model.vision_model, {**PAIRS, "pixel_values": PIXELS.double()}
    text_states = model(**inputs, use_itm_head=False).question_embeds
    guides = text_states[:, 0] if guidance == "text" else [0] * 3

    def apply():
        apply_patch_selection(model, LAYERS, RATE, guidance)
        return model

    def run():
        return model(**inputs, output_hidden_states=True).hidden_states[-1]

    check_against_loops(tower.embeddings(inputs["pixel_values"]), tower.encoder.layers, guides, 1, run, apply)


@torch.no_grad()
def test_bridgetower_agrees_with_loops():
    model = HOSTS["bridgetower"].make_model().double()
    inputs = {**PAIRS, "pixel_values": PIXELS.double()}
    visual = model.vision_model.visual
    tokens = visual.forward_pre(inputs["pixel_values"]).transpose(0, 1)

    def apply():
        apply_patch_selection(model, LAYERS, RATE, "image")
        return model

    def run():
        return model(**inputs).hidden_states[1][-1].transpose(0, 1)

    check_against_loops(tokens, visual.transformer.resblocks, [0] * 3, 1, run, apply)


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [{}, {"reg_tokens": 2, "qk_norm": True, "init_values": 0.5}, {"class_token": False, "global_pool": "avg"}],
    ids=["plain", "registers, norms and scales", "no class token"],
)
def test_timm_agrees_with_loops(options):
    torch.manual_seed(0)
    model = make_timm(**options).double().eval()
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    model.norm = nn.Identity()
    tokens = model._pos_embed(model.patch_embed(PIXELS.double()))
    guides = [0 if model.has_class_token else None] * 3

    def apply():
        apply_patch_selection(model, LAYERS, RATE, "image")
        return model

    def run():
        return model.forward_features(PIXELS.double())

    check_against_loops(tokens, model.blocks, guides, model.num_prefix_tokens, run, apply)


@torch.no_grad()
@pytest.mark.parametrize("guidance", ["text", "image"])
def test_vilt_agrees_with_loops_over_each_pair_without_its_padding(guidance):
    model = HOSTS["vilt"].make_model().double()
    host = HOSTS["vilt"]
    inputs = {**host.inputs, "pixel_values": PIXELS.double()}
    tower, text_mask = model.vilt, inputs["attention_mask"]
    torch.manual_seed(0)
    states, mask = tower.embeddings(INPUT_IDS, text_mask, None, inputs["pixel_values"], PIXEL_MASK, None, None)
    torch.manual_seed(0)
    _, _, (patch_index, grid) = tower.embeddings.visual_embed(inputs["pixel_values"], PIXEL_MASK, -1)
    layers = [parts_of(layer) for layer in tower.encoder.layer]
    apply_patch_selection(model, LAYERS, RATE, guidance)
    with record_patch_selection(model) as selections:
        actual = tower(**inputs).last_hidden_state
    assert [selection.kept_indices.shape[1] for selection in selections] == KEPT
    for row in range(3):
        length = int(text_mask[row].sum())
        patches = patch_index[row, :, 0] * grid[1] + patch_index[row, :, 1]
        present = [i for i in patches.argsort().tolist() if mask[row, 6 + i]]  # in the order of the grid
        tokens = torch.cat([states[row, :length], states[row, 5:6], states[row, 6:][present]])
        guide = 0 if guidance == "text" else length
        expected, kept = naive_tower(tokens, layers, 2, length + 1, guide, dict.fromkeys(LAYERS, RATE))
        expected = tower.layernorm(expected)
        torch.testing.assert_close(actual[row, :length], expected[:length], rtol=0, atol=1e-9)
        torch.testing.assert_close(actual[row, 5], expected[length], rtol=0, atol=1e-9)
        for selection, positions in zip(selections, kept):
            indices = [-1 if i < 0 else int(patches[present[i]]) for i in positions]
            assert [i for i in selection.kept_indices[row].tolist() if i != -2] == indices


# ---- ViLT's padding ------------------------------------------------------------------------------------------------


def test_a_pair_in_vilt_does_not_feel_how_far_its_batch_is_padded():
    host = HOSTS["vilt"]
    model = host.make_model()
    host.apply(model)
    together, kept_together = host.run(model), kept_by(host, model)
    for row in range(3):
        height, width = int(PIXEL_MASK[row, :, 0].sum()), int(PIXEL_MASK[row, 0].sum())
        alone = {name: tensor[row : row + 1] for name, tensor in host.inputs.items()}
        cropped = {**alone, **{name: alone[name][..., :height, :width] for name in ("pixel_values", "pixel_mask")}}
        further = {**alone, **{name: nn.functional.pad(alone[name], (0, 16, 0, 8)) for name in alone if "pix" in name}}
        for inputs, columns in ((cropped, width // 8), (alone, 4), (further, 6)):
            torch.testing.assert_close(host.run(model, inputs)[0], together[row], rtol=0, atol=1e-5)
            for indices, indices_together in zip(kept_by(host, model, inputs), kept_together):
                assert places(indices[0], columns) == places(indices_together[row], 4)


def places(indices: torch.Tensor, columns: int) -> list[tuple[int, int] | int]:
    """(row, column) of each kept patch, -1 for a fused token; no padding."""
    return [divmod(index, columns) if index >= 0 else index for index in indices.tolist() if index != -2]


def test_padding_is_never_kept_in_front_of_a_patch():
    host = HOSTS["vilt"]
    model = host.make_model()
    host.apply(model)
    with record_patch_selection(model) as selections:
        host.run(model)
    # 16, 8 and 12 patches keep ceil(.7 n), then ceil(.7 (kept + 1)).
    for selection, counts in zip(selections, ([12, 6, 9], [10, 5, 7])):
        assert (selection.kept_indices != -2).sum(dim=1).tolist() == counts
        assert (selection.scores[selection.candidate_indices == -2] == 0).all()
        torch.testing.assert_close(selection.scores.sum(dim=1), torch.ones(3))


def test_vilt_without_anything_to_drop_has_no_fused_token_in_that_row():
    """One row of a single patch: it keeps it, so its fused token must not be attended to."""
    host = HOSTS["vilt"]
    model = host.make_model()
    host.apply(model)
    mask = torch.zeros_like(PIXEL_MASK)
    mask[0], mask[1, :8, :8], mask[2] = 1, 1, 1
    together = host.run(model, {**host.inputs, "pixel_mask": mask})
    alone = {name: tensor[1:2] for name, tensor in {**host.inputs, "pixel_mask": mask}.items()}
    torch.testing.assert_close(host.run(model, alone)[0], together[1], rtol=0, atol=1e-5)


def test_vilt_takes_images_that_were_embedded_before():
    model = make_vilt(ViltModel).eval()
    torch.manual_seed(0)
    image_embeds, _, _ = model.embeddings.visual_embed(PIXELS, torch.ones(3, 32, 32), -1)
    inputs = {"input_ids": INPUT_IDS, "image_embeds": image_embeds, "pixel_mask": torch.ones(3, 17)}
    apply_patch_selection(model, LAYERS, RATE)
    with record_patch_selection(model) as selections:
        actual = model(**inputs)
    expected = model(input_ids=INPUT_IDS, pixel_values=PIXELS)  # the order of the patches plays no part
    torch.testing.assert_close(actual.pooler_output, expected.pooler_output, rtol=0, atol=1e-5)
    assert [selection.kept_indices.shape[1] for selection in selections] == KEPT
    assert selections[0].candidate_indices.tolist() == [list(range(16))] * 3


@pytest.mark.parametrize("return_dict", [True, False])
def test_hidden_states_and_attentions_of_vilt_get_shorter(return_dict):
    model = make_vilt(ViltModel).eval()
    apply_patch_selection(model, LAYERS, RATE)
    outputs = model(**PAIRS, output_hidden_states=True, output_attentions=True, return_dict=return_dict)
    hidden_states, attentions = outputs[2:] if not return_dict else (outputs.hidden_states, outputs.attentions)
    assert [states.shape[1] for states in hidden_states] == [5 + 17, 5 + 14, 5 + 12, 5 + 12]
    assert [weights.shape[-2:] for weights in attentions] == [(22, 22), (19, 19), (17, 17)]
    plain = model(**PAIRS, return_dict=return_dict)
    assert len(plain.to_tuple() if return_dict else plain) == 2  # last hidden state and pooled output


def test_heads_of_vilt_run():
    torch.manual_seed(0)
    masked_lm = make_vilt(ViltForMaskedLM).eval()
    apply_patch_selection(masked_lm, LAYERS, RATE)
    assert masked_lm(**PAIRS).logits.shape == (3, 5, 50)
    two_images = make_vilt(ViltForImagesAndTextClassification, num_images=2, modality_type_vocab_size=3).eval()
    apply_patch_selection(two_images, LAYERS, RATE)
    with record_patch_selection(two_images) as selections:
        output = two_images(**{**PAIRS, "pixel_values": torch.stack([PIXELS, -PIXELS], dim=1)})
    assert output.logits.shape == (3, 2)
    assert [selection.kept_indices.shape[1] for selection in selections] == KEPT * 2  # both passes


# ---- BLIP's text ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["blip_vqa", "blip_retrieval"])
def test_the_text_picks_the_patches_of_blip(name):
    host = HOSTS[name]
    other_text = {**host.inputs, "input_ids": INPUT_IDS.flip(0), "attention_mask": (INPUT_IDS.flip(0) != 0).long()}
    model = host.make_model()
    host.apply(model)
    kept, kept_for_other = kept_by(host, model), kept_by(host, model, other_text)
    assert any(not torch.equal(a, b) for a, b in zip(kept, kept_for_other))
    host.apply(model, guidance="image")
    kept, kept_for_other = kept_by(host, model), kept_by(host, model, other_text)
    assert all(torch.equal(a, b) for a, b in zip(kept, kept_for_other))


def test_blip_takes_its_arguments_by_position():
    host = HOSTS["blip_vqa"]
    model = host.make_model()
    host.apply(model)
    inputs = host.inputs
    names = ("input_ids", "pixel_values", "decoder_input_ids")
    mask = inputs["attention_mask"]
    output = model(*(inputs[name] for name in names), None, mask, labels=inputs["labels"])
    assert torch.equal(output.loss[None], host.run(model))


@pytest.mark.parametrize("guidance", ["text", "image"])
def test_blip_generates_answers_from_the_patches_that_its_forward_pass_keeps(guidance):
    host = HOSTS["blip_vqa"]
    model = host.make_model()
    unpruned = model.generate(**PAIRS, max_new_tokens=8)
    host.apply(model, guidance=guidance)
    with record_patch_selection(model) as selections:
        answers = model.generate(**PAIRS, max_new_tokens=8)
    assert all(torch.equal(a.kept_indices, b) for a, b in zip(selections, kept_by(host, model), strict=True))
    assert torch.equal(model.generate(**PAIRS, max_new_tokens=8), answers)
    listed = model.generate(**{**PAIRS, "input_ids": INPUT_IDS.tolist()}, max_new_tokens=8)
    assert torch.equal(listed, answers)
    remove_patch_selection(model)
    assert torch.equal(model.generate(**PAIRS, max_new_tokens=8), unpruned)
    assert not torch.equal(unpruned, answers)


def test_blip_generates_captions():
    host = HOSTS["blip_captioning"]
    model = host.make_model()
    host.apply(model)
    with record_patch_selection(model) as selections:
        captions = model.generate(PIXELS, max_new_tokens=8)
    assert [selection.kept_indices.shape[1] for selection in selections] == KEPT
    assert torch.equal(model.generate(PIXELS, max_new_tokens=8), captions)
    # Cross-attention over the 12 tokens that are left: one more of them would change what is said.
    model.vision_model.post_layernorm.weight.data.zero_()
    assert not torch.equal(model.generate(PIXELS, max_new_tokens=8), captions)


def test_the_contrastive_image_vector_of_blip_does_not_depend_on_the_text():
    host = HOSTS["blip_retrieval"]
    model = host.make_model()
    host.apply(model)
    states = model(**PAIRS, use_itm_head=False).last_hidden_state
    fewer_texts = model(input_ids=INPUT_IDS[:1], pixel_values=PIXELS, use_itm_head=False)
    assert torch.equal(fewer_texts.last_hidden_state, states) and states.shape[1] == 1 + 10 + 1
    host.apply(model, guidance="image")
    assert torch.equal(model(**PAIRS).last_hidden_state, states)


# ---- What every host must do ---------------------------------------------------------------------------------------


@each_host
def test_a_keep_rate_of_one_changes_no_bit(host):
    model = host.make_model()
    expected = host.run(model)
    host.apply(model, rate=1.0)
    assert torch.equal(host.run(model), expected)
    host.apply(model, rate=[1.0, RATE])  # only the other layer selects
    with record_patch_selection(model) as selections:
        host.run(model)
    assert [selection.kept_indices.shape[1] for selection in selections] == [12]


@each_host
def test_the_sequence_gets_as_short_as_counted(host):
    model = host.make_model()
    host.apply(model)
    assert [indices.shape[1] for indices in kept_by(host, model)] == KEPT
    host.apply(model, fuse_inattentive_tokens=False)  # ceil(.7 * 16) = 12 -> ceil(.7 * 12) = 9
    kept = kept_by(host, model)
    assert [indices.shape[1] for indices in kept] == [12, 9]
    assert not any((indices == -1).any() for indices in kept)


def snapshot(model: nn.Module) -> dict:
    """The identity of every module, of all that it holds and of what its dictionaries hold."""

    def identity(value):
        return id(value), [(key, id(item)) for key, item in value.items()] if isinstance(value, dict) else None

    return {
        name: (id(module), {key: identity(value) for key, value in vars(module).items()})
        for name, module in model.named_modules()
    }


@each_host
def test_removing_selection_leaves_no_trace(host):
    model = host.make_model()
    expected, before = host.run(model), snapshot(model)
    host.apply(model)
    assert not torch.equal(host.run(model), expected)
    kept_by(host, model)
    host.apply(model, rate=0.5)  # replaces the first
    remove_patch_selection(model)
    assert snapshot(model) == before
    assert not any(isinstance(module, StandIn) for module in model.modules())
    assert torch.equal(host.run(model), expected)
    remove_patch_selection(model)  # nothing to remove


@each_host
def test_checkpoints_have_the_same_names_and_load_without_selection(host, tmp_path):
    model = host.make_model()
    expected, parameters = host.run(model), dict(model.named_parameters())
    keys = list(model.state_dict())
    host.apply(model)
    assert list(model.state_dict()) == keys
    named = dict(model.named_parameters())
    assert list(named) == list(parameters) and all(named[name] is parameters[name] for name in named)
    if isinstance(model, PreTrainedModel):
        model.save_pretrained(tmp_path)
        plain = type(model).from_pretrained(tmp_path).eval()
    else:
        plain = host.make_model(seed=1)
        plain.load_state_dict(model.state_dict())
    assert torch.equal(host.run(plain), expected)
    host.apply(plain)
    assert torch.equal(host.run(plain), host.run(model))


@each_host
def test_training_reaches_all_that_it_reached_before(host):
    model = host.make_model().train()

    def loss_of() -> torch.Tensor:
        return (host.run(model) - 1).square().mean()

    def with_gradient() -> set[str]:
        model.zero_grad(set_to_none=True)
        loss_of().backward()
        return {name for name, parameter in model.named_parameters() if parameter.grad is not None}

    before = with_gradient()
    host.apply(model)
    assert with_gradient() >= before
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@each_host
def test_the_order_of_the_batch_plays_no_part(host):
    model = host.make_model()
    host.apply(model)
    order = torch.tensor([2, 0, 1])
    shuffled = {name: tensor[order] for name, tensor in host.inputs.items()}
    for actual, expected in zip(kept_by(host, model, shuffled), kept_by(host, model)):
        assert torch.equal(actual, expected[order])
    actual, expected = host.run(model, shuffled), host.run(model)
    if actual.shape == (3, 3):  # all images against all texts
        expected = expected[order][:, order]
    elif len(expected) == 3:
        expected = expected[order]
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@each_host
def test_a_copy_stands_on_its_own(host):
    model = host.make_model()
    host.apply(model)
    twin = copy.deepcopy(model)
    expected = host.run(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(host.run(twin), expected)
    remove_patch_selection(twin)
    assert not any(isinstance(module, StandIn) for module in twin.modules())
    assert not torch.equal(host.run(twin), expected)


@each_host
def test_bfloat16_keeps_nearly_the_same_patches(host):
    model = host.make_model()
    host.apply(model)
    expected = kept_by(host, model)
    model.to(torch.bfloat16)
    inputs = {name: x.to(torch.bfloat16) if x.is_floating_point() else x for name, x in host.inputs.items()}
    output = host.run(model, inputs)
    assert output.dtype == torch.bfloat16 and output.isfinite().all()
    for actual, indices in zip(kept_by(host, model, inputs), expected):
        common = sum(len(set(a) & set(b)) for a, b in zip(actual.tolist(), indices.tolist()))
        assert common >= 0.8 * sum(len(set(b)) for b in indices.tolist())


def without_checkpoints(name: str) -> bool:
    return name == "bridgetower"  # its vision layers know of none


@pytest.mark.parametrize("name", [name for name in HOSTS if not without_checkpoints(name)])
def test_activation_checkpointing_changes_no_gradient(name):
    host = HOSTS[name]
    model = host.make_model().train()
    host.apply(model)
    layer = next(module for module in model.modules() if isinstance(module, StandIn) and hasattr(module, "selection"))
    norms = [module for module in layer.children() if isinstance(module, nn.LayerNorm)]
    calls = []
    norms[0].register_forward_hook(lambda *_: calls.append(1))

    def gradients() -> dict[str, torch.Tensor]:
        calls.clear()
        model.zero_grad(set_to_none=True)
        host.run(model).square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    assert len(calls) == 1
    if isinstance(model, PreTrainedModel):
        model.activation_checkpointing_enable()
    else:
        model.set_grad_checkpointing()
    actual = gradients()
    assert len(calls) == 2  # the selection layer was run again in the backward pass
    assert actual.keys() == expected.keys()
    for parameter, gradient in actual.items():
        torch.testing.assert_close(gradient, expected[parameter], rtol=0, atol=1e-6)


def test_what_was_set_meanwhile_stays():
    """train or eval and checkpointing, set before or under selection, hold under it and after it."""
    model = HOSTS["clip"].make_model()
    model.activation_checkpointing_enable()
    HOSTS["clip"].apply(model)
    layers = model.vision_model.encoder.layers
    assert layers[0].gradient_checkpointing and not layers[0].training
    model.train()
    model.activation_checkpointing_disable()
    remove_patch_selection(model)
    assert layers[0].training and not layers[0].gradient_checkpointing


SLOW_TO_COMPILE = ("blip_vqa", "blip_retrieval", "blip_captioning", "bridgetower", "siglip")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW_TO_COMPILE else []) for name in HOSTS]
)
def test_compiles_without_a_break_and_only_once(name):
    torch._dynamo.reset()
    host = HOSTS[name]
    model, inputs = host.make_model(), host.inputs
    if name == "vilt":  # ViLT's own embedding of pixels breaks graphs: it loops over values
        inputs = {"input_ids": INPUT_IDS, "image_embeds": torch.randn(3, 17, 32), "pixel_mask": torch.ones(3, 17)}
    host.apply(model)
    graphs = []

    def count_graphs(graph_module, example_inputs):
        graphs.append(graph_module)
        return graph_module.forward

    compiled = torch.compile(model, backend=count_graphs, fullgraph=True)
    with torch.no_grad():
        for factor in (1.0, -1.0):
            batch = {key: x * factor if x.is_floating_point() and x.dim() > 2 else x for key, x in inputs.items()}
            actual, expected = host.main_output(compiled(**batch)), host.run(model, batch)
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    # BLIP's text guidance is a hook, which PyTorch runs ahead of the model, as a graph of its own.
    assert len(graphs) == (2 if name in ("blip_vqa", "blip_retrieval") else 1)


@pytest.mark.parametrize("name", ["vilt", "blip_vqa", "blip_captioning", "clip", "siglip", "timm"])
def test_no_shape_depends_on_a_value(name):
    """Meta tensors have no values, so that a host sync or a data-dependent shape raises on them."""
    host = HOSTS[name]
    model = host.make_model()
    host.apply(model)
    model.to("meta")
    inputs = {"x": PIXELS} if name == "timm" else {"pixel_values": PIXELS}
    if name == "vilt":  # its embedding of pixels syncs by itself
        inputs = {"input_ids": INPUT_IDS, "image_embeds": torch.randn(3, 17, 32), "pixel_mask": torch.ones(3, 17)}
    if name == "blip_vqa":
        inputs["text_embeds"] = torch.randn(3, 32)
    # The towers alone: Transformers looks at the values of the text's mask.
    tower = getattr(model, "vision_model", model)
    output = tower(**{key: tensor.to("meta") for key, tensor in inputs.items()})
    assert (output if name == "timm" else output[0]).is_meta


@pytest.mark.parametrize("name", ["clip", "siglip", "timm"])
def test_no_attention_map_is_formed_where_the_host_forms_none(name):
    host = HOSTS[name]
    model = host.make_model()
    host.apply(model)
    num_prefix = {"clip": 1, "siglip": 0, "timm": 3}[name]
    lengths = {num_prefix + num_candidates for num_candidates in (16, 13, 11)} - {16}  # heads are 16 wide
    for length in lengths:
        with torch.no_grad(), LargestSquare(length) as mode:
            host.run(model)
        assert not mode.found


@pytest.mark.parametrize("name", ["blip_vqa", "blip_captioning", "clip", "siglip"])
@pytest.mark.parametrize("recorded_before", [True, False])
def test_hidden_states_of_the_vision_tower_get_shorter(name, recorded_before):
    """Transformers hooks layers by their class, the first time that anybody asks."""
    model = HOSTS[name].make_model()
    tower, num_prefix = model.vision_model, int(name != "siglip")
    if recorded_before:
        tower(PIXELS, output_hidden_states=True)
    HOSTS[name].apply(model)
    lengths = [num_prefix + length for length in (16, 13, 11, 11)]
    assert [states.shape[1] for states in tower(PIXELS, output_hidden_states=True).hidden_states] == lengths
    remove_patch_selection(model)
    hidden_states = tower(PIXELS, output_hidden_states=True).hidden_states
    assert [states.shape[1] for states in hidden_states] == [num_prefix + 16] * 4


# ---- Text that is given, projections, other heads ------------------------------------------------------------------


def test_the_guiding_text_gets_its_gradient_through_the_fused_token():
    model = HOSTS["clip"].make_model()
    text_embeds = torch.randn(3, 32, requires_grad=True)
    for fuses in (True, False):
        apply_patch_selection(model, LAYERS, RATE, "text", fuse_inattentive_tokens=fuses)
        features = model.get_image_features(PIXELS, text_embeds=text_embeds).pooler_output
        (gradient,) = torch.autograd.grad(features.square().sum(), text_embeds, allow_unused=True)
        assert (gradient is not None and bool((gradient.abs().amax(dim=1) > 0).all())) == fuses


def test_without_a_text_the_image_guides_itself():
    host = HOSTS["clip"]
    model = host.make_model()
    host.apply(model, guidance="image")
    expected = host.run(model)
    host.apply(model, guidance="text")
    assert torch.equal(host.run(model), expected)


@pytest.mark.parametrize("model_class", [VisionTransformer, VisionTransformerDistilled])
def test_registers_and_distillation_tokens_of_timm_always_stay(model_class):
    model = make_timm(model_class, **({"reg_tokens": 3} if model_class is VisionTransformer else {})).eval()
    apply_patch_selection(model, LAYERS, RATE, "image")
    assert model.forward_features(PIXELS).shape[1] == model.num_prefix_tokens + 10 + 1
    with torch.no_grad():  # the prefix after a layer that changes no token is the prefix before it
        for parameter in model.blocks.parameters():
            parameter.zero_()
    model.norm = nn.Identity()
    prefix = model.forward_features(PIXELS)[:, : model.num_prefix_tokens]
    remove_patch_selection(model)
    assert torch.equal(prefix, model.forward_features(PIXELS)[:, : model.num_prefix_tokens])


def test_a_head_of_bridgetower_runs():
    torch.manual_seed(0)
    model = make_bridgetower(BridgeTowerForMaskedLM).eval()
    apply_patch_selection(model, [1], RATE, "image")
    assert model(**PAIRS).logits.shape == (3, 5, 50)


def test_rows_of_a_projection_are_those_of_the_whole():
    class Adapted(nn.Linear):
        def forward(self, states):
            return 2 * super().forward(states) + 1

    states = torch.randn(4, 6)
    for linear in (nn.Linear(6, 9), nn.Linear(6, 9, bias=False), Adapted(6, 9)):
        torch.testing.assert_close(project_rows(linear, states, 3, 6), linear(states)[:, 3:6])


def test_recorded_numbers_are_those_of_the_original_grid():
    """Of 16 patches 2 stay, and of these and the fused token 1."""
    model = HOSTS["timm"].make_model()
    apply_patch_selection(model, LAYERS, 0.1, "image")
    with record_patch_selection(model) as selections:
        model(PIXELS)
        model(PIXELS)
    first, second, *again = selections
    for selection, other in zip((first, second), again, strict=True):
        assert torch.equal(selection.candidate_indices, other.candidate_indices)
    for row in range(3):
        best = first.scores[row].topk(2).indices.sort().values
        assert first.kept_indices[row].tolist() == best.tolist()
        assert second.candidate_indices[row].tolist() == [*best.tolist(), -1]
        assert second.kept_indices[row, 0] == second.candidate_indices[row][second.scores[row].argmax()]


# ---- Errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make_model",
    [
        lambda: BertModel(BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)),
        lambda: make_clip(CLIPForImageClassification),
        lambda: nn.Linear(2, 2),
    ],
)
def test_a_model_that_is_not_supported_gets_the_list_of_those_that_are(make_model):
    model = make_model()
    with pytest.raises(TypeError) as error:
        apply_patch_selection(model, [1])
    assert f"does not support {type(model).__name__}" in str(error.value)
    for name in (
        "ViltModel and all of its heads",
        "BlipForQuestionAnswering",
        "BridgeTowerModel",
        "CLIPModel",
        "SiglipModel",
        "timm",
    ):
        assert name in str(error.value)


@pytest.mark.parametrize(
    ("layers", "rate", "message"),
    [
        ([0], 0.7, r"lie in 1\.\.3, got \[0\]"),
        ([2, 4], 0.7, r"lie in 1\.\.3, got \[2, 4\]"),
        ([2, 1], 0.7, "ascending"),
        ([1, 1], 0.7, "without repetition"),
        ([1, 2], [0.7], "one number or one per selection layer"),
        ([1, 2], [0.7, 0.0], r"\(0, 1\], got \[0.7, 0.0\]"),
        ([1], 1.5, r"\(0, 1\], got 1.5"),
    ],
)
def test_a_schedule_that_does_not_fit_is_refused_and_changes_nothing(layers, rate, message):
    host = HOSTS["clip"]
    model = host.make_model()
    host.apply(model)
    expected = host.run(model)
    with pytest.raises(ValueError, match=message):
        apply_patch_selection(model, layers, rate, "image")
    assert torch.equal(host.run(model), expected)


def test_bridgetower_cannot_select_behind_its_first_bridge():
    with pytest.raises(ValueError, match=r"lie in 1\.\.2, got \[1, 3\]. Layers 3 on are tied"):
        apply_patch_selection(make_bridgetower(), [1, 3], RATE, "image")


@pytest.mark.parametrize(
    ("make_model", "reason"),
    [
        (lambda: make_blip(BlipForConditionalGeneration), "causal decoder"),
        (make_bridgetower, "nothing but image tokens"),
        (lambda: make_clip(hidden_size=16), "text is 16 wide and its vision tower 32"),
        (make_timm, "takes pixels only"),
    ],
)
def test_where_the_text_cannot_guide_an_error_says_why(make_model, reason):
    model = make_model()
    with pytest.raises(ValueError, match=f'{reason}.*guidance="image"'):
        apply_patch_selection(model, LAYERS)
    with pytest.raises(ValueError, match='must be "text" or "image", got \'words\''):
        apply_patch_selection(model, LAYERS, guidance="words")


def test_a_text_that_does_not_fit_is_refused():
    model = HOSTS["clip"].make_model()
    apply_patch_selection(model, LAYERS, RATE, "text")
    for shape in [(3, 16), (2, 32), (3, 5, 32)]:
        with pytest.raises(ValueError, match=r"must have shape \(3, 32\)"):
            model.get_image_features(PIXELS, text_embeds=torch.zeros(shape))
    apply_patch_selection(model, LAYERS, RATE, "image")
    with pytest.raises(ValueError, match="applied with guidance='image'"):
        model.get_image_features(PIXELS, text_embeds=torch.zeros(3, 32))


def test_layers_that_selection_does_not_know_are_refused():
    with pytest.raises(TypeError, match="Layer 1 is of class ParallelScalingBlock; patch selection knows Block"):
        apply_patch_selection(make_timm(block_fn=ParallelScalingBlock), LAYERS, RATE, "image")
    with pytest.raises(TypeError, match="has DiffAttention for its attention"):
        apply_patch_selection(make_timm(attn_layer="diff"), LAYERS, RATE, "image")
    model = make_timm()
    apply_patch_selection(model, LAYERS, RATE, "image")
    with pytest.raises(ValueError, match="no `attn_mask`"):
        model(PIXELS, attn_mask=torch.ones(17, 17, dtype=torch.bool))


def test_layers_whose_forward_pass_was_taken_over_are_refused():
    model = HOSTS["clip"].make_model()
    add_hook_to_module(model.vision_model.encoder.layers[0], ModelHook())
    with pytest.raises(ValueError, match="Layer 1 does not run its own code.*forward.*before Accelerate"):
        HOSTS["clip"].apply(model)
    model = HOSTS["clip"].make_model()
    model.vision_model.encoder.layers[1].compile()
    with pytest.raises(ValueError, match="Layer 2 does not run its own code.*_compiled_call_impl"):
        HOSTS["clip"].apply(model)
    model = HOSTS["clip"].make_model()
    HOSTS["clip"].apply(model)
    add_hook_to_module(model.vision_model.encoder.layers[0], ModelHook())
    with pytest.raises(ValueError, match="remove that first"):
        remove_patch_selection(model)


def test_there_must_be_something_to_record():
    model = HOSTS["clip"].make_model()
    with pytest.raises(ValueError, match="no selection layers: call `apply_patch_selection` first"):
        with record_patch_selection(model):
            pass
    HOSTS["clip"].apply(model)
    with pytest.raises(RuntimeError, match="Nothing was recorded"):
        with record_patch_selection(model):
            pass


# ---- The benchmark -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clock", ["wall", "process"])
def test_the_benchmark_counts_what_a_formula_says(monkeypatch, tmp_path, clock):
    """One layer after another of a ViT of width 32 with 17 tokens, of which 14 go on after layer 1 and 12 after 2."""
    case = benchmark_hosts.Case(
        lambda image_size: make_timm(img_size=image_size), selection_layers=(1, 2), takes_text=False
    )
    monkeypatch.setitem(benchmark_hosts.CASES, "tiny", case)
    path = tmp_path / "hosts.json"
    arguments = [
        "--hosts",
        "tiny",
        "--image_size",
        "32",
        "--repeats",
        "2",
        "--clock",
        clock,
        "--output_json",
        str(path),
    ]
    (row,) = benchmark_hosts.main(arguments)
    d, mlp = 32, 128

    def macs(tokens: list[tuple[int, int]]) -> int:
        layers = sum(4 * n * d * d + 2 * n * n * d + 2 * m * d * mlp for n, m in tokens)
        # Each selection: the keys of n - 1 candidates once more, the query of [CLS], the weighted sum.
        selection = sum((n - 1) * d * d + d * d + (n - 1) * d for n, m in tokens if n != m)
        return 16 * 3 * 8 * 8 * d + layers + selection + 5 * d

    assert row["unpruned_macs"] == 2 * macs([(17, 17)] * 3)
    assert row["macs"] == 2 * macs([(17, 14), (14, 12), (12, 12)])
    assert (row["unpruned_image_tokens"], row["image_tokens"]) == (17, 12)
    assert row["time_ratio"] == pytest.approx(row["latency"] / row["unpruned_latency"])
    assert path.exists()
    with pytest.raises(ValueError, match="--hosts must be of vilt, .*, got word2vec"):
        benchmark_hosts.main(["--hosts", "word2vec"])
    with pytest.raises(ValueError, match="--clock must be of wall, process, and wall on cuda: got process"):
        benchmark_hosts.main(["--clock", "process", "--device", "cuda"])


def test_processor_time_does_not_count_waiting():
    assert benchmark_hosts.processor_time(lambda: time.sleep(0.2), "cpu") < 0.1
    assert benchmark_hosts.processor_time(lambda: sum(range(10**6)), "cpu") > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in benchmark_hosts.CASES if name != "vilt"])
def test_every_host_of_the_benchmark_has_base_size(name):
    case = benchmark_hosts.CASES[name]
    with torch.device("meta"):
        model = case.make_model(384)
    apply_patch_selection(model, case.selection_layers, RATE, case.guidance)
    assert sum(parameter.numel() for parameter in model.parameters()) > 85e6
    assert transformers.__version__
