"""
Images to vectors in Ray's actors. Readers hand rows on, actors embed them and write their data, and this process
alone commits: an image is in the table once or not at all, whatever is killed.
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


BLOCK_BYTES = 2**24  # of rows that go from process to process


@dataclass(frozen=True)
class Embedding:
    """
    How images become vectors.

    Args:
        checkpoint, schedule, dtype: as in `load_model`.
        device (`str`): of each actor: `"cpu"` or `"cuda"`.
        num_threads (`int`): of PyTorch, in each actor.
        batch_size (`int`): images that are embedded at a time.
        store_images (`bool`): whether images that have no file of their own are stored with their vectors.
    """

    checkpoint: str
    schedule: str | None = None
    dtype: str = "auto"
    device: str = "cpu"
    num_threads: int = 1
    batch_size: int = 32
    store_images: bool = True


class Embedder:
    """An actor: rows by `ROW_SCHEMA` in, fragments of the table at `uri` out."""

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
        """The rows, each with a `vector` or an `error` now."""
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
            raise ValueError("The model makes no finite numbers of images: is its precision wide enough?")
        return vectors


@dataclass(frozen=True)
class Workers:
    """
    Args:
        num_actors (`int`): those that embed.
        cpus_per_actor (`int`), gpus_per_actor (`float`): what each of them takes.
        num_readers (`int`): shards that are read at a time, each with one CPU.
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
    Joins a cluster, or starts what this machine needs, which ends with this process. Nothing is reported about use.

    Raises:
        ValueError: if the cluster has not what the workers need.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    warnings.filterwarnings("ignore", message="lance is not fork-safe")  # what Ray forks begins anew
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
            f"The workers need {workers.needs}, but Ray has { ({name: has.get(name, 0) for name in lacking}) }: take "
            "fewer --num_actors or --num_readers, or smaller --cpus_per_actor or --gpus_per_actor."
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
    Adds the images of shards that are not in the table. Needs `start_ray`.

    Args:
        table (`lance.LanceDataset`)
        shards (`list[Shard]`)
        embedding ([`Embedding`]), workers ([`Workers`])
        rows_per_commit (`int`, *optional*, defaults to 512): what an actor embeds before it is in the table; a kill
            loses that much of its work.
        image_column (`str`, *optional*): as in `rows_of`.

    Yields:
        `str`: of each image that cannot be used its place, and why.
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
        memory=8 * BLOCK_BYTES,  # which actors do not ask for: Ray would make one stage of what asks for the same
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
