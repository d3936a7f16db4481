"""
Search photos by texts or by another photo, with a retrieval model. The best images of a text are ranked again by
matching, with patches that are scored by the text.

    python examples/search.py --model outputs/retrieval --images photos --text "a red circle" "two dogs"
    python examples/search.py --model outputs/retrieval --images "photos/*.parquet" --image example.jpg

The first search computes the features of all images. The datasets library keeps them, those of 256 files of a folder
or of a shard at a time: a later search, or one that was killed, computes those of new and changed files only.
"""

from dataclasses import MISSING, dataclass

from trips_examples.data.source import option
from trips_examples.training.checks import check_device
from trips_examples.training.options import make_parser, run_script


@dataclass
class SearchArguments:
    model: str = option(MISSING, "Retrieval checkpoint (folder or name on the Hub), or exported model.")
    images: list[str] = option(
        MISSING, "Images or folders of them; WebDataset shards; Parquet, JSONL, CSV with images or paths."
    )
    text: list[str] = option([], "One or more texts to search for.")
    image: str | None = option(None, "An image to search similar ones for, in place of --text.")
    k: int = option(10, "Number of images for each query.")
    rerank_k: int = option(50, "Number of images to rank again for a text (0 disables).")
    device: str = option("cpu", "Such as cuda.")
    batch_size: int = option(32, "Images per step.")
    picture: str = option("outputs/found.png", "Picture of the results with the patches that the text keeps.")
    output_json: str | None = option(None, "JSON file: query, rank, source, similarity, score and match.")

    def __post_init__(self):
        if bool(self.text) == bool(self.image):
            raise ValueError("Give either --text or --image.")
        if min(self.k, self.rerank_k + 1, self.batch_size) < 1:
            raise ValueError("--k and --batch_size must be at least 1, and --rerank_k at least 0.")

    def check_files(self):
        """Raise a `ValueError` for a wrong device."""
        check_device(self.device)


OPTIONS = make_parser(SearchArguments, description=__doc__, script=__name__)

import math
import textwrap
from collections.abc import Iterator
from pathlib import Path

import datasets
import PIL.Image
import torch
import transformers
from datasets import Dataset, Features, Value, concatenate_datasets
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from modeling_trips import TripsForPreTraining, TripsForRetrieval
from modeling_trips.inspection import draw_kept_patches
from modeling_trips.inspection.checkpoints import is_exported, load_checkpoint, load_processor
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
from trips_examples.data.images import DecodedImages, column_of, decode_untrusted_image, path_or_bytes, stored_image
from trips_examples.data.loading import stamp_of
from trips_examples.data.printing import visible
from trips_examples.metrics.retrieval import RetrievalEvaluator, finite
from trips_examples.training.files import write_json


HEADS = (TripsForRetrieval, TripsForPreTraining)  # models with image features that match pairs
FEATURES = Features(
    {
        "source": Value("string"),
        "image": {"bytes": Value("binary"), "path": Value("string")},
        "error": Value("string"),
        "vector": datasets.List(Value("float32")),
    }
)


def rows_with_vectors(shard: Shard, evaluator: RetrievalEvaluator) -> Iterator[dict]:
    """Yield the images of a shard as rows with the columns `FEATURES`. Each has its `vector` or its `error`."""

    def embed(pixel_values: torch.Tensor, sizes: list) -> list:
        return finite(evaluator.image_features(pixel_values), "image").tolist()

    for row, vector in results_of(rows_of(shard), embed, evaluator.processor, evaluator.batch_size):
        (image,) = row.pop("images") or [None]
        yield {**row, "image": stored_image(image), "vector": vector}


def decoded(row: dict) -> PIL.Image.Image:
    return decode_untrusted_image(path_or_bytes(row["image"]))


def load_images(args: SearchArguments, evaluator: RetrievalEvaluator) -> Dataset:
    """Return the images with their features, and print those that cannot be used."""
    datasets.disable_progress_bars()
    model_version = version_of_model(args.model)
    parts = []
    for shard in tqdm(find_images(args.images), desc="Images"):
        files = shard.paths if isinstance(shard, FolderShard) else [shard.name]
        version = (model_version, shard, [stamp_of(file) for file in files])
        parts.append(kept_rows(rows_with_vectors, FEATURES, version, shard=shard, evaluator=evaluator))
    table = concatenate_datasets(parts)
    usable = []
    for place, (source, error) in enumerate(zip(column_of(table, "source"), column_of(table, "error"))):
        if error is None:
            usable.append(place)
        else:
            print(visible(f"{source}: {error}"))
    print(f"{len(usable)} images, {len(table) - len(usable)} that cannot be used.")
    if not usable:
        raise ValueError(f"--images {' '.join(args.images)} has no image that can be used.")
    return table.select(usable)


