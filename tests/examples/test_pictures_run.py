"""`examples/pictures.py`: its commands are ones that the scripts take, and what has ended is not run again."""

import importlib
import json

import pytest
from named_pictures import write_pictures

from trips_examples import pictures
from trips_examples.training.options import DataArguments, ModelArguments
from trips_examples.training.parser import make_parser
from trips_examples.training.start import StartedTrainingArguments


ARGUMENTS = {
    "run_grounding": ["GroundingArguments", ModelArguments, StartedTrainingArguments],
    "run_retrieval": [DataArguments, "RetrievalModelArguments", "RetrievalTrainingArguments"],
    "run_vqa": ["DataArguments", ModelArguments, StartedTrainingArguments],
    "make_towers": ["TowerArguments"],
}


@pytest.mark.parametrize("quick", [True, False])
def test_scripts_take_the_commands(quick, tmp_path):
    file = write_pictures(tmp_path)
    parts = [pictures.towers_in(tmp_path)]
    parts += pictures.trainings(tmp_path / "full", tmp_path, [str(file)], quick)
    assert [part.name for part in parts] == [
        "towers",
        "names",
        *(f"grounding-{name}" for name in ("start", "unpruned", "text", "image")),
        *(f"vqa-{name}" for name in ("start", "unpruned", "text", "image")),
        "page",
    ]
    for part in parts:
        script = importlib.import_module(f"trips_examples.{part.module}")
        classes = [getattr(script, each) if isinstance(each, str) else each for each in ARGUMENTS[part.module]]
        parsed = make_parser(*classes, description="").parse_args_into_dataclasses(args=part.options)
        if isinstance(parsed[0], DataArguments):
            parsed[0].check({"run_retrieval": "captions"}.get(part.module, part.module.removeprefix("run_")))
            assert quick or part.name in ("names", "page") or parsed[0].train_scenes >= 3600
            assert not quick or part.name == "names" or parsed[0].train_scenes == 60


def test_what_has_ended_is_not_run_again(tmp_path, capsys):
    file, folder = write_pictures(tmp_path), tmp_path / "out" / "full"
    parts = [pictures.towers_in(tmp_path / "out")]
    parts += pictures.trainings(folder, tmp_path / "out", [str(file)], quick=False)
    for number, part in enumerate(parts):
        part.result.parent.mkdir(parents=True, exist_ok=True)
        part.result.write_text(json.dumps({"eval_accuracy": number / 100}))
    (folder / "minutes.json").write_text(json.dumps({part.name: 1.0 for part in parts}))
    pictures.main([f"--output_dir={tmp_path / 'out'}", f"--pictures={file}"])
    assert "| `text` | 4.0% | 1.0 | 8.0% | 1.0 |" in capsys.readouterr().out
    assert not (folder / "logs").exists()


def test_a_part_that_fails_names_its_log(tmp_path):
    log = tmp_path / "logs" / "towers.txt"
    part = pictures.Part("towers", tmp_path / "none", "make_towers", [])
    with pytest.raises(RuntimeError, match=f"towers failed with status 2, see {log}"):
        part.run(log)
    assert "required: --output_dir" in log.read_text()
