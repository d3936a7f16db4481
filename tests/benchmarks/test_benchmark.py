"""The benchmark: MACs against a formula, tokens, rows and verdicts."""

import json

import benchmark
import pytest

from modeling_trips.inspection.speed import (
    MIN_REPEATS,
    Setting,
    count_macs,
    macs_by_part,
    percentile_99,
    seconds_in_turns,
    tokens_per_layer,
)


def setting(**changes) -> Setting:
    fields = {
        "preset": "tiny",
        "image_size": 64,
        "batch_size": 2,
        "texts_per_image": 1,
        "text_length": 6,
        "selection_layers": [2, 3],
        "keep_rate": 0.5,
        "mode": "forward",
        "dtype": "float32",
        "attn_implementation": "eager",
        "device": "cpu",
        "num_threads": 1,
        "compile": False,
    }
    return Setting(**{**fields, **changes})


def macs_by_hand(tokens: list[tuple[int, int]], num_selections: int) -> int:
    """
    Return the MACs of one image and text of the tiny preset: width 128, MLP of 512, 4 vision, 1 text and 2 fusion
    layers, 64 patches. `tokens` are the input lengths of attention and MLP of each vision layer.
    """
    d, mlp, text = 128, 512, 6
    stem = 32 * 32 * 27 * 32 + 16 * 16 * 32 * 9 * 64 + 8 * 8 * 64 * 9 * 128 + 64 * d * d
    vision = sum(4 * n * d * d + 2 * n * n * d + 2 * m * d * mlp for n, m in tokens)
    # Each selection: the text's query and the weighted sum of n candidates. The product with keys is not a matmul.
    selection = sum(d * d + (n - 1) * d for n, m in tokens if n != m)
    assert sum(n != m for n, m in tokens) == num_selections
    self_attention = 4 * text * d * d + 2 * text * text * d
    image = tokens[-1][1]
    cross_attention = 2 * text * d * d + 2 * image * d * d + 2 * text * image * d
    feed_forward = 2 * text * d * mlp
    return stem + vision + selection + 3 * (self_attention + feed_forward) + 2 * cross_attention


def test_counted_macs_equal_the_formula():
    # 64 patches: 1 + 32 + 1 tokens after layer 2, 1 + ceil(33 / 2) + 1 after layer 3.
    pruned = macs_by_hand([(65, 65), (65, 34), (34, 19), (19, 19)], num_selections=2)
    assert count_macs(setting(), 0.5) == 2 * pruned
    unpruned = macs_by_hand([(65, 65)] * 4, num_selections=0)
    assert count_macs(setting(), 1.0) == 2 * unpruned


def test_shared_images_are_counted_once():
    one = count_macs(setting(batch_size=1), 0.5)
    three = count_macs(setting(batch_size=1, texts_per_image=3), 0.5)
    assert one < three < 3 * one
    # The unpruned vision tower and the fusion encoder's keys and values do not depend on the text.
    d, mlp, text, image = 128, 512, 6, 65
    language = 3 * (4 * text * d * d + 2 * text * text * d + 2 * text * d * mlp)
    language += 2 * (2 * text * d * d + 2 * text * image * d)
    shared = setting(batch_size=1, texts_per_image=3)
    assert count_macs(shared, 1.0) - count_macs(setting(batch_size=1), 1.0) == 2 * language


def test_tokens_per_layer():
    assert tokens_per_layer(setting()) == [65, 34, 19, 19]
    base = setting(preset="base", image_size=224, selection_layers=[5, 10], keep_rate=0.7)
    assert tokens_per_layer(base) == [197] * 4 + [140] * 5 + [100] * 3


@pytest.mark.parametrize(
    ("image_size", "layers", "ratio"),
    [
        (224, [5, 10], 0.79),
        (384, [5, 10], 0.75),
        (224, [2, 10], 0.73),
        (384, [2, 10], 0.68),
        (224, [2, 4, 8], 0.60),
        (384, [2, 4, 8], 0.53),
    ],
)
def test_counted_ratios_at_base_size(image_size, layers, ratio):
    """Ratios by hand for ViT-B/16, 6 text and 6 fusion layers, 40 text tokens (two decimals)."""
    point = setting(
        preset="base", image_size=image_size, selection_layers=layers, keep_rate=0.7, batch_size=1, text_length=40
    )
    assert count_macs(point, 0.7) / count_macs(point, 1.0) == pytest.approx(ratio, abs=0.0051)


def test_pre_training_is_divided_among_parts():
    """In the tiny preset, 65 tokens enter the vision tower, 34 its layer 3, 19 its layer 4."""
    point = setting(mode="pretraining")
    pruned, unpruned = macs_by_part(point, 0.5), macs_by_part(point, 1.0)
    d, mlp, images = 128, 512, 2

    def layer(tokens: int, tokens_of_mlp: int) -> int:
        return 4 * tokens * d * d + 2 * tokens**2 * d + 2 * tokens_of_mlp * d * mlp

    stem = 32 * 32 * 27 * 32 + 16 * 16 * 32 * 9 * 64 + 8 * 8 * 64 * 9 * 128 + 64 * d * d
    shared = stem + layer(65, 65) + layer(65, 0)
    by_text = layer(0, 34) + layer(34, 19) + layer(19, 19)
    selections = 2 * d * d + (64 + 33) * d
    assert pruned["vision, shared"] == pytest.approx(images * shared, rel=0.02)
    # Once for the features; a caption, two negatives, a masked caption, a prefix.
    assert pruned["vision, by text"] == pytest.approx(images * 6 * (by_text + selections), rel=0.02)
    # The unpruned tower does not depend on the text and is computed once for all of them.
    assert unpruned["vision, shared"] == images * (stem + 4 * layer(65, 65)) and unpruned["vision, by text"] == 0
    assert pruned["text"] == unpruned["text"] and pruned["fusion"] < unpruned["fusion"]
    forward = sum(pruned.values())
    assert 2.2 * (forward - pruned["teacher"]) < count_macs(point, 0.5) - pruned["teacher"] < 3 * forward


