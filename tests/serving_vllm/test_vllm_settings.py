"""Settings and the helper of the plugin for vLLM. vLLM is not installed here, so nothing imports it."""

import json
import shlex

import pytest
import torch
from served_vlms import PROCESSORS, VLMS, store_internvl_chat
from strange_pictures import noise
from tiny_vlms import BY_NAME
from transformers import AutoConfig

from modeling_trips.hosts import TextGuide
from modeling_trips.hosts.vlm.families import find_family
from modeling_trips.hosts.vlm.pruning import Prompts
from modeling_trips.hosts.vlm.visual_tokens import ExitSelection
from modeling_trips.serving_vllm import check_release
from modeling_trips.serving_vllm.__main__ import main
from modeling_trips.serving_vllm.settings import BY_IMAGE, ServingSettings, find_question, split_calls


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name in BY_NAME:
        BY_NAME[name].make().config.save_pretrained(folder / name)
    for name in ("fuyu", "git"):
        AutoConfig.for_model(name).save_pretrained(folder / name)
    return folder


def printed_overrides(capsys, *options):
    main(options)
    words = shlex.split(capsys.readouterr().out)
    assert words.count("--hf-overrides") == 1
    return json.loads(words[words.index("--hf-overrides") + 1])


def test_the_helper_prints_the_command(folders, capsys):
    model = f"{folders}/llava"
    main([model, "--schedule=2:image:0.33", "--visual_tokens=16", "--port", "8001"])
    _, *words = shlex.split(capsys.readouterr().out)
    assert words[:3] == ["serve", model, "--hf-overrides"]
    assert json.loads(words[3]) == {
        "architectures": ["TripsLlavaForConditionalGeneration"],
        "patch_selection": {"schedule": "2:image:0.33", "visual_tokens": 16},
    }
    assert words[4:] == ["--port", "8001"]
    overrides = printed_overrides(capsys, f"{folders}/qwen3_vl", "--visual-scorer=prompt", "--keep-rate=0.25")
    assert overrides["architectures"] == ["TripsQwen3VLForConditionalGeneration"]
    assert overrides["patch_selection"] == {"keep_rate": 0.25, "visual_scorer": "prompt"}


def test_other_overrides_are_merged(folders, capsys):
    options = [f"{folders}/llava", "--visual_tokens=16"]
    overrides = printed_overrides(capsys, *options, '--hf-overrides={"max_position_embeddings": 64}')
    assert overrides["max_position_embeddings"] == 64
    assert overrides["patch_selection"] == {"visual_tokens": 16}
    for wrong in (
        '--hf_overrides={"architectures": []}',
        "--hf-overrides=[1]",
        "--hf-overrides.max_position_embeddings=64",
    ):
        with pytest.raises(SystemExit):
            main([*options, wrong])
        assert "hf-overrides" in capsys.readouterr().err


def test_the_helper_reads_a_guide(folders, tmp_path, capsys):
    TextGuide.for_model(BY_NAME["llava"].make(), layer=2).save_pretrained(tmp_path)
    options = [f"{folders}/llava", f"--text_guide={tmp_path}"]
    overrides = printed_overrides(capsys, *options, "--schedule=2:text:0.5")
    assert overrides["patch_selection"]["text_guide"] == str(tmp_path)
    with pytest.raises(SystemExit):
        main([*options, "--schedule=1:text:0.5"])
    assert "layer 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, options, named",
    [
        ("llava", "", "--visual_tokens"),
        ("llava", "--schedule 2:picture:0.3", "'picture'"),
        ("llava", "--schedule 2:random:0.3", "2:random:0.3"),
        ("llava", "--schedule 9:image:0.3", "[9]"),
        ("llava", "--schedule 2:text:0.3", "text_guide"),
        ("llava", "--schedule 2:text:0.3 --text_guide /missing", "/missing"),
        ("missing", "--visual_tokens 9", "missing"),
        ("llava", "--visual_tokens 65", "65"),
        ("llava", "--schedule 2:image:0.5 --visual_tokens 33", "33"),
        ("llava", "--keep_rate 0.5 --visual_tokens 9", "keep_rate"),
        ("llava", "--visual_tokens 11 --visual_scorer pooling", "11 cells"),
        ("llava", "--visual_tokens 4 --visual_scorer pooling --schedule 2:image:0.5", "pooling"),
        ("qwen2_5_vl", "--visual_tokens 4 --visual_scorer pooling", "pooling"),
        ("llava_pixtral", "--visual_tokens 9", "pixtral"),
        ("llava_onevision", "--schedule 1:image:0.5", "visual_tokens"),
        ("llava_onevision", "--schedule 1:image:0.5 --visual_tokens 33", "33"),
        ("smolvlm", "--schedule 1:image:0.5 --visual_tokens 9", "1:image:0.5"),
        ("paligemma", "--visual_tokens 9", "whole prompt"),
        ("qwen3_5", "--visual_tokens 9", "own class"),
        ("fuyu", "--visual_tokens 9", "no vision tower"),
        ("git", "--visual_tokens 9", "placeholders"),
        ("glm4v", "--schedule 1:image:0.5", "1:image:0.5"),
        ("glm4v", "--visual_tokens 9 --visual_scorer vispruner", "vispruner"),
        ("glm4v", "--visual_tokens 9 --request_scorers prompt pooling", "pooling"),
    ],
)
def test_wrong_settings_are_one_sentence(folders, capsys, name, options, named):
    with pytest.raises(SystemExit) as stopped:
        main([str(folders / name), *options.split()])
    printed = capsys.readouterr()
    assert stopped.value.code == 2
    assert not printed.out
    assert named in printed.err
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize("name, number", [("llava", 16), ("internvl", 4)])
def test_pooling_that_fits_is_accepted(folders, capsys, name, number):
    overrides = printed_overrides(capsys, f"{folders}/{name}", "--visual_scorer=pooling", f"--visual_tokens={number}")
    assert overrides["patch_selection"]["visual_scorer"] == "pooling"


