"""
Predict for a collection of photos: every photo with every question, as a table (.csv, .jsonl or .parquet).

    python examples/predict.py --model mine --images photos --questions "what is it?" "is it new?" --output answers.csv
    python examples/predict.py --model captions --images "photos/*.parquet" --output captions.jsonl
    python examples/predict.py --model boxes --images rows.csv --questions "the red car" --output boxes.csv
    python examples/predict.py --model statements --images pairs.csv --questions_file statements.txt --output true.csv

Questions are expressions for boxes, statements for pairs (a file of rows with `left_image` and `right_image`), and the
prompt for captions. A photo that cannot be used gets one row with its `error`. The datasets library keeps predictions
until a file changes: a second run of a killed command continues there. Each of several processes takes a part of the
shards: torchrun --nproc_per_node 8 examples/predict.py ...
"""

from dataclasses import MISSING, dataclass
from pathlib import Path

from trips_examples.data.source import check_is_file, option
from trips_examples.training.checks import check_device
from trips_examples.training.options import make_parser, run_script


FORMATS = (".csv", ".jsonl", ".parquet")


@dataclass
class PredictArguments:
    model: str = option(MISSING, "Checkpoint for questions, captions, boxes or statements.")
    images: list[str] = option(
        MISSING, "Images or folders of them; WebDataset shards; Parquet, JSONL, CSV with images or paths."
    )
    output: str = option(MISSING, "New table: .csv, .jsonl or .parquet.")
    questions: list[str] = option([], "Questions, expressions or statements for every photo; the prompt of captions.")
    questions_file: str | None = option(None, "Text file with one per line, or a table with the column question.")
    image_root: str | None = option(None, "Folder that paths in rows are relative to. Default: that of their file.")
    image_column: str | None = option(None, "Image column of rows. Default: image, jpg, png, ...")
    threshold: float = option(0.0, "Confidence below which an answer is unsure.")
    device: str = option("cpu", "Such as cuda.")
    batch_size: int = option(8, "Photos per step.")

    def __post_init__(self):
        if self.questions and self.questions_file:
            raise ValueError("Give either --questions or --questions_file.")
        if self.batch_size < 1:
            raise ValueError(f"--batch_size must be positive, got {self.batch_size}.")
        if Path(self.output).suffix.lower() not in FORMATS:
            raise ValueError(f"--output must end with {' or '.join(FORMATS)}, got {self.output}.")

    def check_files(self):
        """Raise an `OSError` for an output that exists, or a file that does not, a `ValueError` for a wrong device."""
        if Path(self.output).exists():
            raise FileExistsError(f"--output {self.output} exists. Give another name, or delete it.")
        if self.questions_file:
            check_is_file("questions_file", self.questions_file)
        check_device(self.device)


OPTIONS = make_parser(PredictArguments, description=__doc__, script=__name__)

import codecs
import json
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from typing import NamedTuple

import datasets
import torch
import transformers
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset, Features, Value, concatenate_datasets
from huggingface_hub.utils import chunk_iterable
from tqdm.auto import tqdm

from modeling_trips import (
    TripsForConditionalGeneration,
    TripsForImagesAndTextClassification,
    TripsForQuestionAnswering,
    TripsForVisualGrounding,
    TripsPreTrainedModel,
    TripsProcessor,
    TripsVisualQuestionAnsweringPipeline,
)
from modeling_trips.inspection.checkpoints import check_head, load_checkpoint, load_processor
from modeling_trips.inspection.files import whole_file
from trips_examples.data.collection import (
    FolderShard,
    Shard,
    find_images,
    kept_rows,
    results_of,
    rows_of,
    version_of_model,
)
from trips_examples.data.loading import stamp_of
from trips_examples.data.records import parsed_record, read_records
from trips_examples.data.tasks import filled_text


PHOTOS_PER_PART = 64  # a killed process loses at most the work on these
CAPTION_PROMPT = "a picture of "  # that of run_captioning.py


# The predictions of a batch, one per text: all texts of the first photo, then of the second, ...


def write_texts(model, processor: TripsProcessor, inputs: dict, sizes: list, threshold: float) -> list[tuple]:
    """Return the best answer or caption, its probability, and words of the text that the model has not learnt."""
    writer = TripsVisualQuestionAnsweringPipeline(model=model, processor=processor)
    num_beams = model.generation_config.num_beams or 1
    outputs = writer.forward({"inputs": inputs}, top_k=1, num_beams=num_beams)["outputs"]
    written = []
    for answers in outputs:
        (best,) = writer.postprocess(answers, threshold)
        written.append((best["answer"], round(best["score"], 4), " ".join(best.get("unknown_words", ())) or None))
    return written


