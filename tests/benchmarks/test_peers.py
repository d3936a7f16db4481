"""The benchmark of peers with tiny models: tokens of shortened ViTs, rows and names."""

import json

import peers
import pytest
import torch
from counting_clock import MEDIAN, CountingClock
from timm.models.vision_transformer import VisionTransformer
from tiny_hosts import NO_DROPOUT, TEXT, VISION
from transformers import BlipConfig, BlipForImageTextRetrieval, BlipForQuestionAnswering

from modeling_trips import TripsVisionModel
from modeling_trips.inspection.speed import CLOCKS


TINY = ["--preset", "tiny", "--image_size", "64", "--schedule", "2,3", "--tower_schedule", "2:image,3:image"]
ONCE = ["--warmup", "0", "--repeats", "1", "--text_length", "6", "--batch_size", "2"]


def make_blip(model_class):
    config = BlipConfig(
        vision_config={**VISION, "image_size": 64},
        text_config={**TEXT, **NO_DROPOUT, "encoder_hidden_size": 32, "vocab_size": 100},
    )
    torch.manual_seed(0)
    model = model_class(config).eval()
    with torch.no_grad():  # answers that depend on the question
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def arguments(**changes) -> peers.PeerArguments:
    fields = {"preset": "tiny", "image_size": 64, "batch_size": 2, "text_length": 6, "schedule": ["2:image,3:image"]}
    return peers.PeerArguments(**{**fields, "tower_schedule": "2:image,3:image", **changes})


def test_blip_answers_match_with_shared_images(monkeypatch):
    scores = {"return_dict_in_generate": True, "output_scores": True}
    monkeypatch.setattr(peers, "ANSWER_LENGTH", {**peers.ANSWER_LENGTH, **scores})
    model, inputs = make_blip(BlipForQuestionAnswering), peers.make_inputs(arguments(), texts_per_image=3)
    repeated, shared = (
        torch.stack(write(model, inputs).scores) for write in (peers.write_answers, peers.write_answers_shared)
    )
    assert repeated.shape == (2, 6, 100)
    torch.testing.assert_close(shared, repeated)
    assert (repeated[0].diff(dim=0).abs().amax(dim=-1) > 1e-3).all()  # they depend on question and image


@torch.no_grad()
def test_blip_scores_match_with_shared_images():
    model, inputs = make_blip(BlipForImageTextRetrieval), peers.make_inputs(arguments(), texts_per_image=3)
    expected = peers.judge(model, inputs)
    assert expected.shape == (6, 2)
    torch.testing.assert_close(peers.judge_shared(model, inputs), expected)


@pytest.fixture
def tiny_vit(monkeypatch):
    """Return a ViT with 64 patches, in place of the base model."""
    sizes = {"img_size": 64, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 0}
    monkeypatch.setattr(peers, "make_vit", lambda args: VisionTransformer(**sizes).eval())
    monkeypatch.setattr(peers, "PATCH_SIZE", 8)


@pytest.mark.parametrize("shorten", [peers.DropTokens, peers.MergeTokens])
def test_reduced_vits_have_as_many_tokens_as_trips(tiny_vit, shorten):
    args, pixel_values = arguments(), torch.randn(2, 3, 64, 64)
    (schedule, _) = args.schedules("tower").values()
    vit = peers.make_shortened_vit(args, shorten).eval()
    num_tokens = peers.make_trips(TripsVisionModel, schedule, args)(pixel_values).last_hidden_state.shape[1]
    assert vit.forward_features(pixel_values).shape[1] == num_tokens == 1 + 33 + 1  # 64 -> 45 + 1 -> 33 + 1


def test_rows_for_all_models_of_a_task(tiny_vit, monkeypatch, tmp_path, capsys):
    for task, model_class in (("answer", BlipForQuestionAnswering), ("match", BlipForImageTextRetrieval)):
        own = {name: peer for name, peer in peers.TASKS[task].peers.items() if name.startswith("blip")}
        for peer in own.values():
            monkeypatch.setattr(peer, "make", lambda args, model_class=model_class: make_blip(model_class))
        monkeypatch.setattr(peers.TASKS[task], "peers", own)
    path = tmp_path / "peers.json"
    monkeypatch.setattr(peers, "find_spec", lambda name: None if name == "tomesd" else name)
    rows = peers.main([*TINY, *ONCE, "--texts_per_image", "1", "3", "--output_json", str(path)])
    assert json.loads(path.read_text()) == rows
    names = [(row["task"], row["texts_per_image"], row["model"]) for row in rows]
    trips = ["TRIPS, 2:text:0.7,3:text:0.7", "TRIPS, unpruned"]
    towers = ["timm-vit", "timm-vit, patch dropout", "timm-vit, TRIPS inside"]
    assert names == [
        *(("answer", texts, name) for texts in (1, 3) for name in ("blip", "blip-shared", *trips)),
        *(("match", texts, name) for texts in (1, 3) for name in ("blip-match", "blip-match-shared", *trips)),
        *(("tower", 1, name) for name in (*towers, "TRIPS, 2:image:0.7,3:image:0.7", "TRIPS, unpruned")),
    ]
    assert all(row["speedup"] == 1 for row in rows if row["model"] == row["compared_with"])
    assert rows[4]["throughput"] == pytest.approx(6 / rows[4]["latency"])
    assert "tomesd" in capsys.readouterr().out


def test_speedups_are_of_medians_over_the_first_model(monkeypatch):
    """Two matrix products, the second with a quarter of the MACs, are timed by their MACs."""
    models = {
        "first": (torch.nn.Linear(12, 40), lambda model, inputs: model(inputs.pixel_values.reshape(-1, 12))),
        "second": (torch.nn.Linear(12, 10), lambda model, inputs: model(inputs.pixel_values.reshape(-1, 12))),
    }
    monkeypatch.setitem(CLOCKS, "process", CountingClock(2))
    args = arguments(clock="process", warmup=1, repeats=5)
    first, second = peers.measure("match", models, 3, args)
    assert (first["model"], second["model"], second["compared_with"]) == ("first", "second", "first")
    assert first["latency"] == MEDIAN * 2 * 3 * 64 * 64 * 40
    assert (first["speedup"], second["speedup"]) == (1, 4)
    assert second["throughput"] == pytest.approx(6 / second["latency"])
    assert (first["num_parameters"], second["num_parameters"]) == (13 * 40, 13 * 10)


def test_unpruned_trips_is_measured(monkeypatch):
    monkeypatch.setattr(peers.TASKS["match"], "peers", {})
    monkeypatch.setitem(CLOCKS, "process", CountingClock(2))
    args = arguments(clock="process", warmup=1, repeats=5, schedule=["2:image:0.5,3:text:0.5"])
    pruned, unpruned = peers.measure("match", peers.make_models("match", args), 1, args)
    assert (pruned["model"], unpruned["model"]) == ("TRIPS, 2:image:0.5,3:text:0.5", "TRIPS, unpruned")
    assert unpruned["speedup"] < 1 == pruned["speedup"]


def test_unknown_names_raise():
    with pytest.raises(ValueError, match="--task.*caption"):
        peers.main(["--task", "caption"])
    with pytest.raises(ValueError, match="--peers.*blip"):
        peers.main(["--task", "tower", "--peers", "blip"])


@pytest.mark.slow
@pytest.mark.parametrize("task", peers.TASKS)
def test_peers_have_base_size(task):
    for name, peer in peers.TASKS[task].peers.items():
        with torch.device("meta"):
            model = peer.make(peers.PeerArguments())
        assert sum(parameter.numel() for parameter in model.parameters()) > 80e6, name
