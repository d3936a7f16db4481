"""Selection in vision-language models: chat pipelines, Trainer, guides and scorers."""

import PIL.Image
import pytest
import torch
import transformers
from tiny_vlm_processors import conversation, make_llava_processor
from tiny_vlms import BY_NAME, IMAGE, make_inputs
from torch import nn
from transformers import Trainer, TrainingArguments, pipeline

from modeling_trips.hosts import (
    TextGuide,
    apply_patch_selection,
    prune_inputs,
    record_patch_selection,
    remove_patch_selection,
)
from modeling_trips.hosts.layers import score_states
from modeling_trips.hosts.vlm.scoring import SCORERS, pool, select_by_prompt, select_diverse
from modeling_trips.patch_selection import score_tokens


def test_the_pipeline_takes_chat_messages():
    model, processor = BY_NAME["llava"].make(), make_llava_processor()
    processor.tokenizer.padding_side = "left"
    image = PIL.Image.new("RGB", (40, 30), "red")
    messages = [conversation(text, image) for text in ("what is it ?", "red ?")]
    apply_patch_selection(model, "1:image:0.5", visual_tokens=8)
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    options = {"max_new_tokens": 4, "do_sample": False}
    results = pipe(messages, return_full_text=False, batch_size=2, generate_kwargs=options)
    for result, message in zip(results, messages):
        inputs = processor.apply_chat_template(
            message, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
        )
        sequence = model.generate(**inputs, **options)
        new = processor.batch_decode(sequence[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert result[0]["generated_text"].strip() == new[0].strip() != ""


def test_trainer_trains_and_evaluates(tmp_path):
    vlm = BY_NAME["llava"]
    model = vlm.make()
    rows = []
    for seed in range(4):
        row = {name: value[0] for name, value in make_inputs(vlm, [1], seed=seed).items()}
        row["labels"] = row["input_ids"].masked_fill(torch.arange(len(row["input_ids"])) < 70, -100)
        rows.append(row)
    apply_patch_selection(model, "1:image:0.5", visual_tokens=8)
    arguments = TrainingArguments(
        tmp_path, max_steps=8, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[], use_cpu=True,
        prediction_loss_only=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 0.5
    trainer.save_model(tmp_path / "saved")
    loaded = type(model).from_pretrained(tmp_path / "saved").eval()
    remove_patch_selection(model)
    inputs = make_inputs(vlm)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, model.eval()(**inputs).logits)


def test_a_guide_is_saved_and_loaded(tmp_path):
    vlm = BY_NAME["paligemma"]
    model, inputs = vlm.make().requires_grad_(False), make_inputs(vlm, [1, 1])
    guide = TextGuide.for_model(model, layer=1)
    apply_patch_selection(model, "1:text:0.3", guide=guide)
    guide.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"config.json", "model.safetensors"}
    loaded = TextGuide.from_pretrained(tmp_path)
    assert (loaded.text_hidden_size, loaded.layer) == (32, 1)
    expected = model(**inputs).logits
    apply_patch_selection(model, "1:text:0.3", guide=loaded)
    assert torch.equal(model(**inputs).logits, expected)


@pytest.mark.parametrize(
    ("guide", "name"),
    [
        (TextGuide(32, 2, 16), "heads"),
        (TextGuide(64, 4, 8), "text_hidden_size"),
        (TextGuide(32, 4, 8, layer=2), "layer"),
    ],
)
def test_guides_of_other_models_and_layers_raise(guide, name):
    with pytest.raises(ValueError, match=name):
        apply_patch_selection(BY_NAME["llava"].make(), "1:text:0.3", guide=guide)


def test_guides_move_to_the_device_of_the_model():
    guide = TextGuide(32, 4, 8)
    apply_patch_selection(BY_NAME["llava"].make().to("meta"), "1:text:0.3", guide=guide)
    assert guide.query.weight.device.type == "meta"


# ---- Scorers -------------------------------------------------------------------------------------------------------


def test_relevance_and_distance_by_hand():
    # Three pairs of equal tokens. The prompt is close to the first pair, less so to the second.
    features = torch.tensor([[[4.0, 0, 0], [4, 0, 0], [0, 3, 0], [0, 3, 0], [0, 0, 2], [0, 0, 2]]])
    prompt, mask = torch.tensor([[[1.0, 0.4, 0], [0, 0, 1]]]), torch.tensor([[True, False]])
    kept, chosen = select_by_prompt(features, prompt, mask, 2)
    assert kept.tolist() == [[0, 2]] and torch.equal(chosen, features[:, [0, 2]])
    kept, _ = select_by_prompt(features, prompt, mask, 1)
    assert kept.tolist() == [[0]]
    assert select_by_prompt(features, prompt, torch.tensor([[True, True]]), 2)[0].tolist() == [[0, 4]]


@torch.no_grad()
def test_empty_prompt():
    model = BY_NAME["llava"].make()
    inputs = {"input_ids": torch.full((1, 64), IMAGE), "pixel_values": torch.randn(1, 3, 32, 32)}
    apply_patch_selection(model, "1:text:0.5", visual_tokens=5, guide=TextGuide.for_model(model))
    logits = model(**inputs).logits
    assert logits.shape[1] == 5 and logits.isfinite().all()


def test_diversity_keeps_one_token_of_each_kind():
    features = torch.eye(4)[torch.tensor([[0, 0, 1, 1, 2, 2, 3, 3]])] * torch.tensor([5.0, 4, 3, 2])
    kept, _ = select_diverse(features, features, torch.ones(1, 8, dtype=torch.bool), 4)
    assert sorted(kept[0].floor_divide(2).tolist()) == [0, 1, 2, 3]


def test_pooling_averages_cells():
    features = torch.arange(16.0).reshape(1, 16, 1)
    kept, pooled = pool(features, features, None, 4)
    assert kept.tolist() == [[5, 7, 13, 15]] and pooled[0, :, 0].tolist() == [2.5, 4.5, 10.5, 12.5]
    with pytest.raises(ValueError):
        pool(features[:, :15], features, None, 4)


@pytest.mark.parametrize("name", SCORERS)
@torch.no_grad()
def test_every_scorer_keeps_the_given_number(name):
    vlm = BY_NAME["llava"]
    model, inputs = vlm.make(), make_inputs(vlm, [1, 1])
    pruned = prune_inputs(model, inputs, visual_tokens=9, scorer=name)
    assert (pruned["input_ids"] == IMAGE).sum(dim=1).tolist() == [9, 9]
    assert model(**pruned).logits.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_score_states_matches_score_tokens(dtype):
    torch.manual_seed(0)
    layer = nn.Linear(24, 3 * 24, dtype=dtype)
    states, query = torch.randn(2, 7, 24).to(dtype), torch.randn(2, 4, 6).to(dtype)
    rows = slice(24, 48)
    key = nn.functional.linear(states.float(), layer.weight[rows].float(), layer.bias[rows].float())
    expected = score_tokens(query.float(), key.unflatten(-1, (4, 6)).transpose(1, 2), 0.4)
    torch.testing.assert_close(score_states(query, states, layer.weight[rows], 0.4), expected)


@pytest.mark.parametrize("name", ["Blip2", "InstructBlip"])
@torch.no_grad()
def test_towers_of_q_former_models_select(name):
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 37}
    text = {"model_type": "opt", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 32}
    config = getattr(transformers, f"{name}Config")(
        vision_config={**sizes, "image_size": 32, "patch_size": 4},
        qformer_config={**sizes, "encoder_hidden_size": 32},
        text_config={**text, "vocab_size": 99, "word_embed_proj_dim": 32},
        num_query_tokens=3,
        image_token_id=IMAGE,
    )
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
    nn.init.normal_(model.query_tokens)
    for parameter in model.qformer.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    ids = torch.tensor([[IMAGE, IMAGE, IMAGE, 5, 6]])
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 32, 32)}
    if name == "InstructBlip":
        inputs["qformer_input_ids"] = torch.tensor([[5, 6]])
    expected = model(**inputs).logits
    apply_patch_selection(model.vision_model, "1:image:0.5")
    with record_patch_selection(model.vision_model) as selections:
        logits = model(**inputs).logits
    assert selections[0].kept_indices.shape == (1, 32) and logits.shape == expected.shape
    assert not torch.equal(logits, expected)
    remove_patch_selection(model.vision_model)
    assert torch.equal(model(**inputs).logits, expected)
