"""The defaults of runs on own data, and trainings whose first steps run unpruned."""

import json
from pathlib import Path

import pytest
from toy_tasks import OPTIONS, write_task

from modeling_trips import TripsConfig
from trips_examples import run_vqa
from trips_examples.data.vocabulary import train_tokenizer
from trips_examples.training.models import fit_image_size, make_processor
from trips_examples.training.recipe import FROM_ANSWERS, SCHEDULES, TOWERS, recipe, towers


OWN = {"train_file": "train.jsonl"}


@pytest.mark.parametrize("task", SCHEDULES)
def test_what_is_typed_decides_which_defaults_a_run_has(task):
    first_steps = recipe(task, {})
    learnt = {"relevance_share", "learns_relevance"} if task in FROM_ANSWERS else set()
    assert first_steps.keys() == {"unpruned_share"} | learnt
    assert first_steps["unpruned_share"] > recipe(task, {"model": "mine"})["unpruned_share"] == 0
    assert recipe(task, {"dataset_name": "busy_scenes"}) == first_steps
    assert recipe(None, OWN).keys() == {"unpruned_share"}
    assert recipe(task, {**OWN, "preset": "tiny"}) == first_steps
    assert recipe(task, {**OWN, "tokenizer": "bert"}) == first_steps
    new = recipe(task, OWN)
    assert new["schedule"] == SCHEDULES[task]
    assert recipe(task, {"dataset_name": "ada/photos"}) == new
    assert recipe(task, {**OWN, "schedule": "unpruned"}) == new
    assert recipe(task, {**OWN, "text_model_name_or_path": "e5"}) == new
    assert new["learning_rate"] > recipe(task, {**OWN, "model": "mine"})["learning_rate"]
    assert new.keys() - recipe(task, {**OWN, "num_train_epochs": 3.0}) == {"max_steps"}
    assert "schedule" not in recipe(task, {**OWN, "vision_model_name_or_path": "clip"})


def test_the_scores_of_a_new_model_learn_relevance():
    assert recipe("vqa", OWN)["relevance_share"] > 0
    for typed in (OWN, {**OWN, "model": "mine"}):
        assert recipe("nlvr2", typed)["learns_relevance"]
    started = {**OWN, "model": "mine"}
    assert "relevance_share" not in recipe("vqa", started)
    pruned = recipe("vqa", {**started, "schedule": "2:text:0.1"})  # its scores have learnt nothing yet
    assert 0 < pruned["unpruned_share"] < recipe("vqa", OWN)["unpruned_share"]
    assert pruned["relevance_share"] == 1


def test_another_text_model_keeps_the_vision_tower():
    typed = ["--train_file=train.jsonl", "--text_model_name_or_path=intfloat/multilingual-e5-small"]
    model, _, _ = run_vqa.OPTIONS.parse_args_into_dataclasses(typed)
    assert model.text_model_name_or_path == "intfloat/multilingual-e5-small"
    assert "dinov2" in model.vision_model_name_or_path
    assert model.schedule is not None


def test_the_command_line_wins():
    typed = ["--train_file=train.jsonl", "--schedule=9:text:0.3", "--learning_rate=1e-4", "--max_steps=7"]
    model, _, training = run_vqa.OPTIONS.parse_args_into_dataclasses(typed)
    assert model.schedule == "9:text:0.3"
    assert model.freeze_vision_layers == 6
    assert training.learning_rate == 1e-4
    assert training.max_steps == 7
    assert training.per_device_train_batch_size == 60


def test_the_towers_learn_more_slowly_at_any_learning_rate():
    usual = recipe("vqa", OWN)
    half = recipe("vqa", {**OWN, "learning_rate": usual["learning_rate"] / 2})
    assert half["tower_learning_rate"][0] == usual["tower_learning_rate"][0] / 2


@pytest.mark.parametrize("task", SCHEDULES)
def test_a_run_without_accelerator_takes_smaller_images(task):
    on_cpu = recipe(task, OWN, on_cpu=True)
    assert on_cpu["max_image_size"] < recipe(task, OWN)["max_image_size"]
    assert "max_image_size" not in recipe(task, {**OWN, "model": "mine"}, on_cpu=True)


def test_without_towers_and_hub_one_error_names_the_remedy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match="make_towers.py"):
        run_vqa.main([*write_task("vqa", tmp_path), f"--output_dir={tmp_path / 'out'}"])


def test_copies_of_the_towers_are_found_from_any_folder(tmp_path, monkeypatch):
    clone = tmp_path / "clone/towers"
    monkeypatch.setattr("trips_examples.training.recipe.PLACES", (tmp_path / "here/towers", clone))
    assert towers() == TOWERS
    (clone / "dinov2-small").mkdir(parents=True)
    assert towers() == TOWERS  # one is missing
    (clone / "minilm").mkdir()
    assert set(towers().values()) == {str(clone / "dinov2-small"), str(clone / "minilm")}


