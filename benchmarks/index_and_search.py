r"""
Measure indexing and search: speedup by actors, memory, recall of the index, gain by reranking, and time of the stages.

    python benchmarks/index_and_search.py --model outputs/retrieval --output_json rows.json
    python benchmarks/index_and_search.py --model outputs/retrieval --parts vectors --num_vectors 1000000

Parts, each with its own rows:

- `actors`: images per second with one actor and with two, in alternating rounds, from the first commit to the last,
  without startup time.
- `memory`: peak memory and CPU time of few images and of many. The difference gives the cost of an image.
- `search`: scenes with captions. For each caption: features, exact search, index search and reranking, the recall of
  the index, and how often the correct image comes first before and after reranking.
- `vectors`: random vectors in clusters, at the size of a large collection: the index's build, size, recall and time.

Times are wall time and CPU time. On a shared machine, use CPU time.
"""

import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import PIL.Image
import psutil
import pyarrow as pa
import pyarrow.parquet
import ray
import transformers
from measuring import OutputArguments, check_choices, run_benchmark
from tqdm.auto import tqdm

from modeling_trips import convert_to_rgb
from modeling_trips.inspection.speed import CLOCKS
from trips_examples.data.loading import load_task_dataset
from trips_examples.data.source import DataSource
from trips_examples.indexing.embedding import Embedding, Workers, embed_images, start_ray
from trips_examples.indexing.finding import Finder
from trips_examples.indexing.sources import find_images, id_of
from trips_examples.indexing.table import (
    Fingerprint,
    build_index,
    commit,
    fingerprint_of,
    load_model,
    open_or_create_table,
    table_schema,
    write_rows,
)
from trips_examples.training.files import write_whole


PARTS = ("actors", "memory", "search", "vectors")
ROWS_PER_FILE = 250  # a block between processes, and a commit
IMAGE_SIDE = 64  # of the images of the parts actors and memory
ACTOR = "ray::MapWorker"


@dataclass(kw_only=True)
class IndexBenchmarkArguments(OutputArguments):
    model: str = field(metadata={"help": "Retrieval checkpoint. Only the part search needs a trained one."})
    work_dir: str = field(default="outputs/index_benchmark", metadata={"help": "Folder of images and tables."})
    parts: list[str] = field(default_factory=lambda: list(PARTS), metadata={"help": f"{', '.join(PARTS)}."})
    num_actors: list[int] = field(default_factory=lambda: [1, 2], metadata={"help": "Actors to compare."})
    actor_images: int = field(default=10_000, metadata={"help": "Images of each run of the part actors."})
    rounds: int = field(default=3, metadata={"help": "Runs of each number of actors."})
    memory_images: list[int] = field(default_factory=lambda: [1000, 50_000], metadata={"help": "Images, two numbers."})
    scenes: int = field(default=1000, metadata={"help": "Images with captions of the part search."})
    dataset_name: str | None = field(default=None, metadata={"help": "Dataset, as in run_retrieval.py."})
    pictures: list[str] | None = field(default=None, metadata={"help": "Pictures of --dataset_name picture_scenes."})
    queries: int = field(default=300, metadata={"help": "Queries of the parts search and vectors."})
    rerank_k: list[int] = field(default_factory=lambda: [10, 50], metadata={"help": "Numbers of reranked images."})
    num_vectors: list[int] = field(default_factory=lambda: [100_000], metadata={"help": "Numbers of vectors."})
    dim: int = field(default=256, metadata={"help": "Width of these vectors."})
    index_type: str = field(default="IVF_PQ", metadata={"help": "Index type of Lance."})
    probes: list[int] = field(default_factory=lambda: [1, 5, 20, 50], metadata={"help": "Searched partitions."})
    rows_per_commit: int = field(default=256, metadata={"help": "As in index_images.py."})
    num_threads: int = field(default=1, metadata={"help": "CPU threads."})

    def __post_init__(self):
        check_choices("--parts", self.parts, PARTS)


class Watch:
    """Monitor of the memory and CPU time of this process and its children, sampled twice per second."""

    def __enter__(self) -> "Watch":
        self.peak_mb, self.seconds = 0.0, {}
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._end.set()
        self._thread.join()

    @property
    def actor_seconds(self) -> float:
        return sum(seconds for name, seconds in self.seconds.values() if name.startswith(ACTOR))

    @property
    def all_seconds(self) -> float:
        return sum(seconds for _, seconds in self.seconds.values())

    def _watch(self):
        own = psutil.Process()
        while not self._end.wait(0.5):
            total = 0
            for process in (own, *own.children(recursive=True)):
                try:
                    total += process.memory_full_info().uss
                    times = process.cpu_times()
                    self.seconds[process.pid] = (" ".join(process.cmdline()), times.user + times.system)
                except psutil.Error:  # the process has ended
                    pass
            self.peak_mb = max(self.peak_mb, total / 2**20)


