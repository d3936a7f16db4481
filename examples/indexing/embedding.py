"""
Embedding of images in Ray's actors. Readers send rows to the actors, which embed them and write their data. Only this
process commits, so that an image is in the table once or not at all if a process is killed.
"""

import logging
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import lance
import numpy as np
import pyarrow as pa
import torch
import transformers
from tqdm.auto import tqdm

from trips_examples.data.faults import BadRowError
from trips_examples.data.images import decode_untrusted_image, path_or_bytes
from trips_examples.indexing.sources import Shard, blocks_of
from trips_examples.indexing.table import commit, ids_of, load_model, table_schema, write_rows


BLOCK_BYTES = 2**24  # size of a block of rows that is sent between processes


@dataclass(frozen=True)
class Embedding:
    """
    Options of embedding.

    Args:
        checkpoint, schedule, dtype: as in `load_model`.
        device (`str`): device of each actor, `"cpu"` or `"cuda"`.
        num_threads (`int`): PyTorch threads of each actor.
        batch_size (`int`)
        store_images (`bool`): whether to store images without their own file in the table.
    """

    checkpoint: str
    schedule: str | None = None
    dtype: str = "auto"
    device: str = "cpu"
    num_threads: int = 1
    batch_size: int = 32
    store_images: bool = True


class Embedder:
    """Actor that converts rows of `ROW_SCHEMA` to fragments of the table at `uri`."""

    def __init__(self, embedding: Embedding, uri: str):
        transformers.utils.logging.disable_progress_bar()
        torch.set_num_threads(embedding.num_threads)
        self.embedding, self.uri = embedding, uri
        self.model, self.processor = load_model(
            embedding.checkpoint, embedding.schedule, embedding.dtype, embedding.device
        )

    def __call__(self, rows: pa.Table) -> dict[str, list]:
        given, size = rows.to_pylist(), self.embedding.batch_size
        embedded = [row for start in range(0, len(given), size) for row in self.embed(given[start : start + size])]
        schema = table_schema(self.model.config.projection_dim)
        fragments = write_rows(self.uri, pa.Table.from_pylist(embedded, schema=schema))
        broken = [f"{row['source']}: {row['error']}" for row in embedded if row["error"] is not None]
        return {"fragments": [fragments], "rows": [len(embedded)], "broken": [broken]}

    def embed(self, rows: list[dict]) -> list[dict]:
        """Return the rows, each with a `vector` or an `error`."""
        images, vectors = [], []
        for row in rows:
            if row["error"] is None:
                try:
                    images.append(decode_untrusted_image(path_or_bytes(row["image"]), self.processor.patch_size))
                except BadRowError as error:
                    row["error"] = str(error)
        if images:
            vectors = list(self._vectors(images))
        for row in rows:
            row["vector"] = vectors.pop(0) if row["error"] is None else None
            if row["image"] is not None and row["image"]["bytes"] is not None and not self.embedding.store_images:
                row["image"] = None
        return rows

    @torch.inference_mode()
    def _vectors(self, images: list) -> np.ndarray:
        pixel_values = self.processor(images=images, return_tensors="pt")["pixel_values"]
        outputs = self.model.get_image_features(pixel_values.to(self.model.device, self.model.dtype))
        vectors = outputs.pooler_output.float().cpu().numpy()
        if not np.isfinite(vectors).all():
            raise ValueError("The model's image features are not finite. Use a wider --dtype.")
        return vectors


@dataclass(frozen=True)
class Workers:
    """
    Resources of embedding.

    Args:
        num_actors (`int`): number of actors that embed.
        cpus_per_actor (`int`), gpus_per_actor (`float`): resources of each actor.
        num_readers (`int`): number of shards that are read at a time, with one CPU each.
    """

    num_actors: int = 1
    cpus_per_actor: int = 1
    gpus_per_actor: float = 0.0
    num_readers: int = 1

    @property
    def needs(self) -> dict[str, float]:
        cpus = self.num_readers + self.num_actors * self.cpus_per_actor
        return {"CPU": cpus, "GPU": self.num_actors * self.gpus_per_actor}


def start_ray(address: str | None, workers: Workers, object_store_mb: int):
    """
    Join a Ray cluster, or start Ray on this machine until this process ends. Usage statistics are off.

    Raises:
        ValueError: The cluster has fewer resources than the workers need.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    warnings.filterwarnings("ignore", message="lance is not fork-safe")  # Ray's forks start a new program
    import ray.data

    logging.getLogger("ray.data").setLevel("ERROR")
    logging.getLogger("ray._private.authentication").setLevel("ERROR")  # a warning that authentication is on
    if address is None:
        options = {"num_cpus": workers.needs["CPU"], "object_store_memory": object_store_mb * 2**20}
        ray.init("local", include_dashboard=False, logging_level=logging.WARNING, **options)
    else:
        ray.init(address, logging_level=logging.WARNING)
    has = ray.cluster_resources()
    lacking = {name: need for name, need in workers.needs.items() if has.get(name, 0) < need}
    if lacking:
        raise ValueError(
            f"The workers need {workers.needs}, but Ray has { ({name: has.get(name, 0) for name in lacking}) }. Lower "
            "--num_actors, --num_readers, --cpus_per_actor or --gpus_per_actor."
        )


def embed_images(
    table: lance.LanceDataset,
    shards: list[Shard],
    embedding: Embedding,
    workers: Workers,
    rows_per_commit: int = 512,
    image_column: str | None = None,
) -> Iterator[str]:
    """
    Add the images of shards that are not in the table. Call `start_ray` first.

    Args:
        table (`lance.LanceDataset`)
        shards (`list[Shard]`)
        embedding ([`Embedding`]), workers ([`Workers`])
        rows_per_commit (`int`, *optional*, defaults to 512): images of an actor per commit. A killed actor loses at
            most these.
        image_column (`str`, *optional*): as in `rows_of`.

    Yields:
        `str`: source and error of each image that cannot be used.
    """
    import ray

    context = ray.data.DataContext.get_current()
    context.target_max_block_size = BLOCK_BYTES
    context.enable_progress_bars = False
    done = ids_of(table)
    stored = ray.put(done)

    def read(batch: dict[str, np.ndarray]) -> Iterator[pa.Table]:
        for shard in batch["item"]:
            yield from blocks_of(shard, ray.get(stored), image_column)

    rows = ray.data.from_items(shards, override_num_blocks=len(shards)).map_batches(
        read,
        batch_size=1,
        compute=ray.data.TaskPoolStrategy(size=workers.num_readers),
        memory=8 * BLOCK_BYTES,  # unlike the actors', because Ray fuses stages with equal resources
    )
    results = rows.map_batches(
        Embedder,
        fn_constructor_args=[embedding, table.uri],
        batch_size=rows_per_commit,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=workers.num_actors),
        num_cpus=workers.cpus_per_actor,
        num_gpus=workers.gpus_per_actor,
    )
    with tqdm(desc="Images", initial=len(done), unit=" images") as bar:
        for result in results.iter_rows():
            table = commit(table, result["fragments"])
            bar.update(result["rows"])
            yield from result["broken"]
