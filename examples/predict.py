"""
Predict for a collection of photos: every photo with every question, as a table (.csv, .jsonl or .parquet).

    python examples/predict.py --model mine --images photos --questions "what is it?" "is it new?" --output answers.csv
    python examples/predict.py --model captions --images "photos/*.parquet" --output captions.jsonl
    python examples/predict.py --model boxes --images rows.csv --questions "the red car" --output boxes.csv
    python examples/predict.py --model statements --images pairs.csv --questions_file statements.txt --output true.csv

Questions are expressions for boxes, statements for pairs (a file of rows with `left_image` and `right_image`), and the
prompt for captions. A photo that cannot be used gets one row with its `error`. Until the output is whole, its rows are
in a folder beside it: a second run of the same command continues there. Each of several processes takes a part of the
shards: torchrun --nproc_per_node 8 examples/predict.py ...
"""

from dataclasses import MISSING, dataclass
from pathlib import Path

from trips_examples.data.source import check_is_file, option
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

    @property
    def parts(self) -> Path:
        """The folder of the rows until the output is whole."""
        return Path(f"{self.output}.parts")

    def check_files(self):
        """Raise an `OSError` for an output that exists, or a file that does not."""
        if Path(self.output).exists() and not self.parts.exists():
            raise FileExistsError(f"--output {self.output} exists. Give another name, or delete it.")
        if self.questions_file:
            check_is_file("questions_file", self.questions_file)


OPTIONS = make_parser(PredictArguments, description=__doc__, script=__name__)

import codecs
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from datetime import timedelta
from typing import NamedTuple

import datasets
import pyarrow as pa
import pyarrow.parquet
import torch
import transformers
from accelerate import PartialState
from datasets import Dataset
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
from trips_examples.data.collection import FolderShard, Shard, find_images, id_of, rows_of
from trips_examples.data.images import decode_untrusted_image, path_or_bytes
from trips_examples.data.loading import RowReader, stamp_of
from trips_examples.data.records import parsed_record, read_records
from trips_examples.data.tasks import TASKS, BadRowError, Fault, filled_text
from trips_examples.training.files import only_writer, write_whole


PHOTOS_PER_PART = 32  # a killed process loses at most the work on these
PARTS = "[0-9]*.parquet"  # not the hidden ones that a killed process leaves
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
    columns: dict[str, pa.DataType]
    predict: Callable