def find_boxes(model, processor: TripsProcessor, inputs: dict, sizes: list, threshold: float) -> list[tuple]:
    """Return the corners of the boxes in pixels of the photo."""
    boxes = processor.post_process_grounding(model(**inputs), sizes)  # (num_texts, 4)
    return [tuple(round(number, 2) for number in box) for box in boxes.tolist()]


def judge(model, processor: TripsProcessor, inputs: dict, sizes: list, threshold: float) -> list[tuple]:
    """Return the most probable label, of statements 1 for true, or None below the threshold, and its probability."""
    probabilities = model(**inputs).logits.float().softmax(dim=-1)  # (num_texts, num_labels)
    best = probabilities.max(dim=-1)
    judged = []
    for label, confidence in zip(best.indices.tolist(), best.values.tolist()):
        is_sure = confidence >= threshold
        judged.append((label if is_sure else None, round(confidence, 4)))
    return judged


class Head(NamedTuple):
    """The column of a model's texts, the columns of its predictions, and the function that makes them."""

    text: str
    columns: dict[str, Value]
    predict: Callable


TEXT, NUMBER = Value("string"), Value("float64")
WRITTEN = {"confidence": NUMBER, "unknown_words": TEXT}
BOX = dict.fromkeys(("x0", "y0", "x1", "y1"), NUMBER)
HEADS: dict[type, Head] = {
    TripsForQuestionAnswering: Head("question", {"answer": TEXT, **WRITTEN}, write_texts),
    TripsForConditionalGeneration: Head("prompt", {"caption": TEXT, **WRITTEN}, write_texts),
    TripsForVisualGrounding: Head("expression", BOX, find_boxes),
    TripsForImagesAndTextClassification: Head("statement", {"label": Value("int64"), "confidence": NUMBER}, judge),
}


# What is asked about which photos


def read_texts(args: PredictArguments, head: Head) -> list[str]:
    """Return the texts to ask about each photo, each once."""
    texts = args.questions
    if args.questions_file is not None:
        file = Path(args.questions_file)
        if file.suffix.lower() == ".txt":
            texts = file.read_text(encoding="utf-8-sig").splitlines()
        else:
            texts = [filled_text(parsed_record(record), "question") for _, record in read_records(file)]
    elif not texts and head.text == "prompt":
        texts = [CAPTION_PROMPT]
    texts = [text for text in dict.fromkeys(texts) if text.strip()]
    if not texts:
        where = f"{args.questions_file} has none" if args.questions_file else "Give --questions or --questions_file"
        raise ValueError(f"The model needs a {head.text} for the photos. {where}.")
    return texts


# The table


@torch.inference_mode()
def predict(
    pixel_values: torch.Tensor,
    sizes: list[tuple[int, int]],
    texts: tuple[str, ...],
    threshold: float,
    model: TripsPreTrainedModel,
    processor: TripsProcessor,
) -> list[list[dict]]:
    """Return a row per text for each photo or pair of photos, as [`results_of`] gives them."""
    head = HEADS[type(model)]
    image_index = torch.arange(len(pixel_values)).view(len(sizes), -1)  # (num_photos, num_images)
    image_index = image_index.repeat_interleave(len(texts), dim=0).squeeze(1)
    asked = [*texts] * len(sizes)
    inputs = processor(text=asked, return_tensors="pt").to(model.device)
    inputs["pixel_values"] = pixel_values.to(model.device, model.dtype)
    inputs["image_index"] = image_index.to(model.device)
    sizes = [size for size in sizes for _ in texts]
    predictions = head.predict(model, processor, inputs, sizes, threshold)
    rows = []
    for text, prediction in zip(asked, predictions, strict=True):
        rows.append({head.text: text, **dict(zip(head.columns, prediction))})
    return [rows[start : start + len(texts)] for start in range(0, len(rows), len(texts))]


def rows_of_part(photos: tuple[dict, ...], batch_size: int, bar: tqdm, **given) -> Iterator[dict]:
    for photo, rows in results_of(photos, partial(predict, **given), given["processor"], batch_size):
        bar.update()
        for row in rows or [{"error": photo["error"]}]:
            yield {"image": photo["source"], **row}


