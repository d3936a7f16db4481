"""Settings and the helper of the plugin for vLLM. vLLM is not installed here, so nothing imports it."""

import json
import shlex

import pytest
from tiny_vlms import BY_NAME

from modeling_trips.hosts import TextGuide
from modeling_trips.serving_vllm import check_release
from modeling_trips.serving_vllm.__main__ import main


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name in BY_NAME:
        BY_NAME[name].make().config.save_pretrained(folder / name)
    return folder


def test_the_helper_prints_the_command(folders, capsys, monkeypatch):
    model = str(folders / "llava")
    main([model, "--schedule", "2:image:0.33", "--visual_tokens", "16", "--port", "8001"])
    printed = shlex.split(capsys.readouterr().out)
    assert printed[1:5] == ["-m", "vllm.entrypoints.openai.api_server", "--model", model]
    assert printed[5] == "--hf-overrides" and printed[7:] == ["--port", "8001"]
    assert json.loads(printed[6]) == {
        "architectures": ["TripsLlavaForConditionalGeneration"],
        "patch_selection": "2:image:0.33",
        "visual_tokens": 16,
    }
    main([str(folders / "qwen2_5_vl"), "--visual_scorer", "diversity", "--visual_tokens", "4"])
    overrides = json.loads(shlex.split(capsys.readouterr().out)[6])
    assert overrides["architectures"] == ["TripsForConditionalGeneration"]
    assert overrides["visual_scorer"] == "diversity"


def test_the_helper_reads_a_guide(folders, tmp_path, capsys):
    guide = TextGuide.for_model(BY_NAME["llava"].make(), layer=2)
    guide.save_pretrained(tmp_path)
    main([str(folders / "llava"), "--schedule", "2:text:0.5", "--text_guide", str(tmp_path)])
    assert json.loads(shlex.split(capsys.readouterr().out)[6])["text_guide"] == str(tmp_path)
    with pytest.raises(SystemExit):
        main([str(folders / "llava"), "--schedule", "1:text:0.5", "--text_guide", str(tmp_path)])
    assert "trained for layer 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("llava", "--schedule 2:picture:0.3", "got 'picture'"),
        ("llava", "--schedule 2:random:0.3", "scored by the text or the image, got 2:random:0.3."),
        ("llava", "--schedule 9:image:0.3", "must be in 1..2, got [9]"),
        ("llava", "--schedule 2:text:0.3", "Layer 2 is scored by the text, but `text_guide` is not set."),
        ("llava", "--visual_tokens 65", "at most 64, the tokens of an image, got 65"),
        ("llava", "--visual_tokens 0", "at least 1, got 0"),
        ("llava_pixtral", "--visual_tokens 9", "a tower of CLIP or SigLIP, got pixtral"),
        ("llava_onevision", "--schedule 1:image:0.5", "at most 32, the tokens of a tile"),
        ("idefics3", "--visual_tokens 9", "`visual_tokens` is not supported for idefics3"),
        ("gemma3", "--visual_tokens 9", "not gemma3: vLLM does not compute its attention"),
        ("qwen3_vl", "--visual_tokens 9", "not qwen3_vl: vLLM's Transformers backend drops its deepstack features"),
        ("glm4v", "--visual_tokens 9", "qwen2_5_vl, qwen2_vl, not glm4v."),
    ],
)
def test_wrong_settings_are_one_sentence(folders, capsys, name, options, message):
    with pytest.raises(SystemExit) as stopped:
        main([str(folders / name), *options.split()])
    printed = capsys.readouterr()
    assert stopped.value.code == 2 and not printed.out
    assert message in printed.err and printed.err.count("\n") == 1


def test_other_releases_of_vllm_are_refused(folders, capsys, monkeypatch):
    for release in ("0.32.0", "0.33.1"):
        check_release(release)
    monkeypatch.setattr("modeling_trips.serving_vllm.__main__.installed_release", lambda: "0.31.2")
    with pytest.raises(SystemExit):
        main([str(folders / "llava")])
    assert capsys.readouterr().err == "Patch selection needs vLLM >=0.32,<0.34, got 0.31.2.\n"
