r"""
Make a small model from nothing that answers questions about busy scenes, and the same with one of 144 patches.
`examples/trips-tiny-scenes-unpruned` and `examples/trips-tiny-scenes` are those of commit d8bde055 with `--bf16
--seed 1`, rounded to bfloat16 and without code.

    python benchmarks/make_pair.py --bf16                  # a quarter of an hour, where a CPU computes in bfloat16
    python benchmarks/make_pair.py --seed 1 --output_dir pair1

1. `tower`: each patch of the vision tower names color, form and mark of the shape that covers it, as a pretrained
   tower would know them.
2. `single`, `small`, `unpruned`: questions about one shape, about scenes of 2 x 2, and of 4 x 4 cells, unpruned.
3. `model`: as in `make demo`, one of 144 patches, chosen by the question and learnt from answers alone.

A stage whose folder is complete is not trained again.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm
from transformers import set_seed

from modeling_trips import UNPRUNED, TripsConfig, TripsForQuestionAnswering, TripsProcessor
from modeling_trips.inspection.files import whole_folder
from trips_examples import demo
from trips_examples.data.busy_scenes import CELL_SIZE, COLORS, MARKS, SHAPES, Item, draw_scene
from trips_examples.data.source import option
from trips_examples.data.vocabulary import BUNDLED_WORDS
from trips_examples.training.models import train_processor
from trips_examples.training.options import make_parser, run_script


NAMES = {"color": tuple(COLORS), "shape": SHAPES, "mark": tuple(MARKS)}
SCENES_PER_STEP = 12
TOWER_LEARNING_RATE = 1.5e-3
ALL_PATCHES = {"schedule": "unpruned"}
ONE_PATCH = demo.STAGES["model"]


@dataclass
class PairArguments:
    output_dir: str = option("pair", "Folder of the models, one for each stage.")
    seed: int = option(42, "Seed of the weights, the scenes and the trainings.")
    bf16: bool = option(False, "Train in bf16 mixed precision. Default: float32.")
    tower_steps: int = option(1000, "Steps of the tower, of 12 scenes each.")
    single_steps: int = option(300, "Steps of 192 questions about one shape.")
    small_steps: int = option(600, "Steps of 192 questions about small scenes.")
    unpruned_steps: int = option(1200, "Steps of 64 questions.")
    pruned_steps: int = option(800, "Steps of 64 questions, with one patch.")
    train_scenes: int = option(4800, "Training scenes of a stage.")
    test_scenes: int = option(300, "Test scenes.")


def patch_labels(items: list[Item], patch_size: int, patches_per_side: int) -> dict[str, torch.Tensor]:
    """
    Return the names of the shape whose box holds the center of a patch.

    Returns:
        For each key of `NAMES` a `torch.LongTensor` of shape `(patches_per_side ** 2,)`: a place in `NAMES[key]`, or
        behind the last one where there is no shape.
    """
    centers = patch_size * (torch.arange(patches_per_side) + 0.5)
    labels = {}
    for name, values in NAMES.items():
        labels[name] = torch.full((patches_per_side, patches_per_side), len(values))
    for item in items:
        x0, y0, x1, y1 = item.box
        in_rows = (y0 <= centers) & (centers < y1)
        in_columns = (x0 <= centers) & (centers < x1)
        is_covered = in_rows[:, None] & in_columns
        for name, values in NAMES.items():
            labels[name][is_covered] = values.index(getattr(item, name))
    return {name: label.flatten() for name, label in labels.items()}


def train_tower(model: TripsForQuestionAnswering, processor: TripsProcessor, args: PairArguments):
    """Train the vision tower to tell color, form and mark of the shape on each patch, with linear heads."""
    tower = model.base_model.vision_model
    config = model.config.vision_config
    heads = nn.ModuleDict({name: nn.Linear(config.hidden_size, len(NAMES[name]) + 1) for name in NAMES})
    parameters = [*tower.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=TOWER_LEARNING_RATE)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=TOWER_LEARNING_RATE, total_steps=args.tower_steps, pct_start=0.1
    )
    progress = tqdm(range(args.tower_steps), desc="Training the tower")
    for step in progress:
        numbers = range(step * SCENES_PER_STEP, (step + 1) * SCENES_PER_STEP)
        scenes = [draw_scene("train", number, args.seed) for number in numbers]
        images = [scene.image for scene in scenes]
        pixel_values = processor.image_processor(images, return_tensors="pt").pixel_values
        labels = [patch_labels(scene.items, processor.patch_size, config.grid_size[0]) for scene in scenes]
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            states = tower(pixel_values, schedule=UNPRUNED).last_hidden_state[:, 1:]
            loss = 0
            for name, head in heads.items():
                logits = head(states).flatten(0, 1).float()  # (num_patches of all scenes, num_names)
                wanted = torch.cat([label[name] for label in labels])
                loss = loss + nn.functional.cross_entropy(logits, wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        progress.set_postfix(loss=f"{loss.item():.3f}")


def make_tower(folder: Path, args: PairArguments):
    """Write a model with a trained tower, whose other weights are random, and its processor."""
    set_seed(args.seed)
    config = TripsConfig.from_preset("tiny", vision_config={"image_size": 4 * CELL_SIZE})
    processor = train_processor(config, BUNDLED_WORDS)
    model = TripsForQuestionAnswering(config)
    model.set_attn_implementation("eager")  # faster on CPUs
    train_tower(model, processor, args)
    with whole_folder(folder) as partial:
        model.save_pretrained(partial)
        processor.save_pretrained(partial)


def main(argv: list[str] | None = None):
    (args,) = make_parser(PairArguments, description=__doc__).parse_args_into_dataclasses(args=argv)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.INFO)
    folder = Path(args.output_dir)
    start = folder / "tower"
    if not start.exists():
        make_tower(start, args)
    stages = {  # steps, batch size, cells per side, selection
        "single": (args.single_steps, 192, 1, ALL_PATCHES),
        "small": (args.small_steps, 192, 2, ALL_PATCHES),
        "unpruned": (args.unpruned_steps, 64, 4, ALL_PATCHES),
        "model": (args.pruned_steps, 64, 4, ONE_PATCH),
    }
    for name, (max_steps, batch_size, grid, options) in stages.items():
        stage = folder / name
        if not (stage / "test_results.json").exists():
            metrics = demo.train_stage(start, stage, args, max_steps, batch_size, grid, **options)
            print(f"{stage}: {metrics['test_accuracy']:.1%}")
        start = stage


if __name__ == "__main__":
    run_script(main)