def test_the_published_form_of_internvl(tmp_path, capsys):
    store_internvl_chat(BY_NAME["internvl"].make(), tmp_path)
    options = [str(tmp_path), "--trust-remote-code", "--keep_rate", "0.25"]
    assert printed_overrides(capsys, *options)["architectures"] == ["TripsInternVLChatModel"]
    for option, value in (("--visual_scorer", "prompt"), ("--schedule", "1:image:0.5")):
        with pytest.raises(SystemExit):
            main([*options, option, value])
        assert value in capsys.readouterr().err


def test_overrides_by_hand_are_checked():
    config = BY_NAME["llava"].make().config
    config.architectures = ["TripsLlavaForConditionalGeneration"]
    for given in (None, "2:image:0.5", {"visual_token": 6}, {"schedule": "2;image;0.5"}):
        config.patch_selection = given
        with pytest.raises(ValueError):
            ServingSettings.of(config)
    config.patch_selection = {"visual_tokens": 6}
    assert ServingSettings.of(config).visual_tokens == 6
    config.architectures = ["TripsVlmForConditionalGeneration"]
    with pytest.raises(ValueError, match="TripsLlavaForConditionalGeneration"):
        ServingSettings.of(config)


def test_settings_know_what_decides():
    for by_question in (
        ServingSettings(keep_rate=0.5, visual_scorer="prompt"),
        ServingSettings("2:image:0.5", visual_tokens=6, visual_scorer="prompt"),
        ServingSettings("1:text:0.5", text_guide="guide"),
    ):
        assert by_question.reads_prompt
    for by_image in (
        ServingSettings("2:image:0.5", visual_scorer="prompt"),
        ServingSettings("2:image:0.5", visual_tokens=6),
    ):
        assert not by_image.reads_prompt


def test_the_start_says_what_is_kept():
    line = ServingSettings("8:image:0.33", 64, visual_scorer="prompt").describe(576)
    for part in ("64 of 576", "layer 8 keeps 0.33 by the image", "per question"):
        assert part in line
    assert "keeps 289 of 577 " in ServingSettings("8:image:0.5").describe(577)  # 288 patches and [CLS]
    assert "keeps 144 of 576 " in ServingSettings(keep_rate=0.25).describe(576)
    line = ServingSettings(keep_rate=0.25).describe(None)
    assert "keeps 0.25 of the visual tokens" in line and "encoded once" in line
    assert "keeps all" in ServingSettings().describe(576)


def test_a_request_replaces_the_number_or_the_rate():
    server = ServingSettings("2:image:0.5", keep_rate=0.25)
    assert server.of_request({"do_resize": False}) is server
    assert server.of_request({"visual_tokens": 9}) == ServingSettings("2:image:0.5", visual_tokens=9)
    assert server.of_request({"keep_rate": 0.5}) == ServingSettings("2:image:0.5", keep_rate=0.5)
    assert server.of_request({"visual_tokens": "all"}).keeps_all
    wrong = [
        {"visual_tokens": 0},
        {"visual_tokens": 10**400},
        {"visual_tokens": "many"},
        {"visual_tokens": 2.5},
        {"visual_tokens": True},
        {"keep_rate": 0},
        {"keep_rate": 1.5},
        {"keep_rate": "0.5"},
        {"keep_rate": True},
        {"keep_rate": float("nan")},
        {"keep_rate": 0.5, "visual_tokens": 9},
        {"keep_rate": 0.5, "visual_tokens": "all"},
    ]
    for options in wrong:
        with pytest.raises(ValueError):
            server.of_request(options)
    pooling = ServingSettings(visual_tokens=16, visual_scorer="pooling")
    for number in (11, 65):  # no grid, and more than there are
        with pytest.raises(ValueError, match=str(number)):
            pooling.of_request({"visual_tokens": number}).check_size(64)


