"""
Check a data set before training: read every row, decode every image, and measure every text as training does.

    python examples/check_data.py --task captions --train_file train.jsonl --validation_file val.jsonl
    python examples/check_data.py --task grounding --train_file train.jsonl --image_root coco
    python examples/check_data.py --task vqa --dataset_name org/data --preset base --tokenizer bert-base-uncased

Give the options of the data and of the model that the training script gets. Faults are counted by kind, and the first
five of each are named by file and row: these are the rows that training stops at, or leaves out with --skip_bad_rows.
The exit code is 1 if there are faults. Notes count answers that the model cannot write and images that are in several
splits, and say if texts were not measured, because the pretrained models that training starts from are not here.
"""

import sys
from dataclasses import MISSING, dataclass

from trips_examples.data.source import option
from trips_examples.training.options import DataArguments, ModelArguments, make_parser, run_script


@dataclass
class CheckArguments:
    task: str = option(MISSING, "Task of the data.", choices=["vqa", "captions", "nlvr2", "grounding"])


# Of the recipe only the start counts here, which is that of all tasks.
OPTIONS = make_parser(CheckArguments, ModelArguments, DataArguments, description=__doc__, task="vqa", script=__name__)

import hashlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from datasets import Dataset, DatasetDict

from modeling_trips import TripsConfig
from trips_examples.data.images import (
    column_of,
    first_rows,
    image_keys,
    path_or_bytes,
    texts_of_column,
    without_decoding,
)
from trips_examples.data.loading import check_fit, load_task_dataset
from trips_examples.data.printing import visible
from trips_examples.data.tasks import SHOWN, TASKS, Fault
from trips_examples.metrics.diagnostics import unwritable_texts
from trips_examples.metrics.vqa_accuracy import normalize_answer
from trips_examples.training.models import load_start, train_processor
from trips_examples.training.recipe import TOWERS


def check(name: str, model_args: ModelArguments, data_args: DataArguments) -> tuple[list[Fault], list[str]]:
    """Return the faults of the data of a task, and notes on what its splits have and what training accepts."""
    task = TASKS[name]
    faults: list[Fault] = []
    notes = []
    try:
        config, processor = load_start(model_args, data_args.scene_size)
        has_start = True
    except OSError as error:
        if model_args.vision_model_name_or_path not in TOWERS.values():
            raise
        config = TripsConfig.from_preset("tiny")
        processor = None
        has_start = False
        notes.append(f"texts were not measured: {error}")
    data = load_task_dataset(name, data_args, patch_size=config.vision_config.patch_shape[0], faults=faults)
    usable = DatasetDict({split: rows for split, rows in data.items() if len(rows)})
    if processor is None and has_start and usable.keys() & {"train", "validation"}:
        processor = train_processor(config, data_args.vocabulary(usable, *task.texts))
    if processor is not None:
        for rows in usable.values():
            faults += check_fit(rows, name, processor).values()
        if task.written is not None:
            _, sentences = unwritable_texts(usable, task.written, processor, normalize_answer)
            notes += sentences
    rows_of_content = defaultdict(dict)  # for each content of an image, the first row that has it in each split
    for split, rows in data.items():
        image_ids = set(texts_of_column(rows, "image_ids" if task.has_two_images else "image_id"))
        texts = set(column_of(rows, task.text))
        notes.append(f"{split}: {len(rows)} rows, {len(image_ids)} images, {len(texts)} different {task.text}s")
        for content, source in contents_of_images(rows):
            rows_of_content[content].setdefault(split, source)
    shared = [list(sources.values()) for sources in rows_of_content.values() if len(sources) > 1]
    if shared:
        example = " and ".join(shared[0])
        notes.append(f"{len(shared)} images are in several splits ({example}): evaluation on them is biased")
    return faults, notes


def contents_of_images(rows: Dataset) -> Iterator[tuple[str, str]]:
    """Yield a hash of the content of each image of a split, a file or bytes, and the source of its row."""
    encoded = without_decoding(rows)
    distinct, _ = first_rows(image_keys(rows))
    for place in distinct:
        row = encoded[place]
        images = row["images"] if "images" in row else [row["image"]]
        for image in images:
            path_or_content = path_or_bytes(image)
            is_path = isinstance(path_or_content, str)
            content = Path(path_or_content).read_bytes() if is_path else path_or_content
            yield hashlib.blake2b(content, digest_size=16).hexdigest(), row["source"]


def report(faults: list[Fault]) -> Iterator[str]:
    """Yield the number of faults of each kind, and the first few."""
    faults_of = defaultdict(list)
    for fault in faults:
        faults_of[fault.reason].append(fault)
    for reason, of_reason in sorted(faults_of.items(), key=lambda item: -len(item[1])):
        yield f"{len(of_reason)} x {reason}"
        for fault in of_reason[:SHOWN]:
            yield f"  {fault}"
        if len(of_reason) > SHOWN:
            yield f"  and {len(of_reason) - SHOWN} more"


def main(argv: list[str] | None = None) -> int:
    args, model_args, data_args = OPTIONS.parse_args_into_dataclasses(args=argv)
    faults, notes = check(args.task, model_args, data_args)
    for line in [*report(faults), *notes]:
        print(visible(line))
    if not faults:
        print("No bad rows found.")
    return 1 if faults else 0


if __name__ == "__main__":
    run_script(lambda: sys.exit(main()))
