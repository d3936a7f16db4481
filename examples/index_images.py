"""
Embed a collection of images and write a Lance table of vectors for `search.py`. Needs the extra `index`.

    python examples/index_images.py --model outputs/retrieval --images photos --table photos.lance
    python examples/index_images.py --model outputs/retrieval --images "shards/{000..099}.tar" --table photos.lance
    python examples/index_images.py --model outputs/retrieval --images "photos/*.parquet" --table photos.lance
    python examples/index_images.py --model outputs/retrieval --dataset_name org/photos --table photos.lance

A second run continues and skips images that are in the table. An image that cannot be used is counted, named, and gets
a row without a vector; the exit code is 1 if the table has no other images. Ray's actors embed the images, by default
one actor on one CPU (`--num_actors`, `--gpus_per_actor`), on this machine or on the cluster `--ray_address`, where
paths must be the same on all machines.
"""

from dataclasses import dataclass, field

from trips_examples.data.source import option
from trips_examples.training.options import make_parser, run_script


@dataclass
class IndexArguments:
    model: str = field(metadata={"help": "Retrieval checkpoint (folder or name on the Hub), or exported model."})
    table: str = field(metadata={"help": "Location of the Lance table: a folder, or a URI such as s3://..."})
    images: list[str] = option([], "Folders of images; WebDataset shards; Parquet, JSONL, CSV with images or paths.")
    dataset_name: str | None = option(None, "A data set on the Hub, in place of --images.")
    dataset_split: str = option("train", "Split of the Hub data set.")
    image_root: str | None = option(None, "Folder that paths in rows are relative to. Default: that of their file.")
    image_column: str | None = option(None, "Image column of rows. Default: image, jpg, png, ...")
    schedule: str | None = option(None, "Schedule in place of the checkpoint's, as in 5:image:0.7,12:image:0.5")
    dtype: str = option("auto", "Dtype of the computation, such as bfloat16.")
    batch_size: int = option(32, "Batch size of each actor.")
    rows_per_commit: int = option(512, "Images of an actor per commit; a killed actor loses at most these.")
    num_actors: int = option(1, "Number of processes that embed, each with a model.")
    cpus_per_actor: int = option(1, "Threads of each actor.")
    gpus_per_actor: float = option(0.0, "GPUs of each actor. With 0.25, four actors share a GPU.")
    num_readers: int = option(1, "Shards that are read at a time, with one CPU each.")
    ray_address: str | None = option(None, "Address of a Ray cluster. Default: this machine.")
    object_store_mb: int = option(512, "Memory of Ray's object store on this machine.")
    retry_broken: bool = option(False, "Try images again that could not be used before.")
    index_from: int = option(10_000, "Number of vectors from which an index is built.")

    def __post_init__(self):
        if bool(self.images) == bool(self.dataset_name):
            raise ValueError("Give either --images or --dataset_name.")


OPTIONS = make_parser(IndexArguments, description=__doc__, script=__name__)

import logging
import os
import warnings
from collections import Counter
from collections.abc import Iterator

import lance
import numpy as np
import pyarrow as pa
import torch
import transformers
from tqdm.auto import tqdm

from trips_examples.data.images import decode_untrusted_image, path_or_bytes
from trips_examples.data.streams import hub_shards
from trips_examples.data.tasks import BadRowError
from trips_examples.indexing import table as tables
from trips_examples.indexing.sources import Shard, blocks_of, find_images


NAMED = 20  # largest number of unusable images to name
BLOCK_BYTES = 2**24  # size of a block of rows that is sent between processes


class Embedder:
    """Actor that converts rows of `ROW_SCHEMA` to fragments of the table at `uri`."""

    def __init__(self, args: IndexArguments, uri: str):
        transformers.utils.logging.disable_progress_bar()
        torch.set_num_threads(args.cpus_per_actor)
        self.uri, self.batch_size = uri, args.batch_size
        device = "cuda" if args.gpus_per_actor else "cpu"
        self.model, self.processor = tables.load_model(args.model, args.schedule, args.dtype, device)

    def __call__(self, rows: pa.Table) -> dict[str, list]:
        given = rows.to_pylist()
        for start in range(0, len(given), self.batch_size):
            self.embed(given[start : start + self.batch_size])
        schema = tables.table_schema(self.model.config.projection_dim)
        fragments = tables.write_rows(self.uri, pa.Table.from_pylist(given, schema=schema))
        return {"fragments": [fragments], "rows": [len(given)]}

    @torch.inference_mode()
    def embed(self, rows: list[dict]):
        """Set the `vector` or the `error` of each row."""
        images = []
        for row in rows:
            if row["error"] is None:
                try:
                    images.append(decode_untrusted_image(path_or_bytes(row["image"]), self.processor.patch_size))
                except BadRowError as error:
                    row["error"] = str(error)
        if not images:
            return
        pixel_values = self.processor(images=images, return_tensors="pt")["pixel_values"]
        outputs = self.model.get_image_features(pixel_values.to(self.model.device, self.model.dtype))
        vectors = outputs.pooler_output.float().cpu().numpy()
        if not np.isfinite(vectors).all():
            raise ValueError("The model's image features are not finite. Use a wider --dtype.")
        for row, vector in zip((row for row in rows if row["error"] is None), vectors, strict=True):
            row["vector"] = vector