class Timer:
    """Timer of steps by name, with medians of wall time and CPU time in milliseconds."""

    def __init__(self):
        self.wall: dict[str, list[float]] = {}
        self.processor: dict[str, list[float]] = {}

    def __call__(self, name: str, step: Callable):
        result = []

        def run():
            wall = CLOCKS["wall"](lambda: result.append(step()), "cpu")
            self.wall.setdefault(name, []).append(1000 * wall)

        self.processor.setdefault(name, []).append(1000 * CLOCKS["process"](run, "cpu"))
        return result[0]

    @property
    def medians(self) -> dict[str, float]:
        kinds = {"ms": self.wall, "cpu_ms": self.processor}
        return {f"{name}_{kind}": statistics.median(times[name]) for kind, times in kinds.items() for name in times}


def write_images(folder: Path, count: int, side: int) -> list[str]:
    """Write different JPEGs of 8 x 8 colors to Parquet files of `ROWS_PER_FILE` rows, and keep existing files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for start in tqdm(range(0, count, ROWS_PER_FILE), desc="Images to index", unit=" files"):
        rows = range(start, min(start + ROWS_PER_FILE, count))
        file = folder / f"{side}px-{rows.start:07d}-{rows.stop:07d}.parquet"
        if not file.is_file():
            write_table(file, ({"image": {"bytes": jpeg(number, side), "path": None}} for number in rows))
        files.append(str(file))
    return files


def write_table(file: Path, rows: Iterator[dict]):
    buffer = pa.BufferOutputStream()
    pyarrow.parquet.write_table(pa.Table.from_pylist(list(rows)), buffer)
    write_whole(file, buffer.getvalue().to_pybytes())


def jpeg(number: int, side: int) -> bytes:
    colors = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    stream = pa.BufferOutputStream()
    PIL.Image.fromarray(colors).resize((side, side)).save(stream, "JPEG", quality=90)
    return stream.getvalue().to_pybytes()


def new_table(args: IndexBenchmarkArguments, name: str):
    model, processor = load_model(args.model)
    uri = Path(args.work_dir) / f"{name}-{time.time_ns()}.lance"
    return open_or_create_table(str(uri), fingerprint_of(model, processor), model.config.projection_dim)


def embed(args: IndexBenchmarkArguments, places: list[str], num_actors: int, name: str) -> dict:
    """Embed images with `num_actors` actors and return the measurements, from the start of Ray to its end."""
    table = new_table(args, name)
    workers = Workers(num_actors=num_actors)
    with Watch() as watch:
        start_ray(None, workers, object_store_mb=256)
        try:
            broken = list(
                embed_images(table, find_images(places), Embedding(args.model), workers, args.rows_per_commit)
            )
        finally:
            ray.shutdown()
    table = table.checkout_version(table.latest_version)
    images = table.count_rows()
    first, *_, last = table.versions()[1:]
    rows_after_first = images - table.checkout_version(first["version"]).count_rows()
    seconds = (last["timestamp"] - first["timestamp"]).total_seconds()
    return {
        "uri": table.uri,
        "num_actors": num_actors,
        "images": images,
        "broken": len(broken),
        "images_per_second": rows_after_first / seconds,
        "actor_cpu_seconds": watch.actor_seconds,
        "all_cpu_seconds": watch.all_seconds,
        "peak_mb": watch.peak_mb,
    }


def measure_actors(args: IndexBenchmarkArguments) -> Iterator[dict]:
    files = write_images(Path(args.work_dir) / "images", args.actor_images, IMAGE_SIDE)
    for number in range(args.rounds):
        for num_actors in args.num_actors:
            yield {"round": number, **embed(args, files, num_actors, "actors")}


def measure_memory(args: IndexBenchmarkArguments) -> Iterator[dict]:
    for count in args.memory_images:
        files = write_images(Path(args.work_dir) / "images", count, IMAGE_SIDE)
        yield embed(args, files, 1, "memory")


def write_scenes(args: IndexBenchmarkArguments) -> tuple[str, list[tuple[str, str]]]:
    """Write scenes and return their folder, and captions with the paths of their images."""
    source = DataSource(dataset_name=args.dataset_name, pictures=args.pictures, validation_scenes=args.scenes)
    data = load_task_dataset("captions", source)["validation"]
    folder = Path(args.work_dir).absolute() / f"scenes-{time.time_ns()}"
    folder.mkdir(parents=True)
    paths: dict[str, str] = {}
    queries = []
    for row in tqdm(data, desc="Scenes", unit=" captions"):
        if row["image_id"] not in paths:
            paths[row["image_id"]] = str(folder / f"{len(paths)}.png")
            convert_to_rgb(row["image"]).save(paths[row["image_id"]])
        queries.append((row["caption"], paths[row["image_id"]]))
    return str(folder), queries


def measure_search(args: IndexBenchmarkArguments) -> Iterator[dict]:
    folder, queries = write_scenes(args)
    uri = embed(args, [folder], 1, "search")["uri"]
    finder = Finder(uri, args.model)
    build_index(finder.table, args.index_type, fewest=0)
    finder = Finder(uri, args.model)
    step = max(1, len(queries) // args.queries)
    k = max(args.rerank_k)
    timer, recalls, right = Timer(), [], {name: [] for name in ("features", *map(str, args.rerank_k))}
    for caption, path in tqdm(queries[::step], desc="Captions", unit=" captions"):
        texts = timer("text_features", lambda: finder.describe_texts([caption]))  # noqa: B023
        (exact,) = timer("exact_search", lambda: finder.nearest(texts.embeds, k, exact=True))  # noqa: B023
        (found,) = timer("index_search", lambda: finder.nearest(texts.embeds, k))  # noqa: B023
        recalls.append(share_found([each.source for each in exact], [each.source for each in found]))
        right["features"].append(found[0].source == path)
        for count in args.rerank_k:
            (ranked,) = timer(f"rerank_{count}", lambda: finder.rerank(texts, [found[:count]]))  # noqa: B023
            right[str(count)].append(ranked[0].source == path)
    yield {
        "images": finder.table.count_rows(),
        "queries": len(recalls),
        f"index_recall_at_{k}": statistics.mean(recalls),
        "r1_by_features": statistics.mean(right.pop("features")),
        **{f"r1_reranked_{count}": statistics.mean(hits) for count, hits in right.items()},
        **timer.medians,
    }


def share_found(exact: list, found: list) -> float:
    return len(set(exact) & set(found)) / len(exact)


def make_vectors(count: int, dim: int, seed: int) -> np.ndarray:
    """Make unit vectors around 1,000 centers, because image features form clusters."""
    centers = np.random.default_rng(0).standard_normal((1000, dim), dtype=np.float32)
    rng = np.random.default_rng(seed)
    vectors = centers[rng.integers(0, len(centers), count)] + rng.standard_normal((count, dim), dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def write_vectors(args: IndexBenchmarkArguments, count: int):
    uri = str(Path(args.work_dir) / f"vectors-{time.time_ns()}.lance")
    table = open_or_create_table(uri, Fingerprint("random", "none", "none"), args.dim)
    for start in tqdm(range(0, count, 10_000), desc="Vectors", unit="0k"):
        vectors = make_vectors(min(10_000, count - start), args.dim, seed=1 + start)
        sources = [f"/photos/{number:012d}.jpg" for number in range(start, start + len(vectors))]
        rows = {
            "id": [id_of(source) for source in sources],
            "source": sources,
            "image": [{"bytes": None, "path": source} for source in sources],
            "error": pa.nulls(len(vectors), pa.string()),
            "vector": pa.FixedSizeListArray.from_arrays(vectors.ravel(), args.dim),
        }
        table = commit(table, write_rows(uri, pa.table(rows, schema=table_schema(args.dim))))
    return table


def measure_vectors(args: IndexBenchmarkArguments) -> Iterator[dict]:
    for count in args.num_vectors:
        timer = Timer()
        table = write_vectors(args, count)
        timer("build", lambda: build_index(table, args.index_type, fewest=0))  # noqa: B023
        table = table.checkout_version(table.latest_version)
        data_bytes = sum(file.stat().st_size for file in (Path(table.uri) / "data").iterdir())
        index_bytes = sum(index.total_size_bytes for index in table.describe_indices())
        queries = make_vectors(args.queries, args.dim, seed=0)
        exact = [nearest(table, query, use_index=False) for query in queries]
        recalls: dict[int, float] = {}
        for probes in args.probes:
            found = [
                timer(f"index_{probes}", lambda: nearest(table, query, nprobes=probes, refine_factor=10))  # noqa: B023
                for query in tqdm(queries, desc=f"{probes} probes", unit=" queries")
            ]
            recalls[probes] = statistics.mean(map(share_found, exact, found))
        for query in queries[:20]:
            timer("exact", lambda: nearest(table, query, use_index=False))  # noqa: B023
        yield {
            "vectors": count,
            "dim": args.dim,
            "index_type": args.index_type,
            "table_bytes_per_vector": data_bytes / count,
            "index_bytes_per_vector": index_bytes / count,
            **{f"recall_at_50_of_{probes}_probes": recall for probes, recall in recalls.items()},
            **timer.medians,
        }


def nearest(table, query: np.ndarray, k: int = 50, **how) -> list[str]:
    how = {"column": "vector", "q": query, "k": k, "metric": "cosine", **how}
    return table.to_table(columns=["id", "_distance"], nearest=how)["id"].to_pylist()


def measure(args: IndexBenchmarkArguments) -> Iterator[dict]:
    transformers.utils.logging.disable_progress_bar()
    measures = dict(zip(PARTS, (measure_actors, measure_memory, measure_search, measure_vectors)))
    for part in args.parts:
        for row in measures[part](args):
            yield {"part": part, **row, "options": args.settings()}


def print_rows(rows: list[dict], args: IndexBenchmarkArguments):
    for row in rows:
        shown = {name: value for name, value in row.items() if isinstance(value, (int, float))}
        print(f"{row['part']}: " + " ".join(f"{name}={value:.4g}" for name, value in shown.items()))


def main(argv: list[str] | None = None) -> list[dict]:
    return run_benchmark(IndexBenchmarkArguments, __doc__, measure, print_rows, argv)


if __name__ == "__main__":
    main()