def test_a_video_keeps_a_token_of_each_time_step():
    ServingSettings(keep_rate=0.25).check_steps(4)
    ServingSettings(visual_tokens=9).check_steps(4)
    with pytest.raises(ValueError, match=r"0\.2 of 4"):
        ServingSettings(keep_rate=0.2).check_steps(4)


def test_a_request_names_a_scorer_that_the_server_allows():
    server = ServingSettings(keep_rate=0.25, request_scorers=["prompt", "vispruner"])
    settings = server.of_request({"visual_scorer": "prompt", "visual_tokens": 9})
    assert settings.at_exit == ExitSelection(9, None, "prompt")
    assert settings.reads_prompt and server.may_read_prompt and not server.reads_prompt
    assert server.of_request({"visual_scorer": "vispruner"}).keep_rate == 0.25
    for settings in (server, ServingSettings(keep_rate=0.25)):
        with pytest.raises(ValueError, match="cdpruner"):
            settings.of_request({"visual_scorer": "cdpruner"})
    with pytest.raises(ValueError, match="best"):
        ServingSettings(keep_rate=0.25, request_scorers=["best"])


def test_the_choice_of_a_request_travels_as_numbers():
    server = ServingSettings(visual_tokens=6, visual_scorer="prompt", request_scorers=["cdpruner"])
    scorer = {"visual_scorer": "cdpruner"}
    for options in ({}, {"visual_tokens": 9}, {"keep_rate": 1.0}, scorer, {**scorer, "keep_rate": 0.3}):
        settings = server.of_request(options)
        assert server.choice_of(settings.encode().tolist()) == settings.at_exit
    for whole in (server.of_request({"visual_tokens": "all"}), ServingSettings()):
        assert server.choice_of(whole.encode().tolist()) is None
    # A schedule alone keeps all that is left after the tower.
    in_tower = ServingSettings("2:image:0.5")
    assert in_tower.choice_of(in_tower.encode().tolist()).num_kept(64, 32) == 32


def test_the_question_is_the_text_after_the_last_image_or_video():
    image, video, special = 9, 8, 5

    def question(*ids):
        return find_question([*ids], [image, video], [special])

    assert question(1, image, 2, video, 3, 4) == [3, 4]
    assert question(1, video, 2, image) == [1, 2]  # all text, if none is after it
    assert question(1, image, special, 2, special) == [2]


@pytest.mark.parametrize("name", [name for name in PROCESSORS if not name.startswith(BY_IMAGE)])
@pytest.mark.parametrize("text", ["what color ? {}", "{}", "{} what color ?", "red {} blue {} ?", "red {} blue {}"])
def test_the_question_is_that_of_transformers(name, text):
    """vLLM sees the prompt without the text that the processor writes around each image."""
    model = VLMS[name].make()
    processor = PROCESSORS[name]()
    family = find_family(model)
    placeholder = processor.boi_token if name == "gemma3" else processor.image_token
    prompt = text.replace("{}", placeholder)
    images = [noise(64, 32, seed) for seed in range(text.count("{}"))]
    inputs = processor(text=prompt, images=images, return_tensors="pt")
    embeddings, mask = Prompts(family, dict(inputs)).text
    ids = processor.tokenizer(prompt)["input_ids"]
    (placeholder_id,) = processor.tokenizer.convert_tokens_to_ids([placeholder])
    question = find_question(ids, [placeholder_id], family.special_token_ids)
    expected = model.get_input_embeddings()(torch.tensor(question, dtype=torch.long))
    assert torch.equal(embeddings[mask], expected)


def test_calls_have_at_most_as_many_tokens_as_were_profiled():
    assert split_calls([2, 2, 2], 4, "aaa") == [slice(0, 2), slice(2, 3)]
    assert split_calls([9, 1, 1, 9], 4, "aaaa") == [slice(0, 1), slice(1, 3), slice(3, 4)]  # a large image is alone
    assert split_calls([1, 1, 1, 1], 4, "aabb") == [slice(0, 2), slice(2, 4)]  # requests choose otherwise
    sizes = torch.randint(1, 9, (100,), generator=torch.Generator().manual_seed(0)).tolist()
    calls = [sizes[part] for part in split_calls(sizes, 12, [None] * len(sizes))]
    assert sum(calls, []) == sizes
    assert max(map(sum, calls)) <= 12
    for call, following in zip(calls, calls[1:]):
        assert sum(call) + following[0] > 12


def test_other_releases_of_vllm_are_refused():
    for release in ("0.32.0", "0.33.1", "0.33.0rc1"):
        check_release(release)
    for release in ("0.31.2", "0.34.0", "dev"):
        with pytest.raises(ValueError, match=f"got {release}"):
            check_release(release)