TEXT, NUMBER = pa.string(), pa.float64()
WRITTEN = {"confidence": NUMBER, "unknown_words": TEXT}
BOX = dict.fromkeys(("x0", "y0", "x1", "y1"), NUMBER)
HEADS: dict[type, Head] = {
    TripsForQuestionAnswering: Head("question", {"answer": TEXT, **WRITTEN}, write_texts),
    TripsForConditionalGeneration: Head("prompt", {"caption": TEXT, **WRITTEN}, write_texts),
    TripsForVisualGrounding: Head("expression", BOX, find_boxes),
    TripsForImagesAndTextClassification: Head("statement", {"label": pa.int64(), "confidence": NUMBER}, judge),
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


class Item(NamedTuple):
    """The photos (paths or encoded) that a prediction is about, their name in the output, and an id; or the error."""

    id: str
    name: str
    images: list[str | bytes]
    error: str | None


def items_of(shard: Shard, column: str | None, num_images: int) -> Iterator[Item]:
    """Yield the items of a shard: single photos, or the pairs of a file of rows."""
    if num_images == 1:
        for row in rows_of(shard, column):
            image = path_or_bytes(row["image"])
            name = image if isinstance(image, str) else row["source"]
            yield Item(row["id"], name, [image], row["error"])
        return
    if isinstance(shard, FolderShard):
        raise ValueError("Statements are about two photos: --images must be rows with left_image and right_image.")
    reader = RowReader(TASKS["nlvr2"], shard.name, getattr(shard, "image_root", ""))
    for record in shard:
        source = record.source if isinstance(record, Fault) else record["source"]
        images = []
        error = None
        if isinstance(record, Fault):
            error = record.error
        else:
            try:
                for value in map(path_or_bytes, reader.image_values(record)):
                    images.append(value if isinstance(value, bytes) else reader.path(value))
            except BadRowError as bad:
                error = str(bad)
        names = [image if isinstance(image, str) else source for image in images]
        yield Item(id_of(f"{shard.name} {source}"), "|".join(names) or source, images, error)


def count_new(shards: list[Shard], done: set[str], column: str | None, num_images: int) -> int | None:
    """Return the number of items that are not done, or None if that means to read all the images."""
    total = 0
    for shard in shards:
        if not isinstance(shard, FolderShard) and not shard.name.endswith((".csv", ".json", ".jsonl")):
            return None
        total += sum(item.id not in done for item in items_of(shard, column, num_images))
    return total


# Parts of the output


@torch.inference_mode()
def predict(
    items: list[Item], texts: list[str], threshold: float, model: TripsPreTrainedModel, processor: TripsProcessor
) -> list[dict]:
    """Return the rows of items: one per text, or one with the error of an item that cannot be used."""
    head = HEADS[type(model)]
    rows_of_item: dict[str, list[dict]] = {item.id: [] for item in items}
    usable = []
    pixel_values = []
    sizes = []  # (height, width) per text
    for item in items:
        error = item.error
        try:
            pixels = []
            for image in item.images if error is None else []:
                decoded = decode_untrusted_image(image, processor.patch_size)
                pixels.append(processor(images=decoded, return_tensors="pt")["pixel_values"])
        except BadRowError as bad:
            error = str(bad)
        if error is not None:
            rows_of_item[item.id].append({"error": error})
            continue
        usable.append(item)
        pixel_values += pixels
        sizes += [(decoded.height, decoded.width)] * len(texts)
    if usable:
        image_index = torch.arange(len(pixel_values)).view(len(usable), -1)  # (num_items, num_images)
        image_index = image_index.repeat_interleave(len(texts), dim=0).squeeze(1)
        inputs = processor(text=texts * len(usable), return_tensors="pt").to(model.device)
        inputs["pixel_values"] = torch.cat(pixel_values).to(model.device, model.dtype)
        inputs["image_index"] = image_index.to(model.device)
        predictions = head.predict(model, processor, inputs, sizes, threshold)
        asked = [(item, text) for item in usable for text in texts]
        for (item, text), prediction in zip(asked, predictions, strict=True):
            rows_of_item[item.id].append({head.text: text, **dict(zip(head.columns, prediction))})
    return [{"id": item.id, "image": item.name, **row} for item in items for row in rows_of_item[item.id]]


def write_parts(
    shards: list[Shard],
    texts: list[str],
    model: TripsPreTrainedModel,
    processor: TripsProcessor,
    args: PredictArguments,
):
    """Write the rows of this process's shards whose items are in no part yet. A part is whole or absent."""
    state = PartialState()
    head = HEADS[type(model)]
    num_images = getattr(model, "num_images", 1)
    schema = pa.schema({"id": TEXT, "image": TEXT, head.text: TEXT, **head.columns, "error": TEXT})
    done: set[str] = set()
    for part in args.parts.glob(PARTS):
        table = pyarrow.parquet.read_table(part, columns=["id"])
        done.update(table["id"].to_pylist())
    numbered_shards = list(enumerate(shards))[state.process_index :: state.num_processes]
    own_shards = [shard for _, shard in numbered_shards]
    total = count_new(own_shards, done, args.image_column, num_images)
    state.wait_for_everyone()  # all know what is done before new parts appear
    with tqdm(desc="Photos", unit=" photos", total=total, disable=not state.is_main_process) as bar:
        for number, shard in numbered_shards:
            items = items_of(shard, args.image_column, num_images)
            new_items = ((place, item) for place, item in enumerate(items) if item.id not in done)
            for block in chunk_iterable(new_items, PHOTOS_PER_PART):
                places, items_of_part = zip(*block)
                rows = []
                for batch in chunk_iterable(items_of_part, args.batch_size):
                    rows_of_batch = predict(list(batch), texts, args.threshold, model, processor)
                    rows += rows_of_batch
                    bar.update(len({row["id"] for row in rows_of_batch}))
                # In the order of the collection; the id tells parts apart if the collection has changed.
                name = f"{number:06d}-{places[0]:09d}-{items_of_part[0].id}.parquet"
                with whole_file(args.parts / name) as partial:
                    table = pa.Table.from_pylist(rows, schema=schema)
                    pyarrow.parquet.write_table(table, partial)


def write_output(args: PredictArguments):
    """Join the parts to the output, remove them, and print how many rows it has. At least one must have no error."""
    datasets.disable_progress_bars()
    parts = [str(part) for part in sorted(args.parts.glob(PARTS))]
    if not parts:
        raise ValueError(f"--images {' '.join(args.images)} has no rows.")
    table = Dataset.from_parquet(parts, cache_dir=str(args.parts / "cache")).remove_columns("id")
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
    num_rows = len(table)
    shutil.rmtree(args.parts)
    print(f"{args.output}: {num_rows - len(errors)} predictions; photos that cannot be used: {len(errors)}{reasons}.")
    if len(errors) == num_rows:
        raise ValueError(f"No photo could be used: the column error of {args.output} says why.")


def main(argv: list[str] | None = None):
    (args,) = OPTIONS.parse_args_into_dataclasses(args=argv)
    transformers.utils.logging.disable_progress_bar()
    head = HEADS[check_head(args.model, list(HEADS))]
    texts = read_texts(args, head)
    shards = find_images(args.images, args.image_root)
    # Without `cpu`, Accelerate takes each process of a launch on a CPU for the only one.
    is_on_cpu = torch.device(args.device).type == "cpu"
    state = PartialState(cpu=is_on_cpu, timeout=timedelta(days=7))  # processes wait for the slowest
    model = load_checkpoint(args.model, list(HEADS)).to(args.device)
    processor = load_processor(args.model, model.config)
    weights = stamp_of(Path(args.model, "model.safetensors").absolute())
    made_by = json.dumps({"model": weights, "texts": texts, "threshold": args.threshold})
    with only_writer(args.parts / "rows") if state.is_main_process else nullcontext():
        record = args.parts / "made_by.json"
        with state.main_process_first():
            if state.is_main_process and not any(args.parts.glob(PARTS)):
                write_whole(record, made_by)
        if record.read_text(encoding="utf-8") != made_by:
            raise ValueError(
                f"{args.parts} has rows of another model or other texts. Delete it, or give another --output."
            )
        write_parts(shards, texts, model, processor, args)
        state.wait_for_everyone()
        if state.is_main_process:
            write_output(args)


if __name__ == "__main__":
    run_script(main)
