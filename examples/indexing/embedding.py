"""
Embedding of images in Ray's actors. Readers send rows to the actors, which embed them and write their data. Only this
process commits, so that an image is in the table once or not at all if a process is killed.
"""

import logging
import os
import warnings
from collections.abc import Iterator

import lance
import numpy as np
import pyarrow as pa
import torch
import transformers
from tqdm.auto import tqdm

from trips_examples.data.images import decode_untrusted_image, path_or_bytes
from trips_examples.data.tasks import BadRowError
from trips_examples.indexing.options import IndexArguments
from trips_examples.indexing.sources import Shard, blocks_of
from trips_examples.indexing.table import commit, ids_of, load_model, table_schema, write_rows


BLOCK_BYTES = 2**24  # size of a block of rows that is sent between processes


class Embedder:
    """Actor that converts rows of `ROW_SCHEMA` to fragments of the table at `uri`."""

    def __init__(self, args: IndexArguments, uri: str):
        transformers.utils.logging.disable_progress_bar()
        torch.set_num_threads(args.cpus_per_actor)
        self.uri, self.batch_size = uri, args.batch_size
        device = "cuda" if args.gpus_per_actor else "cpu"
        self.model, self.processor = load_model(args.model, args.schedule, args.dtype, device)

    def __call__(self, rows: pa.Table) -> dict[str, list]:
        given = rows.to_pylist()
        for start in range(0, len(given), self.batch_size):
            self.embed(given[start : start + self.batch_size])
        schema = table_schema(self.model.config.projection_dim)
        fragments = write_rows(self.uri, pa.Table.from_pylist(given, schema=schema))
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
    """Add the images of shards that are not in the table."""
    import ray

    context = ray.data.DataContext.get_current()
    context.target_max_block_size = BLOCK_BYTES
    context.enable_progress_bars = False
    done = ids_of(table)
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
            table = commit(table, result["fragments"])
            bar.update(result["rows"])
