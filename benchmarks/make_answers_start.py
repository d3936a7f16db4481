r"""
Train the unpruned model that all contestants of benchmarks/variants/answers.json continue, on busy scenes that grow.

    OMP_NUM_THREADS=1 python benchmarks/make_answers_start.py --seed 0 --output_dir outputs/answers/start-seed0

Captions of single shapes teach colors and forms. Questions about 2 x 2 cells teach to look where a word points, with
attention supervision: without it, a model of this size stays at the frequencies of the answers for a thousand steps.
The third stage, 4 x 4 cells, has no regions. A stage that has finished is not repeated.
"""

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

from modeling_trips import TripsConfig, TripsForPreTraining
from trips_examples.data.busy_scenes import CELL_SIZE
from trips_examples.data.vocabulary import EMBEDDED_WORDS
from trips_examples.training.models import train_processor
from trips_examples.training.parser import make_parser, run_script


EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
COMMON = (
    "--dataset_name busy_scenes --keep_rate 1.0 --train_scenes 12000 --bf16 --save_strategy no --logging_steps 50 "
    "--lr_scheduler_type constant_with_warmup --warmup_steps 50"
)
STAGES = {
    "captions": (
        "run_pretraining.py",
        1,
        "--max_steps 350 --per_device_train_batch_size 32 --learning_rate 7e-4 --momentum_teacher False "
        "--do_eval False --validation_scenes 8",
    ),
    "small": (
        "run_vqa.py",
        2,
        "--max_steps 700 --per_device_train_batch_size 96 --learning_rate 1e-3 --texts_per_image 8 "
        "--attention_loss_weight 2 --validation_scenes 100",
    ),
    "large": (
        "run_vqa.py",
        4,
        "--max_steps 600 --per_device_train_batch_size 96 --learning_rate 7e-4 --texts_per_image 8 "
        "--attention_loss_weight 0 --validation_scenes 100",
    ),
}
# The usual scale of positions, a tenth of that of patches behind the convolutional stem, learns places too slowly.
POSITION_SCALE = 6.0


@dataclass
class StartArguments:
    seed: int = field(default=0, metadata={"help": "Seed of weights, scenes and order."})
    output_dir: str = field(default="outputs/answers/start", metadata={"help": "Folder, with one per stage."})


def make_untrained(folder: Path, seed: int):
    """Write the untrained model and its processor."""
    torch.manual_seed(seed)
    config = TripsConfig.from_preset("tiny", image_size=4 * CELL_SIZE, keep_rate=1.0)
    processor = train_processor(config, EMBEDDED_WORDS)
    model = TripsForPreTraining(config)
    with torch.no_grad():
        model.model.vision_model.embeddings.position_embeddings.mul_(POSITION_SCALE)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def main(argv: list[str] | None = None):
    (args,) = make_parser(StartArguments, description=__doc__).parse_args_into_dataclasses(args=argv)
    folder = Path(args.output_dir)
    start = folder / "untrained"
    if not start.exists():
        make_untrained(start, args.seed)
    for name, (script, grid, options) in STAGES.items():
        if not (folder / name / "model.safetensors").exists():
            command = [sys.executable, str(EXAMPLES / script), *COMMON.split(), *options.split()]
            command += ["--model_name_or_path", str(start), "--grid", str(grid), "--image_size", str(grid * CELL_SIZE)]
            subprocess.run([*command, "--seed", str(args.seed), "--output_dir", str(folder / name)], check=True)
        start = folder / name


if __name__ == "__main__":
    run_script(main)
