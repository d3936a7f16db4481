r"""
Train a task with several ways to select patches, and unpruned, over several seeds, and compare the results.

    python benchmarks/ablate_selection.py --output_json scenes.json -- \
        --dataset_name busy_scenes --model examples/trips-tiny-scenes-unpruned
    python benchmarks/ablate_selection.py --script run_grounding.py --metric eval_accuracy --output_json boxes.json
    python benchmarks/ablate_selection.py --variants_file benchmarks/variants/answers.json --output_json rows.json -- \
        --dataset_name busy_scenes --model outputs/starts/seed{seed}

The options after `--` go to each run, together with those of its variant, its `--seed` and its folder. Without
`--variants_file`, they keep a tenth of the patches after layer 2 (`--schedule 2:text:0.1`), scored by the text, by the
image or at random, or all of them (`--schedule unpruned`). `{seed}` in any option is the
seed: `--model outputs/starts/unpruned-seed{seed}` gives each seed a start of its own. Finished runs are
not repeated, so that an interrupted ablation continues. Each run has its log in its folder.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, stdev

from measuring import OutputArguments, run_benchmark
from tqdm.auto import tqdm

from trips_examples.data.source import option
from trips_examples.training.checks import written_checkpoints
from trips_examples.training.files import write_json
from trips_examples.training.options import run_script


EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
VARIANTS = Path(__file__).parent / "variants" / "scenes.json"


@dataclass(kw_only=True)
class AblationArguments(OutputArguments):
    script: str = option("run_vqa.py", "Script of examples/ that trains and evaluates.")
    metric: str = option("eval_accuracy", "Metric of eval_results.json to compare.")
    variants_file: str = option(str(VARIANTS), "JSON: name to options.")
    seeds: list[int] = option([0, 1, 2], "Seeds of each variant.")
    jobs: int = option(2, "Runs side by side.")
    num_threads: int = option(1, "CPU threads of each run.")
    output_dir: str = option("outputs/ablation", "Folder of the runs, one folder each.")


@dataclass(frozen=True)
class Run:
    """One training: a variant and a seed."""

    variant: str
    seed: int
    folder: Path
    options: tuple[str, ...]  # of the script, but for the folder

    @property
    def results_file(self) -> Path:
        return self.folder / "ablation_run.json"


def read_variants(path: str) -> dict[str, list[str]]:
    """Return the options of each variant."""
    variants = json.loads(Path(path).read_text())
    try:
        return {name: shlex.split(options.strip()) for name, options in variants.items()}
    except AttributeError as error:
        example = '{"text": "--schedule 2:text:0.1"}'
        raise ValueError(f"{path} must hold an object of strings, as in {example}.") from error


def make_runs(args: AblationArguments, options: list[str]) -> list[Run]:
    """Return the runs, seed by seed, so that early results can be compared."""
    variants = read_variants(args.variants_file)
    runs = []
    for seed in args.seeds:
        for variant, own_options in variants.items():
            name = f"{variant.replace(' ', '-')}-seed{seed}"
            words = [args.script, *options, *own_options, "--seed", "{seed}"]
            run = Run(
                variant=variant,
                seed=seed,
                folder=Path(args.output_dir) / name,
                options=tuple(word.replace("{seed}", str(seed)) for word in words),
            )
            runs.append(run)
    return runs


def execute(run: Run, args: AblationArguments) -> dict:
    """
    Train and evaluate in a process of its own, unless it was done, and return the row. A `ValueError` is raised if the
    folder holds a run with other options.
    """
    if run.results_file.exists():
        row = json.loads(run.results_file.read_text())
        if row["options"] != list(run.options):
            others = shlex.join(row["options"])
            raise ValueError(f"{run.folder} holds a run with other options, {others}. Choose another --output_dir.")
        return row
    run.folder.mkdir(parents=True, exist_ok=True)
    script, *options = run.options
    command = [sys.executable, str(EXAMPLES / script), *options, "--output_dir", str(run.folder)]
    command.append("--overwrite_output_dir")  # the model of a run that was interrupted
    if written_checkpoints(run.folder):
        command += ["--resume_from_checkpoint", "last"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.num_threads)}
    log_file = run.folder / "log.txt"
    start = time.perf_counter()
    with log_file.open("w") as log:
        process = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
    if process.returncode != 0:
        raise RuntimeError(f"The run failed with status {process.returncode}, see {log_file}.")
    minutes = (time.perf_counter() - start) / 60
    row = {
        "variant": run.variant,
        "seed": run.seed,
        "options": list(run.options),
        "minutes": round(minutes, 2),
        "num_threads": args.num_threads,
        "jobs": args.jobs,
        **read_results(run.folder),
    }
    write_json(run.results_file, row)
    return row


def read_results(folder: Path) -> dict:
    """Return the metrics of the validation split, and of the test split if there is one."""
    metrics = {}
    for split in ("test", "eval"):
        file = folder / f"{split}_results.json"
        if file.exists():
            metrics |= json.loads(file.read_text())
    return metrics


def print_table(rows: list[dict], args: AblationArguments):
    """Print mean and standard deviation over the seeds in Markdown."""
    print(f"| selection | {args.metric}: mean | standard deviation | seeds | minutes per run |\n|---|---|---|---|---|")
    by_variant = defaultdict(list)
    for row in rows:
        by_variant[row["variant"]].append(row)
    for variant, runs in by_variant.items():
        values = [row[args.metric] for row in runs]
        deviation = f"{stdev(values):.4f}" if len(values) > 1 else "-"
        minutes = mean(row["minutes"] for row in runs)
        print(f"| {variant} | {mean(values):.4f} | {deviation} | {len(runs)} | {minutes:.1f} |")


def main(argv: list[str] | None = None) -> list[dict]:
    argv = sys.argv[1:] if argv is None else argv
    script_options = []
    if "--" in argv:
        dashes = argv.index("--")
        script_options = argv[dashes + 1 :]
        argv = argv[:dashes]

    def measure(args: AblationArguments) -> Iterator[dict]:
        runs = make_runs(args, script_options)
        with ThreadPoolExecutor(args.jobs) as pool:
            rows = pool.map(partial(execute, args=args), runs)
            yield from tqdm(rows, total=len(runs), desc="runs")

    return run_benchmark(
        arguments_class=AblationArguments,
        description=__doc__,
        measure=measure,
        report=print_table,
        argv=argv,
    )


if __name__ == "__main__":
    run_script(main)
