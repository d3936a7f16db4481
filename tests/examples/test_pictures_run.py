"""`examples/pictures.py`: its commands are valid, and finished parts are skipped."""

import importlib
import json
from pathlib import Path

import pytest
from named_pictures import write_pictures

from trips_examples import pictures
from trips_examples.training.options import DataArguments, ModelArguments, RetrievalArguments, TripsTrainingArguments
from trips_examples.training.parser import make_parser


ARGUMENTS = {
    "run_grounding": [DataArguments, ModelArguments, TripsTrainingArguments, "GroundingArguments"],
    "run_retrieval": [DataArguments, ModelArguments, TripsTrainingArguments, RetrievalArguments],
    "run_vqa": [DataArguments, ModelArguments, TripsTrainingArguments],
    "make_towers": ["TowerArguments"],
}


@pytest.mark.parametrize("quick", [True, False])
def test_scripts_take_the_commands(quick, tmp_path):
    file = write_pictures(tmp_path)
    parts = [pictures.towers_in(tmp_path)]
    parts += pictures.trainings(tmp_path / "full", tmp_path, [str(file)], quick)
    before = {"towers": None, "full/names": None, "full/page": "grounding-text"}
    for task in ("grounding", "vqa"):
        before[f"full/{task}-start"] = {"grounding": "names", "vqa": "grounding-start"}[task]
        before |= {f"full/{task}-{name}": f"{task}-start" for name in ("unpruned", "text", "image")}
    names = [part.name for part in parts]
    assert set(names) == before.keys()
    assert all(names.index(f"full/{start}") < names.index(name) for name, start in before.items() if start)
    for part in parts:
        script = importlib.import_module(f"trips_examples.{part.module}")
        classes = [getattr(script, each) if isinstance(each, str) else each for each in ARGUMENTS[part.module]]
        parsed = make_parser(*classes, description="").parse_args_into_dataclasses(args=part.options)
        if isinstance(parsed[0], DataArguments):
            parsed[0].check({"run_retrieval": "captions"}.get(part.module, part.module.removeprefix("run_")))
            start = parsed[1].model_name_or_path
            assert (start and Path(start)) == (before[part.name] and tmp_path / "full" / before[part.name])
            if before[part.name] not in (None, "grounding-text"):
                assert (parsed[0].train_scenes == 60) == quick


def test_what_has_ended_is_run_again_only_with_other_options(tmp_path, capsys):
    file, made = write_pictures(tmp_path), tmp_path / "out"
    parts = [pictures.towers_in(made), *pictures.trainings(made / "full", made, [str(file)], quick=False)]
    for number, part in enumerate(parts):
        part.result.parent.mkdir(parents=True, exist_ok=True)
        part.result.write_text("{}")
        part.result.with_name("test_results.json").write_text(json.dumps({"test_accuracy": number / 100}))
    ended = {part.name: {"options": part.options, "minutes": 1.0} for part in parts}
    (made / "done.json").write_text(json.dumps(ended))
    pictures.main([f"--output_dir={made}", f"--pictures={file}"])
    assert "| `text` | 5.0% | 1.0 | 8.0% | 1.0 |" in capsys.readouterr().out
    assert not (made / "logs").exists()

    # A part with other options runs again, and fails because there is no tower.
    ended["full/names"]["options"] = [*ended["full/names"]["options"], "--seed", "1"]
    (made / "done.json").write_text(json.dumps(ended))
    log = made / "logs" / "full" / "names.txt"
    with pytest.raises(RuntimeError, match=f"full/names.*{log}"):
        pictures.main([f"--output_dir={made}", f"--pictures={file}"])
    assert "Traceback" in log.read_text()
