"""
Check a data set before training. Every row is read, and every image is decoded.

    python examples/check_data.py --task captions --train_file train.jsonl --validation_file val.jsonl
    python examples/check_data.py --task grounding --train_file "refs(unc).p" --image_root coco --output_json all.json
    python examples/check_data.py --task vqa --dataset_name org/data --tokenizer_name bert-base-uncased

Faults are listed by file and row: rows that training stops at or skips, and duplicate ids. Images must not be smaller
than a patch of the model, so give the --model_name_or_path or the --preset of the training script. With a checkpoint
or a --tokenizer_name, texts that are too long and unknown words are listed too. The exit code is 1 if there are
faults.
"""

import trips_examples  # noqa: F401  # isort: skip

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace

from datasets import Dataset, DatasetDict
from transformers import AutoTokenizer, TrainingArguments

from modeling_trips import TripsConfig, TripsProcessor
from trips_examples.data.checking import check_fit
from trips_examples.data.images import column_of
from trips_examples.data.loading import DataSource, load_task_dataset
from trips_examples.data.source import SPLITS
from trips_examples.data.tasks import TASKS, Fault
from trips_examples.metrics.vqa_accuracy import normalize_answer
from trips_examples.training.files import write_json
from trips_examples.training.options import ModelArguments
from trips_examples.training.parser import make_parser, run_script


MAX_SHOWN = 20  # faults to print


@dataclass
class CheckArguments(DataSource):
    task: str = field(kw_only=True, metadata={"help": "Task of the data.", "choices": list(TASKS)})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "TRIPS checkpoint whose tokenizer and patch size are used."}
    )
    preset: str = field(
        default=ModelArguments.preset,
        metadata={"help": f"Preset whose patch size is used: one of {', '.join(TripsConfig.presets())}."},
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Tokenizer, or a checkpoint with one. Texts that are too long are listed."}
    )
    patch_size: int | None = field(
        default=None,
        metadata={"help": "Side of the model's patches in pixels. Default: that of the checkpoint or preset."},
    )
    seed: int = field(default=TrainingArguments.seed, metadata={"help": "Seed of the scenes, as in training."})
    output_json: str | None = field(default=None, metadata={"help": "JSON file for the report."})


def load_processor(args: CheckArguments) -> TripsProcessor | None:
    """Return the processor of the checkpoint, or one with the tokenizer, or None."""
    if (name := args.model_name_or_path or args.tokenizer_name) is None:
        return None
    is_checkpoint = TripsProcessor.get_processor_dict(name)[0].get("processor_class") == "TripsProcessor"
    if is_checkpoint:
        return TripsProcessor.from_pretrained(name)
    return TripsProcessor(tokenizer=AutoTokenizer.from_pretrained(name), patch_size=preset_patch_size(args.preset))


def preset_patch_size(preset: str) -> int:
    return TripsConfig.from_preset(preset).vision_config.patch_shape[0]


def load_splits(args: CheckArguments, patch_size: int, faults: list[Fault]) -> DatasetDict:
    """Return the usable rows. A file that cannot be read is a fault, and the other files are still checked."""
    options = [(split, f"{split}_{what}") for split in SPLITS for what in ("file", "annotations", "split")]
    parts = [
        replace(args, **{option: None for split, option in options if split != kept}) for kept in args.files
    ]  # one by one, to find the errors of all
    data = {}
    for part in parts or [args]:
        try:
            data |= load_task_dataset(args.task, part, patch_size=patch_size, seed=args.seed, faults=faults)
        except (ValueError, OSError, ImportError) as error:
            names = [getattr(part, f"{split}_file") for split in SPLITS]
            faults.append(
                Fault(next(filter(None, [*names, args.dataset_name, args.task])), "cannot be read", str(error))
            )
    return DatasetDict(data)


def duplicate_ids(dataset: Dataset) -> Iterator[Fault]:
    """Yield faults of rows with a duplicate `question_id`."""
    if "question_id" not in dataset.column_names:
        return
    first = {}
    for question_id, source in zip(column_of(dataset, "question_id"), column_of(dataset, "source"), strict=True):
        if first.setdefault(question_id, source) != source:
            yield Fault(source, "question_id of two rows", f"{question_id}: {first[question_id]} has it too")