def start_ray(args: IndexArguments):
    """Join a Ray cluster, or start Ray on this machine until this process ends. Usage statistics are off."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    warnings.filterwarnings("ignore", message="lance is not fork-safe")  # Ray's forks start a new program
    import ray.data

    logging.getLogger("ray.data").setLevel("ERROR")
    logging.getLogger("ray._private.authentication").setLevel("ERROR")  # a warning that authentication is on
    cpus = args.num_readers + args.num_actors * args.cpus_per_actor
    needs = {"CPU": cpus, "GPU": args.num_actors * args.gpus_per_actor}
    local = {"num_cpus": cpus, "object_store_memory": args.object_store_mb * 2**20, "include_dashboard": False}
    ray.init(args.ray_address or "local", logging_level=logging.WARNING, **({} if args.ray_address else local))
    has = {name: ray.cluster_resources().get(name, 0) for name in needs}
    if any(has[name] < need for name, need in needs.items()):
        raise ValueError(
            f"The workers need {needs}, but Ray has {has}. Lower --num_actors, --num_readers, --cpus_per_actor or "
            "--gpus_per_actor."
        )


def embed_images(table: lance.LanceDataset, shards: list[Shard], args: IndexArguments):
    """
    Add the images of shards that are not in the table. Readers send rows to the actors, which embed them and write
    their data. Only this process commits, so that an image is in the table once or not at all if a process is killed.
    """
    import ray

    context = ray.data.DataContext.get_current()
    context.target_max_block_size = BLOCK_BYTES
    context.enable_progress_bars = False
    done = np.sort(table.to_table(columns=["id"])["id"].to_numpy().astype("S32"))
    stored = ray.put(done)

    def read(batch: dict[str, np.ndarray]) -> Iterator[pa.Table]:
        for shard in batch["item"]:
            yield from blocks_of(shard, ray.get(stored), args.image_column)

    rows = ray.data.from_items(shards, override_num_blocks=len(shards)).map_batches(
        read,
        batch_size=1,
        compute=ray.data.TaskPoolStrategy(size=args.num_readers),
        memory=8 * BLOCK_BYTES,  # unlike the actors', because Ray fuses stages with equal resources
    )
    results = rows.map_batches(
        Embedder,
        fn_constructor_args=[args, table.uri],
        batch_size=args.rows_per_commit,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=args.num_actors),
        num_cpus=args.cpus_per_actor,
        num_gpus=args.gpus_per_actor,
    )
    with tqdm(desc="Images", initial=len(done), unit=" images") as bar:
        for result in results.iter_rows():
            table = tables.commit(table, result["fragments"])
            bar.update(result["rows"])


def main(argv: list[str] | None = None):
    (args,) = OPTIONS.parse_args_into_dataclasses(args=argv)
    transformers.utils.logging.disable_progress_bar()
    if args.dataset_name:
        shards: list[Shard] = [*hub_shards(args.dataset_name, split=args.dataset_split)]
    else:
        shards = find_images(args.images, args.image_root)
    model, processor = tables.load_model(args.model, args.schedule)
    fingerprint = tables.fingerprint_of(model, processor)
    with tables.only_writer(args.table):
        table = tables.open_table(args.table, fingerprint, model.config.projection_dim)
        del model
        retried = "error IS NOT NULL" if args.retry_broken else "error LIKE 'missing image%'"
        if table.count_rows(retried):
            table.delete(retried)
        start_ray(args)
        embed_images(table, shards, args)
        table = tables.open_table(args.table, fingerprint)
        outcome = tables.build_index(table, args.index_from)
        broken = table.to_table(columns=["source", "error"], filter="error IS NOT NULL").to_pylist()
    for row in broken[:NAMED]:
        print(f"{row['source']}: {row['error']}")
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
