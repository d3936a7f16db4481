"""
Check a data set before training: read every row, decode every image, and measure every text as training does.

    python examples/check_data.py --task captions --train_file train.jsonl --validation_file val.jsonl
    python examples/check_data.py --task grounding --train_file train.jsonl --image_root coco
    python examples/check_data.py --task vqa --dataset_name org/data --preset base --tokenizer bert-base-uncased

Give the options of the data and of the model that the training script gets. Faults are listed by file and row: these
are the rows that training stops at, or leaves out with --skip_bad_rows. The exit code is 1 if there are faults. A note
says if texts were not measured, because the pretrained models that training starts from are not here.
"""

import sys
from dataclasses import dataclass, field

from trips_examples.training.options import DataArguments, ModelArguments, make_parser, run_script


@dataclass
class CheckArguments:
    task: str = field(metadata={"help": "Task of the data.", "choices": ["vqa", "captions", "nlvr2", "grounding"]})


# Of the recipe only the start counts here, which is that of all tasks.
OPTIONS = make_parser(CheckArguments, ModelArguments, DataArguments, description=__doc__, task="vqa", script=__name__)

from collections import Counter
from itertools import chain

from datasets import DatasetDict

from modeling_trips import TripsConfig
from trips_examples.data.images import column_of, texts_of_column
from trips_examples.data.loading import check_fit, load_task_dataset
from trips_examples.data.tasks import TASKS, Fault
from trips_examples.training.models import load_start, train_processor
from trips_examples.training.recipe import TOWERS


def check(name: str, model_args: ModelArguments, data_args: DataArguments) -> tuple[list[Fault], list[str]]:
    """Return the faults of the data of a task, and notes on what its splits have and what training accepts."""
    task, notes = TASKS[name], []
    faults: list[Fault] = []
    try:
        config, processor = load_start(model_args, data_args.scene_size)
    except OSError as error:
        if model_args.vision_model_name_or_path not in TOWERS.values():
            raise
        config, processor = TripsConfig.from_preset("tiny"), None
        notes.append(f"texts were not measured: {error}")
    data = load_task_dataset(name, data_args, patch_size=config.vision_config.patch_shape[0], faults=faults)
    usable = DatasetDict({split: rows for split, rows in data.items() if len(rows)})
    faults += [Fault(split, "no row that can be used", f"needed: {task.needs}") for split in data.keys() - usable]
    if not notes and usable.keys() & {"train", "validation"}:
        processor = processor or train_processor(config, data_args.vocabulary(usable, *task.texts))
    for rows in usable.values() if processor is not None else ():
        faults += check_fit(rows, name, processor).values()
    column = "image_ids" if task.has_two_images else "image_id"
    images = {split: set(texts_of_column(rows, column)) for split, rows in data.items()}
    for split, rows in data.items():
        texts = set(column_of(rows, task.text))
        notes.append(f"{split}: {len(rows)} rows, {len(images[split])} images, {len(texts)} different {task.text}s")
    if shared := sum(count > 1 for count in Counter(chain.from_iterable(images.values())).values()):
        notes.append(f"{shared} images are in several splits: evaluation on them is biased")
    return faults, notes


def main(argv: list[str] | None = None) -> int:
    args, model_args, data_args = OPTIONS.parse_args_into_dataclasses(args=argv)
    faults, notes = check(args.task, model_args, data_args)
    counts = Counter(fault.reason for fault in faults).most_common()
    counted = [f"{count} x {reason}" for reason, count in counts] or ["No faults found."]
    print(*faults, *notes, *counted, sep="\n")
    return 1 if faults else 0


if __name__ == "__main__":
    run_script(lambda: sys.exit(main()))