def table_of(
    shard: Shard,
    texts: list[str],
    model: TripsPreTrainedModel,
    processor: TripsProcessor,
    args: PredictArguments,
    made_by: tuple,
    bar: tqdm,
) -> Dataset:
    """Return the rows of a shard. Those of some photos at a time are kept, under the version `made_by`."""
    head = HEADS[type(model)]
    features = {"image": TEXT, head.text: TEXT, **head.columns, "error": TEXT}
    shard_files = [] if isinstance(shard, FolderShard) else [shard.name]
    photos = rows_of(shard, args.image_column, getattr(model, "num_images", 1))
    parts = []
    for part in map(tuple, chunk_iterable(photos, PHOTOS_PER_PART)):
        paths = [image for photo in part for image in photo["images"] if isinstance(image, str)]
        stamps = [stamp_of(path) for path in shard_files + paths]
        names = [(photo["source"], photo["error"]) for photo in part]
        done = bar.n + len(part)
        rows = kept_rows(
            rows_of_part,
            Features(features),
            version=(made_by, names, stamps),
            photos=part,
            batch_size=args.batch_size,
            bar=bar,
            texts=tuple(texts),  # the datasets library would split a list
            threshold=args.threshold,
            model=model,
            processor=processor,
        )
        parts.append(rows)
        bar.update(done - bar.n)  # those of an earlier run
    return concatenate_datasets(parts) if parts else Dataset.from_dict({})


def write_output(table: Dataset, args: PredictArguments):
    """Write the table, and print how many rows it has. At least one must have no error."""
    with whole_file(args.output) as partial:
        if partial.suffix.lower() == ".csv":
            with partial.open("wb") as file:
                file.write(codecs.BOM_UTF8)  # or Excel reads another encoding
                table.to_csv(file)
        elif partial.suffix.lower() == ".jsonl":
            with partial.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in table)
        else:
            table.to_parquet(partial)
    errors = [error for error in table["error"] if error is not None]
    faults = Counter(error.partition(" (")[0] for error in errors)
    reasons = ", ".join(f"{reason}: {count}" for reason, count in faults.most_common())
    reasons = f" ({reasons})" if reasons else ""
    num_predictions = len(table) - len(errors)
    print(f"{args.output}: {num_predictions} predictions; photos that cannot be used: {len(errors)}{reasons}.")
    if num_predictions == 0:
        raise ValueError(f"No photo could be used: the column error of {args.output} says why.")


def main(argv: list[str] | None = None):
    (args,) = OPTIONS.parse_args_into_dataclasses(args=argv)
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    head = HEADS[check_head(args.model, list(HEADS))]
    texts = read_texts(args, head)
    shards = find_images(args.images, args.image_root)
    # Without `cpu`, Accelerate takes each process of a launch on a CPU for the only one.
    is_on_cpu = torch.device(args.device).type == "cpu"
    state = PartialState(cpu=is_on_cpu, timeout=timedelta(days=7))  # processes wait for the slowest
    model = load_checkpoint(args.model, list(HEADS)).to(args.device)
    processor = load_processor(args.model, model.config)
    processor(text=texts)  # the error of a text that is too long names it
    if getattr(model, "num_images", 1) == 2 and any(isinstance(shard, FolderShard) for shard in shards):
        raise ValueError("Statements are about two photos: --images must be rows with left_image and right_image.")
    own_shards = list(enumerate(shards))[state.process_index :: state.num_processes]
    folders = [shard for _, shard in own_shards if isinstance(shard, FolderShard)]
    total = None  # the rows of files and archives are not known
    if len(folders) == len(own_shards):
        total = sum(len(folder.paths) for folder in folders)
    made_by = (version_of_model(args.model), texts, args.threshold, args.image_column)
    own_tables = []
    with tqdm(desc="Photos", unit=" photos", total=total, disable=not state.is_main_process) as bar:
        for number, shard in own_shards:
            table = table_of(shard, texts, model, processor, args, made_by, bar)
            if len(table):
                own_tables.append((number, table))
    tables = dict(gather_object(own_tables))
    if not tables:
        raise ValueError(f"--images {' '.join(args.images)} has no rows.")
    if state.is_main_process:
        write_output(concatenate_datasets([tables[number] for number in sorted(tables)]), args)


if __name__ == "__main__":
    run_script(main)
