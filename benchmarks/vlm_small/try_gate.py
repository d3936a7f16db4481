r"""
Train guides from answers with other settings of the gate, and evaluate them on validation scenes.

    OMP_NUM_THREADS=1 python benchmarks/vlm_small/try_gate.py --folder outputs/vlm_small/seed0 --seed 0 \
        --output_json docs/results/gate_trials.json

The folder is that of train.py.
"""

from contextlib import ExitStack
from dataclasses import dataclass, field
from unittest.mock import patch

import torch
from compare import KEPT, CompareArguments, Evaluation, write_rows
from contestants import Contestant
from guides import train_guide

from modeling_trips import patch_selection
from modeling_trips.hosts import layers
from modeling_trips.patch_selection import keep_topk
from trips_examples.training.parser import make_parser, run_script


def keep_topk_with_noise(scores: torch.Tensor, num_kept: int) -> torch.Tensor:
    """Keep candidates by their log scores and Gumbel noise: a sample without repetition in place of the best."""
    noise = -torch.empty_like(scores).exponential_().log()
    return keep_topk(scores.clamp(min=torch.finfo(scores.dtype).tiny).log() + noise, num_kept)


# Options of the guide's training, and values that are replaced in it.
TRIALS: dict[str, tuple[dict, list]] = {
    "7 patches kept in training": ({"kept": 7}, []),
    "7, all dropped patches run": ({"kept": 7, "selection_gate": 1.0}, []),
    "7, temperature 0.5": ({"kept": 7}, [(patch_selection, "GATE_TEMPERATURE", 0.5)]),
    "7, temperature 2": ({"kept": 7}, [(patch_selection, "GATE_TEMPERATURE", 2.0)]),
    "7, noise": ({"kept": 7}, [(layers, "keep_topk", keep_topk_with_noise)]),
    "3 patches kept in training": ({"kept": 3}, []),
    "3, all dropped patches run": ({"kept": 3, "selection_gate": 1.0}, []),
    "2 patches kept in training": ({"kept": 2}, []),
    "1 patch kept in training": ({"kept": 1}, []),
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
        options, replaced = TRIALS[trial]
        with ExitStack() as stack:
            for of, name, value in replaced:
                stack.enter_context(patch.object(of, name, value))
            guide = train_guide(evaluation.model, args.layer, "answers", args.seed, **options)
        evaluation.guides["trial"] = guide
        contestants = [Contestant(f"{trial} {kept}", kept, args.layer, "trial") for kept in KEPT]
        rows += evaluation.measure(contestants, "validation")
    write_rows(args, rows)


if __name__ == "__main__":
    run_script(main)
