r"""
Does the text pick better patches? Trains a task with each way of selecting them, and unpruned, over several seeds.

    python benchmarks/ablate_selection.py --output_json scenes.json -- \
        --dataset_name easy_vqa_scenes --model_name_or_path demo/model --keep_rate 0.1
    python benchmarks/ablate_selection.py --script run_grounding.py --metric eval_accuracy --output_json boxes.json
    python benchmarks/ablate_selection.py --variants_file benchmarks/variants/rates.json --output_json rates.json -- \
        --dataset_name easy_vqa_scenes --model_name_or_path outputs/scenes

What stands behind `--` goes to each run of the script, which is told besides it how to select
(`--selection_guidance`, or `--keep_rate 1.0` for the unpruned twin; or what `--variants_file` says), its `--seed` and
its folder. A run that has ended is not run again, so that an interrupted ablation goes on where it was. Each run has
its log in its folder. With `--eval_strategy epoch` the rows hold how each run learnt.

The paper's claim is that `text` beats `image` (its row "w/o text"); `random` is the floor that both must beat.
plot_ablation.py draws the rows.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev

from tqdm.auto import tqdm

from modeling_trips.inspection.speed import provenance
from trips_examples.training.files import write_json
from trips_examples.training.parser import make_parser


EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
VARIANTS = {
    "text": ["--selection_guidance", "text"],
    "image": ["--selection_guidance", "image"],
    "random": ["--selection_guidance", "random"],
    "unpruned": ["--keep_rate", "1.0"],
}


@dataclass
class AblationArguments:
    script: str = field(default="run_vqa.py", metadata={"help": "Which script of examples/ trains and evaluates."})
    metric: str = field(default="eval_accuracy", metadata={"help": "What of its eval_results.json is compared."})
    show: list[str] = field(
        default_factory=list,
        metadata={"help": "More of it to print beside the metric, such as eval_layer2_kept: means over the seeds."},
    )
    variants_file: str | None = field(
        default=None,
        metadata={
            "help": "JSON: an object with the options of each variant by its name. Default: "
            f"{', '.join(VARIANTS)}, each at the keep rate behind `--`."
        },
    )
    variants: list[str] | None = field(default=None, metadata={"help": "Run these only. Default: all."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "One run of each variant per seed."})
    jobs: int = field(default=2, metadata={"help": "Runs side by side."})
    num_threads: int = field(default=1, metadata={"help": "CPU threads of each run."})
    output_dir: str = field(default="outputs/ablation", metadata={"help": "A folder per run goes in here."})
    output_json: str | None = field(default=None, metadata={"help": "Write a row per run to this file."})


@dataclass(frozen=True)
class Run:
    """One training: a variant and a seed."""

    variant: str
    seed: int
    folder: Path
    options: tuple[str, ...]  # of the script, but for the folder

    @property
    def is_done(self) -> bool:
        return self.results_file.exists()

    @property
    def results_file(self) -> Path:
        return self.folder / "ablation_run.json"


def read_variants(path: str | None) -> dict[str, list[str]]:
    """The options of each variant by its name."""
    if path is None:
        return VARIANTS
    variants = json.loads(Path(path).read_text())
    if not isinstance(variants, dict) or not all(isinstance(options, str) for options in variants.values()):
        raise ValueError(f'{path} must hold an object of strings, as in {{"text": "--selection_guidance text"}}.')
    return {name: shlex.split(options) for name, options in variants.items()}


def make_runs(args: AblationArguments, options: list[str]) -> list[Run]:
    """Variant by variant within a seed, so that what is there early can be compared."""
    variants = read_variants(args.variants_file)
    chosen = list(variants) if args.variants is None else args.variants
    unknown = set(chosen) - variants.keys()
    if unknown:
        raise ValueError(f"--variants must be of {', '.join(variants)}, got {', '.join(sorted(unknown))}.")
    return [
        Run(
            variant,
            seed,
            Path(args.output_dir) / f"{variant.replace(' ', '-')}-seed{seed}",
            (args.script, *options, *variants[variant], "--seed", str(seed)),
        )
        for seed in args.seeds
        for variant in chosen
    ]


def execute(run: Run, args: AblationArguments):
    """Trains and evaluates in a process of its own. A run that ended before with other options is an error."""
    if run.is_done:
        options = json.loads(run.results_file.read_text())["options"]
        if options != list(run.options):
            raise ValueError(f"{run.folder} holds a run with other options ({options}): choose another --output_dir.")
        return
    run.folder.mkdir(parents=True, exist_ok=True)
    script, *options = run.options
    command = [sys.executable, str(EXAMPLES / script), *options, "--output_dir", str(run.folder)]
    start = time.perf_counter()
    with (run.folder / "log.txt").open("w") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": str(args.num_threads)}
        status = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment).returncode
    if status != 0:
        raise RuntimeError(f"The run failed with status {status}, see {run.folder / 'log.txt'}.")
    row = {
        "variant": run.variant,
        "seed": run.seed,
        "options": list(run.options),
        "minutes": round((time.perf_counter() - start) / 60, 2),
        "num_threads": args.num_threads,
        "jobs": args.jobs,
        **json.loads((run.folder / "eval_results.json").read_text()),
        "history": learning_curve(run.folder, args.metric),
        **provenance("cpu"),
    }
    write_json(run.results_file, row)


def learning_curve(folder: Path, metric: str) -> list[dict]:
    """The metric by epoch and step, where training was interrupted to evaluate."""
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [{name: entry[name] for name in ("epoch", "step", metric)} for entry in log if metric in entry]


def print_table(rows: list[dict], metric: str, show: list[str]):
    """Mean over the seeds and standard deviation, in Markdown; means of what else is shown, where it is."""
    titles = "".join(f" {name} |" for name in show)
    print(f"| selection | {metric}: mean | standard deviation | seeds | minutes per run |{titles}")
    print("|---|---|---|---|---|" + "---|" * len(show))
    for variant in dict.fromkeys(row["variant"] for row in rows):
        own = [row for row in rows if row["variant"] == variant]
        values = [row[metric] for row in own]
        deviation = f"{stdev(values):.4f}" if len(values) > 1 else "-"
        minutes = mean(row["minutes"] for row in own)
        more = "".join(f" {mean(row[name] for row in own):.3g} |" if name in own[0] else " - |" for name in show)
        print(f"| {variant} | {mean(values):.4f} | {deviation} | {len(own)} | {minutes:.1f} |{more}")


def main(argv: list[str] | None = None) -> list[dict]:
    argv = sys.argv[1:] if argv is None else argv
    own, options = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    (args,) = make_parser(AblationArguments, description=__doc__).parse_args_into_dataclasses(args=own)
    runs = make_runs(args, options)
    with ThreadPoolExecutor(args.jobs) as pool:
        for _ in tqdm(pool.map(lambda run: execute(run, args), runs), total=len(runs), desc="runs"):
            pass
    rows = [json.loads(run.results_file.read_text()) for run in runs]
    if args.output_json is not None:
        write_json(args.output_json, rows)
    print_table(rows, args.metric, args.show)
    return rows


if __name__ == "__main__":
    main()