@pytest.mark.parametrize(("sizes", "side"), [([(180, 240)] * 3, 224), ([(90, 115), (30, 400), (112, 80)], 112)])
def test_images_keep_their_size_up_to_a_limit(sizes, side):
    config = TripsConfig(vision_config={"image_size": 224, "patch_size": 14})
    processor = make_processor(train_tokenizer(["red"]), config)
    assert fit_image_size(processor, sizes, 224) == side
    assert dict(processor.image_processor.size) == {"height": side, "width": side}


PRUNED = ["--schedule=2:text:0.3,3:text:0.3"]
PHASES = [*PRUNED, "--unpruned_share=0.5", "--max_steps=4", "--logging_steps=1"]


def train(folder: Path, *options: str) -> list[dict]:
    """Train with the last of repeated options, and return the log."""
    data = [f"--train_file={folder.parent / 'rows.jsonl'}", f"--validation_file={folder.parent / 'rows.jsonl'}"]
    run_vqa.main([*data, *OPTIONS, "--save_strategy=no", *options, f"--output_dir={folder}"])
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def test_the_first_steps_are_those_of_an_unpruned_training(tmp_path):
    write_task("vqa", tmp_path)
    evaluated = ["--eval_strategy=steps", "--eval_steps=1"]
    log = train(tmp_path / "phases", *PHASES, *evaluated)
    unpruned = train(tmp_path / "unpruned", *PHASES, *evaluated, "--schedule=unpruned")
    for name in ("loss", "eval_loss"):
        values = [entry[name] for entry in log if name in entry]
        expected = [entry[name] for entry in unpruned if name in entry]
        assert len(values) == 4
        assert values[:2] == expected[:2]
        assert values[3] != expected[3]  # in the third, the scores learn, unpruned
    assert TripsConfig.from_pretrained(tmp_path / "phases").vision_config.schedule.layers == (2, 3)
    results = json.loads((tmp_path / "phases" / "eval_results.json").read_text())
    assert results["unpruned_steps"] == 2
    assert results["schedule"] == "2:text:0.3,3:text:0.3"
    assert "eval_layer3_kept" in results


def test_a_resumed_run_goes_on_with_the_options_of_its_checkpoint_or_says_so(tmp_path, caplog):
    """Other defaults, as of a newer version, are refused; options on the command line may differ."""
    write_task("vqa", tmp_path)
    learnt = ["--relevance_share=0.5", "--selection_loss_weight=0.25", "--image_size=32"]
    saved = ["--save_strategy=steps", "--save_steps=2", "--do_eval=False"]
    train(tmp_path / "out", *PHASES, *learnt, *saved)
    resumed = [*saved, f"--resume_from_checkpoint={tmp_path / 'out' / 'checkpoint-2'}"]
    for option in (*PHASES[:3], *learnt):
        others = [word for word in (*PHASES, *learnt) if word != option]
        with pytest.raises(ValueError, match=option.replace("=", " ")):
            train(tmp_path / "out", *others, *resumed)
    train(tmp_path / "other", *PHASES, *learnt, *resumed, "--schedule=3:image:0.5")
    (message,) = (record.message for record in caplog.records if "was trained with" in record.message)
    assert "2:text:0.3,3:text:0.3" in message and "3:image:0.5" in message


def test_the_log_says_where_it_writes_and_what_it_costs(tmp_path, caplog):
    write_task("vqa", tmp_path)
    caplog.set_level("INFO")
    train(tmp_path / "out", *PRUNED, "--max_steps=8", "--do_eval=False")
    for word in (str(tmp_path / "out"), "2:text:0.3,3:text:0.3 keeps ", "operations"):
        assert word in caplog.text


def test_no_checkpoint_of_the_unpruned_phase_is_the_best(tmp_path):
    write_task("vqa", tmp_path)
    options = [
        "--load_best_model_at_end",
        "--metric_for_best_model=loss",
        "--greater_is_better=True",  # the earliest
        "--eval_strategy=steps",
        "--eval_steps=1",
        "--save_strategy=steps",
        "--save_steps=1",
        "--learning_rate=1e-2",
    ]
    train(tmp_path / "out", *PHASES, *options)
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["best_global_step"] == 3


def test_the_learning_rate_falls_where_pruning_begins(tmp_path):
    write_task("vqa", tmp_path)

    def rates(name: str, *options: str) -> list[float]:
        options = ("--max_steps=6", "--warmup_steps=1", "--learning_rate=1e-4", *options)
        log = train(tmp_path / name, *PHASES, *options)
        return [entry["learning_rate"] / 1e-4 for entry in log if "learning_rate" in entry]

    falls = "--lr_scheduler_type=warmup_stable_decay"
    assert rates("phases", falls) == pytest.approx([0, 1, 1, 1, 0.75, 0.25])  # the first three are unpruned
    cosine = rates("cosine", "--lr_scheduler_type=cosine", "--unpruned_share=0")
    assert rates("whole", falls, "--unpruned_share=0") == pytest.approx(cosine)