def image_ids(dataset: Dataset) -> set[str]:
    if "image_id" in dataset.column_names:
        return set(column_of(dataset, "image_id"))
    return {image_id for pair in column_of(dataset, "image_ids") for image_id in pair}


def describe_unseen_answers(data: DatasetDict) -> list[str]:
    """Describe validation questions whose normalized answers do not occur in training."""
    if not {"train", "validation"} <= data.keys():
        return []
    seen = {normalize_answer(answer) for answers in column_of(data["train"], "answers") for answer in answers}
    unseen = [
        answers[0]
        for answers in column_of(data["validation"], "answers")
        if seen.isdisjoint(map(normalize_answer, answers))
    ]
    if not unseen:
        return []
    examples = ", ".join(map(repr, list(dict.fromkeys(unseen))[:3]))
    total = len(data["validation"])
    return [f"{len(unseen)} of {total} questions have answers that training never sees, e.g. {examples}"]


def check(args: CheckArguments) -> dict:
    """
    Return the report: `splits` (number of usable rows, images and distinct texts), `reasons` (counts), `faults`, and
    the notes `unknown_words` and `unseen_answers` (validation answers that do not occur in training).
    """
    faults: list[Fault] = []
    processor = load_processor(args)
    patch_size = args.patch_size or (preset_patch_size(args.preset) if processor is None else processor.patch_size)
    data = load_splits(args, patch_size, faults)
    text = TASKS[args.task].text
    for split, dataset in data.items():
        faults += duplicate_ids(dataset)
        if len(dataset) == 0:
            faults.append(Fault(split, "no row that can be used", f"needed: {TASKS[args.task].needs}"))
    unknown = []
    if processor is not None:
        for split, dataset in data.items():
            unfit, with_unknown = check_fit(dataset, args.task, processor)
            faults += unfit.values()
            unknown += [f"{split}: {line}" for line in with_unknown]
    images = {split: image_ids(dataset) for split, dataset in data.items()}
    splits = {
        split: {
            "rows": len(dataset),
            "images": len(images[split]),
            f"different {text}s": len(set(column_of(dataset, text))),
        }
        for split, dataset in data.items()
    }
    return {
        "task": args.task,
        "splits": splits,
        "images_in_several_splits": sum(map(len, images.values())) - len(set().union(*images.values())),
        "unknown_words": unknown,
        "unseen_answers": describe_unseen_answers(data) if args.task == "vqa" else [],
        "reasons": dict(Counter(fault.reason for fault in faults).most_common()),
        "faults": [asdict(fault) for fault in faults],
    }


def print_report(report: dict):
    for fault in report["faults"][:MAX_SHOWN]:
        print(Fault(**fault))
    if len(report["faults"]) > MAX_SHOWN:
        print(f"and {len(report['faults']) - MAX_SHOWN} more: --output_json writes all of them")
    print()
    for split, counts in report["splits"].items():
        print(f"{split:<12}" + "".join(f"{count:>10,} {name}" for name, count in counts.items()))
    if report["images_in_several_splits"]:
        print(f"{'several':<12}{report['images_in_several_splits']:>10,} images: evaluation on them is biased")
    for line in report["unknown_words"]:
        print(f"{'unknown':<12}{line}")
    for line in report["unseen_answers"]:
        print(f"{'validation':<12}{line}")
    for reason, count in report["reasons"].items():
        hint = " (paths are relative to --image_root, by default the folder of the file)"
        print(f"{'wrong':<12}{count:>10,} {reason}{hint if reason == 'missing image' else ''}")
    if not report["faults"]:
        print("No faults found.")


def main(argv: list[str] | None = None) -> int:
    (args,) = make_parser(CheckArguments, description=__doc__).parse_args_into_dataclasses(args=argv)
    report = check(args)
    print_report(report)
    if args.output_json is not None:
        write_json(args.output_json, report)
    return 1 if report["faults"] else 0


if __name__ == "__main__":
    run_script(lambda: sys.exit(main()))