def test_pretraining_is_measured_against_the_unpruned_baseline(tmp_path, capsys):
    path = tmp_path / "speed.json"
    arguments = "--preset tiny --image_size 64 --schedule 4 --keep_rate 0.5 --batch_size 2 --text_length 6"
    fields = {"projection_dim": 64}
    options = ["--mode=pretraining", f"--config_fields={json.dumps(fields)}", "--repeats=1", "--warmup=0"]
    benchmark.main([*arguments.split(), *options, "--output_json", str(path)])
    (row,) = json.loads(path.read_text())
    assert row["config_fields"] == fields and row["macs_by_part"].keys() == row["unpruned_macs_by_part"].keys()
    point = setting(mode="pretraining", selection_layers=[4], config_fields=fields)
    assert row["macs_ratio"] == count_macs(point, 0.5) / count_macs(point, 1.0)
    assert row["tokens_per_layer"] == [65, 65, 65, 34]
    assert "decoder" in capsys.readouterr().out


def test_command_line_writes_a_row_per_setting(tmp_path, capsys):
    path = tmp_path / "speed.json"
    arguments = "--preset tiny --image_size 64 --schedule 2,3 1 --keep_rate 0.5 --batch_size 2 --text_length 6"
    benchmark.main([*arguments.split(), "--repeats=1", "--warmup=0", "--output_json", str(path)])
    rows = json.loads(path.read_text())
    assert [row["selection_layers"] for row in rows] == [[2, 3], [1]]
    assert rows[0]["macs_ratio"] == count_macs(setting(), 0.5) / count_macs(setting(), 1.0)
    for row in rows:
        assert row["time_ratio"] == pytest.approx(row["latency"] / row["unpruned_latency"])
        assert row["throughput"] == pytest.approx(2 / row["latency"])
        assert row["peak_memory_bytes"] > 2**20
    assert "2:text:0.5,3:text:0.5" in capsys.readouterr().out


def test_a_schedule_has_a_guidance_and_a_rate_per_layer(tmp_path, capsys):
    path = tmp_path / "speed.json"
    arguments = "--preset tiny --image_size 64 --schedule 2:image:0.5,4:text:0.25 3:image,4 --keep_rate 0.5 0.7"
    options = "--texts_per_image 1 3 --batch_size 1 --text_length 6 --repeats 1 --warmup 0 --no_compare_repeating"
    picture = tmp_path / "speed.png"
    benchmark.main([*arguments.split(), *options.split(), f"--output_json={path}", f"--plot={picture}"])
    assert picture.read_bytes().startswith(b"\x89PNG")
    rows = json.loads(path.read_text())
    # The first has its own rates and comes once; the second takes both rates of the command line.
    schedules = [([2, 4], [0.5, 0.25]), ([3, 4], 0.5), ([3, 4], 0.7)] * 2
    assert [(row["selection_layers"], row["keep_rate"]) for row in rows] == schedules
    assert all(row["selection_guidance"] == ["image", "text"] for row in rows)
    assert [row["texts_per_image"] for row in rows] == [1, 1, 1, 3, 3, 3]
    assert rows[0]["tokens_per_layer"] == [65, 34, 34, 11]
    late = setting(
        batch_size=1,
        texts_per_image=3,
        selection_layers=[2, 4],
        keep_rate=[0.5, 0.25],
        selection_guidance=["image", "text"],
    )
    assert rows[3]["macs_ratio"] == count_macs(late, [0.5, 0.25]) / count_macs(late, 1.0)
    assert "speedup_over_repeating_images" not in rows[3]
    assert "3 texts, 2:image:0.5,4:text:0.25" in capsys.readouterr().out


def test_settings_where_the_time_ratio_exceeds_the_mac_ratio_are_named(capsys):
    row = {**vars(setting()), "macs_ratio": 0.7, "time_ratio": 1.2}
    for time_ratio, is_named in ((1.2, True), (0.8, True), (0.7, False)):
        benchmark.print_verdict([{**row, "time_ratio": time_ratio}])
        assert (benchmark.label(row) in capsys.readouterr().out) == is_named


def test_printed_parts_of_pretraining(capsys):
    parts = {"macs_by_part": {"text": 10, "vision": 30}, "unpruned_macs_by_part": {"text": 10, "vision": 90}}
    benchmark.print_parts([{**vars(setting()), **parts}])
    _, text, vision = (line.split() for line in capsys.readouterr().out.splitlines())
    assert text == ["text", "25.0%", "10.0%", "1.00"] and vision == ["vision", "75.0%", "90.0%", "0.33"]


def test_steps_alternate_within_the_limit():
    order = []
    steps = {name: lambda name=name: order.append(name) for name in "ab"}
    seconds = seconds_in_turns(
        steps, warmup=1, repeats=9, prepare=lambda name: order.append(f"before {name}"), limit=0
    )
    assert order == ["before a", "a", "before b", "b"] * (1 + MIN_REPEATS)
    assert [len(times) for times in seconds.values()] == [MIN_REPEATS] * 2


def test_percentile_99():
    assert percentile_99([1.0] * 99) is None
    assert percentile_99([float(number) for number in range(1, 102)]) == 100.0


def test_unknown_clock_raises():
    assert setting(clock="process").clock == "process"
    for options in ({"clock": "sun"}, {"clock": "process", "device": "cuda"}):
        with pytest.raises(ValueError, match="`clock`"):
            setting(**options)
