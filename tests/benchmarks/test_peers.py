"""The benchmark of peers with tiny models: tokens of shortened ViTs, rows and names."""

import json

import peers
import pytest
import tiny_hosts
import torch
from timm.models.vision_transformer import VisionTransformer
from tiny_hosts import Host
from transformers import BlipForImageTextRetrieval, BlipForQuestionAnswering

from modeling_trips import TripsVisionModel


TINY = ["--preset", "tiny", "--image_size", "64", "--schedule", "2,3", "--tower_schedule", "2:image,3:image"]
ONCE = ["--warmup", "0", "--repeats", "1", "--text_length", "6", "--batch_size", "2"]


def make_blip(model_class):
    host = Host(lambda: tiny_hosts.make_blip(model_class, image_size=64, vocab_size=100), "text", {}, None)
    return host.make_model()


def arguments(**changes) -> peers.PeerArguments:
    fields = {"preset": "tiny", "image_size": 64, "batch_size": 2, "text_length": 6, "schedule": ["2:image,3:image"]}
    return peers.PeerArguments(**{**fields, "tower_schedule": "2:image,3:image", **changes})


def test_blip_answers_match_with_shared_images(monkeypatch):
    scores = {"return_dict_in_generate": True, "output_scores": True}
    monkeypatch.setattr(peers, "ANSWER_LENGTH", {**peers.ANSWER_LENGTH, **scores})
    model, inputs = make_blip(BlipForQuestionAnswering), peers.make_inputs(arguments(), texts_per_image=3)
    repeated, shared = (
        torch.stack(write(model, inputs).scores) for write in (peers.generate_answers, peers.generate_answers_shared)
    )
    assert repeated.shape == (2, 6, 100)
    torch.testing.assert_close(shared, repeated)
    assert (repeated[0, :, 3:].diff(dim=0).abs().amax(dim=-1) > 1e-3).all()  # they depend on question and image


@torch.no_grad()
def test_blip_scores_match_with_shared_images():
    model, inputs = make_blip(BlipForImageTextRetrieval), peers.make_inputs(arguments(), texts_per_image=3)
    expected = peers.forward_pairs(model, inputs)
    assert expected.shape == (6, 2)
    torch.testing.assert_close(peers.match_shared(model, inputs), expected)


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
