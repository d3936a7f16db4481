r"""
Train guides from answers with other settings of the gate, and evaluate them on validation scenes.

    OMP_NUM_THREADS=1 python benchmarks/vlm_small/try_gate.py --folder outputs/vlm_small/seed0 --seed 0 \
        --output_json docs/results/gate_trials.json

The folder is that of train.py.
"""

from dataclasses import dataclass, field

from compare import KEPT, CompareArguments, Evaluation, write_rows
from contestants import Contestant
from guides import train_guide

from trips_examples.training.parser import make_parser, run_script


# Options of the guide's training.
TRIALS: dict[str, dict] = {
    "7 patches kept in training": {"kept": 7},
    "7, all dropped patches run": {"kept": 7, "selection_gate": 1.0},
    "3 patches kept in training": {"kept": 3},
    "3, all dropped patches run": {"kept": 3, "selection_gate": 1.0},
    "2 patches kept in training": {"kept": 2},
    "1 patch kept in training": {"kept": 1},
}


@dataclass
class TrialArguments(CompareArguments):
    trials: list[str] = field(
        default_factory=lambda: [*TRIALS], metadata={"choices": [*TRIALS], "help": "Settings to try. Default: all."}
    )


def main(argv: list[str] | None = None):
    (args,) = make_parser(TrialArguments, description=__doc__).parse_args_into_dataclasses(argv)
    evaluation, rows = Evaluation(args), []
    for trial in args.trials:
        evaluation.guides["trial"] = train_guide(evaluation.model, args.layer, "answers", args.seed, **TRIALS[trial])
        contestants = [Contestant(f"{trial} {kept}", kept, args.layer, "trial") for kept in KEPT]
        rows += evaluation.measure(contestants, "validation")
    write_rows(args, rows)


if __name__ == "__main__":
    run_script(main)
