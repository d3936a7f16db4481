"""
Embed a collection of images and write a Lance table of vectors for `search.py`. Needs the extra `index`.

    python examples/index_images.py --model outputs/retrieval --images photos --table photos.lance
    python examples/index_images.py --model outputs/retrieval --images "shards/{000..099}.tar" --table photos.lance
    python examples/index_images.py --model outputs/retrieval --images "photos/*.parquet" --table photos.lance
    python examples/index_images.py --model outputs/retrieval --dataset_name org/photos --table photos.lance

A second run continues and skips images that are in the table. An image that cannot be used is counted, named, and gets
a row without a vector; the exit code is 1 if the table has no other images. Each of several processes embeds a part of
the shards; paths must be the same on all machines:

    torchrun --nproc_per_node 8 examples/index_images.py --model outputs/retrieval --images photos --table photos.lance
"""

from dataclasses import MISSING, dataclass

from trips_examples.data.source import option
from trips_examples.training.options import make_parser, run_script


@dataclass
class IndexArguments:
    model: str = option(MISSING, "Retrieval checkpoint (folder or name on the Hub), or exported model.")
    table: str = option(MISSING, "Location of the Lance table: a folder, or a URI such as s3://...")
    images: list[str] = option([], "Folders of images; WebDataset shards; Parquet, JSONL, CSV with images or paths.")
    dataset_name: str | None = option(None, "A data set on the Hub, in place of --images.")
    dataset_split: str = option("train", "Split of the Hub data set.")
    image_root: str | None = option(None, "Folder that paths in rows are relative to. Default: that of their file.")
    image_column: str | None = option(None, "Image column of rows. Default: image, jpg, png, ...")
    schedule: str | None = option(None, "Schedule in place of the checkpoint's, as in 5:image:0.7,12:image:0.5")
    device: str = option("cpu", "Such as cuda.")
    dtype: str = option("auto", "Dtype of the computation, such as bfloat16.")
    batch_size: int = option(32, "Images per step.")
    rows_per_commit: int = option(512, "Images per commit; a killed process loses at most these.")
    retry_broken: bool = option(False, "Try images again that could not be used before.")
    index_from: int = option(10_000, "Number of vectors from which an index is built.")

    def __post_init__(self):
        if bool(self.images) == bool(self.dataset_name):
            raise ValueError("Give either --images or --dataset_name.")


OPTIONS = make_parser(IndexArguments, description=__doc__, script=__name__)

from collections import Counter
from contextlib import nullcontext
from datetime import timedelta

import lance
import numpy as np
import pyarrow as pa
import torch
import transformers
from accelerate import PartialState
from huggingface_hub.utils import chunk_iterable
from tqdm.auto import tqdm

from modeling_trips import TripsProcessor
from trips_examples.data.images import decode_untrusted_image, path_or_bytes
from trips_examples.data.printing import visible
from trips_examples.data.streams import hub_shards
from trips_examples.data.tasks import BadRowError
from trips_examples.indexing import table as tables
from trips_examples.indexing.sources import Shard, find_images, new_rows_of
from trips_examples.training.files import only_writer


NAMED = 20  # largest number of unusable images to name


@torch.inference_mode()
def embed(rows: list[dict], model: tables.Retriever, processor: TripsProcessor):
    """Set the `vector` or the `error` of each row of `ROW_SCHEMA`."""
    images = []
    for row in rows:
        if row["error"] is None:
            try:
                images.append(decode_untrusted_image(path_or_bytes(row["image"]), processor.patch_size))
            except BadRowError as error:
                row["error"] = str(error)
    if not images:
        return
    pixel_values = processor(images=images, return_tensors="pt")["pixel_values"]
    outputs = model.get_image_features(pixel_values.to(model.device, model.dtype))
    vectors = outputs.pooler_output.float().cpu().numpy()
    if not np.isfinite(vectors).all():
        raise ValueError("The model's image features are not finite. Use a wider --dtype.")
    usable = [row for row in rows if row["error"] is None]
    for row, vector in zip(usable, vectors, strict=True):
        row["vector"] = vector


def embed_images(
    table: lance.LanceDataset,
    shards: list[Shard],
    model: tables.Retriever,
    processor: TripsProcessor,
    args: IndexArguments,
):
    """
    Add the images of this process's shards that are not in the table. An image is in the table once or not at all if a
    process is killed, because a commit is atomic.
    """
    state = PartialState()
    done = np.sort(table.to_table(columns=["id"])["id"].to_numpy().astype("S32"))
    schema = tables.table_schema(model.config.projection_dim)
    own_shards = shards[state.process_index :: state.num_processes]
    if state.num_processes > 1:
        print(
            f"Process {state.process_index + 1} of {state.num_processes}: {len(own_shards)} of {len(shards)} shards",
            flush=True,
        )
    rows = (row for shard in own_shards for row in new_rows_of(shard, done, args.image_column))
    with tqdm(desc="Images", unit=" images", disable=not state.is_main_process) as bar:
        for block in map(list, chunk_iterable(rows, args.rows_per_commit)):
            for batch in chunk_iterable(block, args.batch_size):
                embed(list(batch), model, processor)
            table = tables.add_rows(table, pa.Table.from_pylist(block, schema=schema))
            bar.update(len(block))


def main(argv: list[str] | None = None):
    (args,) = OPTIONS.parse_args_into_dataclasses(args=argv)
    transformers.utils.logging.disable_progress_bar()
    if args.dataset_name:
        shards: list[Shard] = [*hub_shards(args.dataset_name, split=args.dataset_split)]
    else:
        shards = find_images(args.images, args.image_root)
    # Without `cpu`, Accelerate takes each process of a launch on a CPU for the only one.
    is_on_cpu = torch.device(args.device).type == "cpu"
    state = PartialState(cpu=is_on_cpu, timeout=timedelta(days=7))  # processes wait for the slowest
    fingerprint = tables.fingerprint_of(*tables.load_model(args.model, args.schedule))
    model, processor = tables.load_model(args.model, args.schedule, args.dtype, args.device)
    with only_writer(args.table) if state.is_main_process else nullcontext():
        with state.main_process_first():
            table = tables.open_table(args.table, fingerprint, model.config.projection_dim)
            retried = "error IS NOT NULL" if args.retry_broken else "error LIKE 'missing image%'"
            if state.is_main_process and table.count_rows(retried):
                table.delete(retried)
        embed_images(table, shards, model, processor, args)
        state.wait_for_everyone()
        if not state.is_main_process:
            return
        table = tables.open_table(args.table, fingerprint)
        outcome = tables.build_index(table, args.index_from)
        broken = table.to_table(columns=["source", "error"], filter="error IS NOT NULL").to_pylist()
    for row in broken[:NAMED]:
        print(visible(f"{row['source']}: {row['error']}"))
    faults = Counter(row["error"].partition(" (")[0] for row in broken)
    num_usable = table.count_rows() - faults.total()
    reasons = ", ".join(f"{reason}: {count}" for reason, count in faults.most_common())
    reasons = f" ({reasons})" if reasons else ""
    print(f"{args.table}: {num_usable} images, {faults.total()} that cannot be used{reasons}; {outcome}.")
    if faults:
        print("Missing images are tried again by the next run, others with --retry_broken.")
    if num_usable == 0:
        raise ValueError(f"{args.table} has no image that can be used.")


if __name__ == "__main__":
    run_script(main)
