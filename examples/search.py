"""
Search images in a table that `index_images.py` made, by features. For a text, the best images are reranked by
matching, with patches that are scored by the text. The results are printed and written to a page. Needs the extra
`index`.

    python examples/search.py --model outputs/retrieval --table photos.lance --text "a red circle" "two dogs"
    python examples/search.py --model outputs/retrieval --table photos.lance --image example.jpg

Several texts share the computation of their images.
"""

import trips_examples  # noqa: F401  # isort: skip

from dataclasses import dataclass, field
from pathlib import Path

import transformers

from trips_examples.analysis.page import filled
from trips_examples.data.images import decode_image
from trips_examples.training.files import write_json, write_whole
from trips_examples.training.parser import make_parser, run_script


@dataclass
class SearchArguments:
    model: str = field(metadata={"help": "The checkpoint or the exported model that made the table."})
    table: str = field(metadata={"help": "The Lance table."})
    text: list[str] = field(default_factory=list, metadata={"help": "One or more texts to search for."})
    image: str | None = field(
        default=None, metadata={"help": "An image to search similar ones for, in place of --text."}
    )
    schedule: str | None = field(
        default=None, metadata={"help": "The --schedule that the table was made with, if any."}
    )
    k: int = field(default=10, metadata={"help": "Number of images for each query."})
    rerank_k: int = field(default=50, metadata={"help": "Number of images to rerank for a text (0 disables)."})
    exact: bool = field(default=False, metadata={"help": "Compare with all vectors, without the index."})
    probes: int = field(default=20, metadata={"help": "Partitions of the index to search; more are more accurate."})
    device: str = field(default="cpu", metadata={"help": "Such as cuda."})
    page: str = field(
        default="outputs/found.html", metadata={"help": "HTML page for the results; an existing file is replaced."}
    )
    output_json: str | None = field(
        default=None, metadata={"help": "JSON file for the results: query, rank, source, similarity and score."}
    )


def search(args: SearchArguments) -> list[tuple[str, list]]:
    """Return the name and the results of each query, with images."""
    # Imported late, so that --help works without the extra.
    from trips_examples.indexing.finding import Finder

    if bool(args.text) == bool(args.image):
        raise SystemExit("Give either --text or --image.")
    for name, least in {"k": 1, "rerank_k": 0, "probes": 1}.items():
        if getattr(args, name) < least:
            raise ValueError(f"--{name} must be at least {least}, got {getattr(args, name)}.")
    finder = Finder(args.table, args.model, args.schedule, args.device)
    if args.image:
        found = finder.nearest(finder.describe_image(decode_image(args.image)), args.k, args.exact, args.probes)
    else:
        texts = finder.describe_texts(args.text)
        found = finder.nearest(texts.embeds, max(args.k, args.rerank_k), args.exact, args.probes)
        if args.rerank_k:
            found = finder.rerank(texts, found)
    results = []
    for text, row in zip(args.text or [None], found):
        pictures = finder.draw(row[: args.k], text)
        results.append((text or args.image, [(each, pictures.get(each.source, [])) for each in row[: args.k]]))
    return results


def rows_of(results: list[tuple[str, list]]) -> list[dict]:
    return [
        {"query": query, "rank": rank, "source": each.source, "similarity": each.similarity, "score": each.score}
        for query, found in results
        for rank, (each, _) in enumerate(found, start=1)
    ]


def main(argv: list[str] | None = None):
    (args,) = make_parser(SearchArguments, description=__doc__).parse_args_into_dataclasses(args=argv)
    transformers.utils.logging.disable_progress_bar()
    try:
        results = search(args)
    except (OSError, ValueError) as error:
        raise SystemExit(f"search.py: {error}") from error
    for query, found in results:
        print(query)
        for place, (each, _) in enumerate(found, start=1):
            print(f"{place:>4}  {each.description}  {each.source}")
    page = filled(Path(__file__).parent / "indexing" / "results.html", table=args.table, results=results)
    if args.text and args.rerank_k:
        print("score: log-odds of a match plus similarity over temperature; similarity: cosine of the features")
    else:
        print("similarity: cosine of the features")
    write_whole(args.page, page)
    print(f"Page with images: {args.page}")
    if args.output_json is not None:
        write_json(args.output_json, rows_of(results))


if __name__ == "__main__":
    run_script(main)
