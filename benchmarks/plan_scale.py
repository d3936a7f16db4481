r"""
What a collection costs, by arithmetic on rows that `index_and_search.py` measured: core hours, disk, memory, time.

    python benchmarks/plan_scale.py --rows rows.json --images 1e6 1e8 1e10

Prints a table in Markdown, and above it what one image costs. Processor time is taken, so that the rows may be of a
busy machine. docs/scale.md says what the lines mean and where they end.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from trips_examples.training.parser import make_parser


HOUR_MS = 3_600_000
GB = 1e9
ID_BYTES = 32  # of a row that is skipped when a run goes on
FRAGMENT_BYTES = 90  # in the manifest that each commit writes anew: 88 in a table of 120 commits


@dataclass
class ScaleArguments:
    rows: str = field(metadata={"help": "Rows of index_and_search.py, of the parts memory, search and vectors."})
    images: list[float] = field(default_factory=lambda: [1e6, 1e8, 1e10], metadata={"help": "Sizes of collections."})
    image_bytes: float = field(default=100e3, metadata={"help": "Of an image as it is stored."})
    rows_per_commit: float = field(default=50e3, metadata={"help": "As in index_images.py."})
    rerank_k: int = field(default=50, metadata={"help": "Images ranked again for a query: one that was measured."})
    probes: int = field(default=20, metadata={"help": "Partitions of the index looked into: one that was measured."})


@dataclass(frozen=True)
class Costs:
    """
    What was measured: milliseconds of a processor, and bytes.

    Args:
        embed_ms: of an image.
        build_ms, exact_ms: of a vector of the table.
        index_ms, rerank_ms: of a query.
        row_bytes, index_bytes: of a vector, with its id and place.
    """

    embed_ms: float
    build_ms: float
    exact_ms: float
    index_ms: float
    rerank_ms: float
    row_bytes: float
    index_bytes: float


def costs_of(rows: list[dict], rerank_k: int, probes: int) -> Costs:
    """
    Raises:
        KeyError: if a part was not measured, or not with these options.
    """
    by_part: dict[str, list[dict]] = {}
    for row in rows:
        by_part.setdefault(row["part"], []).append(row)
    few, many = sorted(by_part["memory"], key=lambda row: row["images"])[:: len(by_part["memory"]) - 1]
    embed_seconds = many["actor_cpu_seconds"] - few["actor_cpu_seconds"]  # without the start of the actor
    vectors = max(by_part["vectors"], key=lambda row: row["vectors"])
    return Costs(
        embed_ms=1000 * embed_seconds / (many["images"] - few["images"]),
        build_ms=vectors["build_cpu_ms"] / vectors["vectors"],
        exact_ms=vectors["exact_cpu_ms"] / vectors["vectors"],
        index_ms=vectors[f"index_{probes}_cpu_ms"],
        rerank_ms=by_part["search"][0][f"rerank_{rerank_k}_cpu_ms"],
        row_bytes=vectors["table_bytes_per_vector"],
        index_bytes=vectors["index_bytes_per_vector"],
    )


def plan(costs: Costs, images: float, image_bytes: float, rows_per_commit: float) -> dict[str, float]:
    """A column of the table."""
    commits = images / rows_per_commit
    return {
        "embedding, core hours": images * costs.embed_ms / HOUR_MS,
        "index, core hours": images * costs.build_ms / HOUR_MS,
        "vectors on disk, GB": images * costs.row_bytes / GB,
        "index, GB": images * costs.index_bytes / GB,
        "images on disk, GB": images * image_bytes / GB,
        "ids to go on from, GB of memory": images * ID_BYTES / GB,
        "manifests that commits write, GB": commits * commits / 2 * FRAGMENT_BYTES / GB,
        "exact search, core ms per query": images * costs.exact_ms,
        "search by the index, core ms per query": costs.index_ms,
        "ranking again, core ms per query": costs.rerank_ms,
    }


def main(argv: list[str] | None = None) -> list[dict[str, float]]:
    (args,) = make_parser(ScaleArguments, description=__doc__).parse_args_into_dataclasses(args=argv)
    rows = json.loads(Path(args.rows).read_text(encoding="utf-8"))
    try:
        costs = costs_of(rows, args.rerank_k, args.probes)
    except KeyError as error:
        raise SystemExit(f"--rows {args.rows}: {error} was not measured; index_and_search.py does.") from error
    columns = [plan(costs, images, args.image_bytes, args.rows_per_commit) for images in args.images]
    print(", ".join(f"{name} {value:.3g}" for name, value in vars(costs).items()), end="\n\n")
    print("| images |", " | ".join(f"{images:,.0f}" for images in args.images), "|")
    print("|---|" + "---|" * len(columns))
    for name in columns[0]:
        print(f"| {name} |", " | ".join(f"{column[name]:,.3g}" for column in columns), "|")
    return columns


if __name__ == "__main__":
    main()
