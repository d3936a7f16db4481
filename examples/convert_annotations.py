r"""
Write official annotation files as JSONL for the training scripts. The contents tell what a file is.

    python examples/convert_annotations.py --output_dir vqa \
        --files v2_OpenEnded_mscoco_train2014_questions.json v2_mscoco_train2014_annotations.json  # VQAv2
    python examples/convert_annotations.py --output_dir captions --files captions_train2014.json   # COCO
    python examples/convert_annotations.py --output_dir captions --files dataset_coco.json         # Karpathy's split
    python examples/convert_annotations.py --output_dir nlvr2 --files train.json                   # NLVR2
    python examples/convert_annotations.py --output_dir refcoco --files instances.json refs.json   # RefCOCO, +, g
    python examples/convert_annotations.py --output_dir llava --files llava_v1_5_mix665k.json      # LLaVA

There is a file per split, or one with the name of the last given file. Paths of images are those of the annotations:
the training scripts find them by --image_root. The refs of RefCOCO are a pickle, and reading a pickle can run code. If
you trust yours, write it as JSON:

    python -c "import json, pickle; print(json.dumps(pickle.load(open('refs(unc).p', 'rb'))))" > refs.json
"""

from dataclasses import MISSING, dataclass
from pathlib import Path

from trips_examples.data.source import option
from trips_examples.training.options import make_parser, run_script


@dataclass
class ConversionArguments:
    files: list[str] = option(MISSING, "Annotation files of one data set: for VQAv2 and RefCOCO two.")
    output_dir: str = option(MISSING, "Folder for the files of JSONL.")


OPTIONS = make_parser(ConversionArguments, description=__doc__, script=__name__)

import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any


# A split, or None for the only one of a file, and a row.
SplitRows = Iterator[tuple[str | None, dict]]


def vqa_rows(questions: dict, annotations: dict) -> SplitRows:
    """Yield the questions of VQAv2 with the answers of all annotators. Images have COCO's names."""
    question_of = {question["question_id"]: question["question"] for question in questions["questions"]}
    for annotation in annotations["annotations"]:
        question_id = annotation["question_id"]
        if question_id not in question_of:
            raise ValueError(f"The file of questions has no question_id {question_id}. Give the files of one split.")
        row = {
            "image": f"COCO_{annotations['data_subtype']}_{annotation['image_id']:012d}.jpg",
            "question": question_of[question_id],
            "answers": [answer["answer"] for answer in annotation["answers"]],
            "question_id": question_id,
            "kind": annotation["answer_type"],
        }
        yield None, row


def coco_rows(captions: dict) -> SplitRows:
    """Yield the images of COCO with all of their captions."""
    captions_of = defaultdict(list)
    for annotation in captions["annotations"]:
        captions_of[annotation["image_id"]].append(annotation["caption"])
    for image in captions["images"]:
        if image["id"] in captions_of:
            yield None, {"image": image["file_name"], "captions": captions_of[image["id"]]}


def karpathy_rows(dataset: dict) -> SplitRows:
    """Yield the images of Karpathy's split with all of their captions. Its `restval` is for training."""
    for image in dataset["images"]:
        is_of_training = image["split"] == "restval"
        path = Path(image.get("filepath", ""), image["filename"])
        row = {
            "image": str(path),
            "captions": [sentence["raw"] for sentence in image["sentences"]],
        }
        yield "train" if is_of_training else image["split"], row


def nlvr2_rows(statements: list[dict]) -> SplitRows:
    """Yield the statements of NLVR2. The images of the training split are in numbered folders."""
    for statement in statements:
        pair = statement["identifier"].rpartition("-")[0]
        folder = str(statement.get("directory", ""))
        row = {
            "left_image": str(Path(folder, f"{pair}-img0.png")),
            "right_image": str(Path(folder, f"{pair}-img1.png")),
            "statement": statement["sentence"],
            "label": statement["label"],
            "question_id": statement["identifier"],
        }
        yield None, row