def search(args: SearchArguments, table: Dataset, evaluator: RetrievalEvaluator) -> list[dict]:
    """
    Return the best images of each query, best first, with their `number` in the table. `similarity` is the cosine of
    the features; with reranking, `match` is the probability that image and text match, and `score`, which ranks, its
    log-odds plus similarity over temperature.
    """
    vectors = table.with_format("torch", columns=["vector"])["vector"][:]  # (num_images, projection_dim)
    if args.image:
        embeds = evaluator.index_images([decode_untrusted_image(args.image)])
    else:
        texts = evaluator.index_texts(args.text)
        embeds = texts.embeds  # (num_texts, projection_dim)
    reranks = bool(args.text and args.rerank_k)
    num_candidates = min(max(args.k, args.rerank_k * reranks), len(table))
    similarities, numbers = (embeds.float() @ vectors.T).topk(num_candidates)  # (num_queries, num_candidates)
    scores = similarities
    if reranks:
        text_numbers = torch.arange(len(numbers))[:, None].expand_as(numbers)
        pairs = torch.stack((numbers.flatten(), text_numbers.flatten()), dim=1)
        order = pairs[:, 0].argsort(stable=True)
        log_odds = torch.empty(len(pairs))
        log_odds[order] = evaluator.match(DecodedImages(table, decoded), texts, pairs[order])
        log_odds = log_odds.view_as(scores)
        scores = log_odds + similarities / evaluator.model.temp().item()
    rows = []
    for query, text in enumerate(args.text or [args.image]):
        best = scores[query].argsort(descending=True, stable=True)[: args.k]
        for rank, place in enumerate(best.tolist(), start=1):
            row = {"query": text, "rank": rank, "number": numbers[query, place].item()}
            row["similarity"] = similarities[query, place].item()
            if reranks:
                row["score"] = scores[query, place].item()
                row["match"] = log_odds[query, place].sigmoid().item()
            rows.append(row)
    return rows


@torch.inference_mode()
def draw(image: PIL.Image.Image, text: str, evaluator: RetrievalEvaluator) -> PIL.Image.Image:
    """Return an image with the patches that the last layer keeps for a text."""
    inputs = evaluator.processor(images=image, text=text, return_tensors="pt").to(evaluator.model.device)
    selection = evaluator.model.match(**inputs).selection
    if not selection:
        return image
    (boxes,) = evaluator.processor.patch_boxes(selection[-1].kept_indices, [(image.height, image.width)])
    return draw_kept_patches(image, boxes)


def write_sheet(pictures: list[PIL.Image.Image], titles: list[str], path: str | Path):
    """Write a picture of images in rows of four, with up to three lines of a title above each."""
    num_rows = math.ceil(len(pictures) / 4)
    figure = Figure(figsize=(10, 3 * num_rows), layout="constrained")
    panels = figure.subplots(num_rows, 4, squeeze=False).ravel()
    for axes in panels:
        axes.axis("off")
    for axes, picture, title in zip(panels, pictures, titles):
        axes.imshow(picture)
        lines = textwrap.wrap(title, width=38, max_lines=3, placeholder=" ...")
        axes.set_title("\n".join(lines), fontsize=8)
    with whole_file(path) as partial:
        figure.savefig(partial)


def main(argv: list[str] | None = None):
    (args,) = OPTIONS.parse_args_into_dataclasses(args=argv)
    transformers.utils.logging.disable_progress_bar()
    if is_exported(args.model):
        from modeling_trips.export import load_exported  # an extra

        model = load_exported(args.model, HEADS)
    else:
        model = load_checkpoint(args.model, HEADS).to(args.device)
    processor = load_processor(args.model, model.config)
    evaluator = RetrievalEvaluator(model, processor, batch_size=args.batch_size, progress=False)
    table = load_images(args, evaluator)
    rows = search(args, table, evaluator)
    pictures = []
    for row in rows:
        found = table[row.pop("number")]
        row["source"] = found["source"]
        if row["rank"] == 1:
            print(row["query"])
        match = f"score {row['score']:6.2f}, match {row['match']:6.1%}, " if "match" in row else ""
        print(f"{row['rank']:>4}  {match}similarity {row['similarity']:.3f}  {visible(row['source'])}")
        picture = decoded(found)
        if args.text:
            picture = draw(picture, row["query"], evaluator)
        pictures.append(picture)
    write_sheet(pictures, [f"{row['rank']}: {row['query']}" for row in rows], args.picture)
    print(f"Picture: {args.picture}")
    if args.output_json is not None:
        write_json(args.output_json, rows)


if __name__ == "__main__":
    run_script(main)
