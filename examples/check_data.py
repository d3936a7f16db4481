"""
Check a data set before a day of training: every image is decoded, every row is read.

    python examples/check_data.py --task captions --train_file train.jsonl --validation_file val.jsonl
    python examples/check_data.py --task grounding --train_file "refs(unc).p" --image_root coco --output_json all.json
    python examples/check_data.py --task vqa --dataset_name org/data --tokenizer_name bert-base-uncased

All that is wrong is listed by file and row: images that are missing or broken, texts that are empty or longer than the
tokenizer allows, boxes outside their image or without area, labels that are neither true nor false, ids that stand for
two things. The exit code is 1 if anything is wrong.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

from datasets import Dataset, DatasetDict
from datasets.utils import tqdm
from transformers import AutoTokenizer, HfArgumentParser, PreTrainedTokenizerBase

from trips_examples.data.loading import Fault, load_task_dataset
from trips_examples.data.tasks import TASKS
from trips_examples.training.files import write_whole
from trips_examples.training.options import SourceArguments


@dataclass
class CheckArguments(SourceArguments):
    task: str = field(kw_only=True, metadata={"help": "What the data are for.", "choices": list(TASKS)})
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "A tokenizer, or a checkpoint with one: texts too long for it are listed."}
    )
    max_text_length: int | None = field(
        default=None, metadata={"help": "Tokens a text may have. Default: what the tokenizer allows."}
    )
    max_shown: int = field(default=20, metadata={"help": "How many faults to print; the report has all of them."})
    output_json: str | None = field(default=None, metadata={"help": "Where to write the report."})


def load_splits(args: CheckArguments, faults: list[Fault]) -> DatasetDict:
    """The rows that can be used. A file that cannot be read at all is a fault, and does not keep the other from it."""
    whole = ("dataset_name", "dataset_config_name", "image_root", "grid")
    options = {name: getattr(args, name) for name in whole}
    by_split = {
        split: {name: getattr(args, name) for name in (f"{split}_file", f"{split}_annotations", f"{split}_split")}
        for split in ("train", "validation")
    }
    # Both files at once would stop at the first that cannot be read.
    apart = args.train_file is not None and args.validation_file is not None
    parts = list(by_split.values()) if apart else [by_split["train"] | by_split["validation"]]
    data = {}
    for part in parts:
        try:
            data |= load_task_dataset(args.task, image_check="decode", faults=faults, **part, **options)
        except (ValueError, OSError, ImportError) as error:
            names = filter(None, (*part.values(), args.dataset_name, args.task))
            faults.append(Fault(next(names), "cannot be read", str(error)))
    return DatasetDict(data)


def duplicate_ids(dataset: Dataset) -> Iterator[Fault]:
    """Rows whose `question_id` another one has already."""
    if "question_id" not in dataset.column_names:
        return
    first = {}
    for question_id, source in zip(dataset["question_id"], dataset["source"], strict=True):
        if first.setdefault(question_id, source) != source:
            yield Fault(source, "question_id of two rows", f"{question_id}: {first[question_id]} has it too")


def long_texts(dataset: Dataset, column: str, tokenizer: PreTrainedTokenizerBase, limit: int) -> Iterator[Fault]:
    """Rows whose text has more tokens than `limit`."""
    for batch in tqdm(dataset.select_columns([column, "source"]).iter(1000), desc="Tokenizing", unit="000 rows"):
        lengths = map(len, tokenizer(batch[column], verbose=False)["input_ids"])
        for source, length in zip(batch["source"], lengths, strict=True):
            if length > limit:
                yield Fault(source, f"more than {limit} tokens", f"{column} has {length}")


def image_ids(dataset: Dataset) -> set[str]:
    if "image_id" in dataset.column_names:
        return set(dataset["image_id"])
    return {image_id for pair in dataset["image_ids"] for image_id in pair}


def check(args: CheckArguments) -> dict:
    """The report: `splits` (rows, images and different texts that can be used), `reasons` (counts), `faults`."""
    faults: list[Fault] = []
    data = load_splits(args, faults)
    text = TASKS[args.task].text
    for split, dataset in data.items():
        faults += duplicate_ids(dataset)
        if len(dataset) == 0:
            faults.append(Fault(split, "no row that can be used", f"needed: {TASKS[args.task].needs}"))
    if args.tokenizer_name is not None:
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer_name)
        limit = args.max_text_length or tokenizer.model_max_length
        for dataset in data.values():
            faults += long_texts(dataset, text, tokenizer, limit)
    images = {split: image_ids(dataset) for split, dataset in data.items()}
    splits = {
        split: {"rows": len(dataset), "images": len(images[split]), f"different {text}s": len(set(dataset[text]))}
        for split, dataset in data.items()
    }
    return {
        "task": args.task,
        "splits": splits,
        "images_in_both_splits": len(set.intersection(*images.values())) if len(images) > 1 else 0,
        "reasons": dict(Counter(fault.reason for fault in faults).most_common()),
        "faults": [asdict(fault) for fault in faults],
    }


def print_report(report: dict, max_shown: int):
    for fault in report["faults"][:max_shown]:
        print(Fault(**fault))
    if len(report["faults"]) > max_shown:
        print(
            f"and {len(report['faults']) - max_shown} more: --output_json writes all of them, --max_shown shows more"
        )
    print()
    for split, counts in report["splits"].items():
        print(f"{split:<12}" + "".join(f"{count:>10,} {name}" for name, count in counts.items()))
    if report["images_in_both_splits"]:
        print(f"{'both':<12}{report['images_in_both_splits']:>10,} images: evaluation on them says little")
    for reason, count in report["reasons"].items():
        print(f"{'wrong':<12}{count:>10,} {reason}")
    if not report["faults"]:
        print("Nothing is wrong.")


def main(argv: list[str] | None = None) -> int:
    parser = HfArgumentParser(CheckArguments, description=__doc__)
    (args,) = parser.parse_args_into_dataclasses(args=argv)
    if args.max_text_length is not None and args.tokenizer_name is None:
        parser.error("--max_text_length counts tokens: give --tokenizer_name")
    report = check(args)
    print_report(report, args.max_shown)
    if args.output_json is not None:
        write_whole(args.output_json, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    return 1 if report["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