def refcoco_rows(instances: dict, refs: list[dict]) -> SplitRows:
    """Yield the expressions of RefCOCO, RefCOCO+ or RefCOCOg with their boxes."""
    file_of = {image["id"]: image["file_name"] for image in instances["images"]}
    box_of = {annotation["id"]: annotation["bbox"] for annotation in instances["annotations"]}
    for ref in refs:
        if ref["ann_id"] not in box_of:
            raise ValueError(
                f"The file of instances has no annotation {ref['ann_id']}. Give both files of one data set."
            )
        x, y, width, height = box_of[ref["ann_id"]]
        box = [x, y, x + width, y + height]
        for sentence in ref["sentences"]:
            yield ref["split"], {"image": file_of[ref["image_id"]], "expression": sentence["sent"], "box": box}


def llava_rows(conversations: list[dict]) -> SplitRows:
    """Yield each question about an image with its answer. Conversations without an image are left out."""
    without_image = 0
    for conversation in conversations:
        if "image" not in conversation:
            without_image += 1
            continue
        turns = conversation["conversations"]
        speakers = [turn["from"] for turn in turns]
        if speakers != ["human", "gpt"] * (len(turns) // 2):
            raise ValueError(
                f"The conversation {conversation.get('id')} is not of human and gpt in turns: {speakers}."
            )
        for question, answer in zip(turns[::2], turns[1::2]):
            text = question["value"].replace("<image>", "").strip()
            yield None, {"image": conversation["image"], "question": text, "answer": answer["value"]}
    if without_image:
        print(f"Left out {without_image} conversations without an image.")


# What a file is, by keys of its object or of its first record: the first whose keys it has.
FORMS = {
    "questions of VQAv2": {"questions", "data_subtype"},
    "annotations of VQAv2": {"annotations", "data_subtype"},
    "images of Karpathy's split": {"images", "dataset"},
    "instances of COCO": {"images", "annotations", "categories"},
    "captions of COCO": {"images", "annotations"},
    "refs of RefCOCO": {"ref_id", "ann_id", "sentences"},
    "statements of NLVR2": {"identifier", "sentence", "left_url"},
    "conversations of LLaVA": {"id", "conversations"},
}
# The functions of the files, in the order of their arguments.
CONVERSIONS: dict[tuple[str, ...], Callable[..., SplitRows]] = {
    ("questions of VQAv2", "annotations of VQAv2"): vqa_rows,
    ("captions of COCO",): coco_rows,
    ("images of Karpathy's split",): karpathy_rows,
    ("statements of NLVR2",): nlvr2_rows,
    ("instances of COCO", "refs of RefCOCO"): refcoco_rows,
    ("conversations of LLaVA",): llava_rows,
}


def read_annotations(file: str) -> tuple[str, Any]:
    """Return what a file is, and its object or its list of records."""
    text = Path(file).read_text(encoding="utf-8-sig")
    try:
        value = json.loads(text)
    except ValueError:  # a record per line
        value = [json.loads(line) for line in text.splitlines() if line.strip()]
    first = value[0] if isinstance(value, list) and value else value
    for form, keys in FORMS.items():
        if isinstance(first, dict) and keys <= first.keys():
            return form, value
    raise ValueError(f"{file} is none of the files that are known: {', '.join(FORMS)}.")


def main(argv: list[str] | None = None):
    (args,) = OPTIONS.parse_args_into_dataclasses(args=argv)
    files = [read_annotations(file) for file in args.files]
    given = [form for form, _ in files]
    needed = next(forms for forms in CONVERSIONS if given[0] in forms)
    if sorted(given) != sorted(needed):
        raise ValueError(f"--files has {' and '.join(given)}. Give {' and '.join(needed)}, of one split.")
    values = dict(files)
    lines = defaultdict(list)
    own_name = Path(args.files[-1]).stem
    for split, row in CONVERSIONS[needed](*(values[form] for form in needed)):
        line = json.dumps(row, ensure_ascii=False)
        lines[split or own_name].append(f"{line}\n")
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for name, of_split in lines.items():
        with (folder / f"{name}.jsonl").open("x", encoding="utf-8") as file:  # writes over no file
            file.writelines(of_split)
        print(f"{folder / name}.jsonl: {len(of_split)} rows")


if __name__ == "__main__":
    run_script(main)
