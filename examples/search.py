"""
Search images in a table that `index_images.py` made, by features. For a text, the best images are reranked by
matching, with patches that are scored by the text. Needs the extra `index`.

    python examples/search.py --model outputs/retrieval --table photos.lance --text "a red circle" "two dogs"
    python examples/search.py --model outputs/retrieval --table photos.lance --image example.jpg

Several texts share the computation of their images.
"""

from dataclasses import MISSING, dataclass

from trips_examples.data.source import option
from trips_examples.training.options import make_parser, run_script


@dataclass
class SearchArguments:
    model: str = option(MISSING, "The checkpoint or the exported model that made the table.")
    table: str = option(MISSING, "The Lance table.")
    text: list[str] = option([], "One or more texts to search for.")
    image: str | None = option(None, "An image to search similar ones for, in place of --text.")
    schedule: str | None = option(None, "The --schedule that the table was made with, if any.")
    k: int = option(10, "Number of images for each query.")
    rerank_k: int = option(50, "Number of images to rerank for a text (0 disables).")
    probes: int = option(20, "Partitions of the index to search; more are more accurate.")
    device: str = option("cpu", "Such as cuda.")
    picture: str = option("outputs/found.png", "Picture of the results with the patches that the text keeps.")
    output_json: str | None = option(None, "JSON file: query, rank, source, similarity, score and match.")

    def __post_init__(self):
        if bool(self.text) == bool(self.image):
            raise ValueError("Give either --text or --image.")
        if min(self.k, self.rerank_k + 1, self.probes) < 1:
            raise ValueError("--k and --probes must be at least 1, and --rerank_k at least 0.")


OPTIONS = make_parser(SearchArguments, description=__doc__, script=__name__)

import transformers

from modeling_trips.inspection.files import whole_file
from trips_examples.data.images import decode_image
from trips_examples.data.printing import visible
from trips_examples.indexing.finding import Finder
from trips_examples.training.files import write_json
from trips_examples.training.pictures import SIDE, sheet


def main(argv: list[str] | None = None):
    (args,) = OPTIONS.parse_args_into_dataclasses(args=argv)
    transformers.utils.logging.disable_progress_bar()
    finder = Finder(args.table, args.model, args.schedule, args.device)
    if finder.table.count_rows("error IS NULL") == 0:
        raise ValueError(f"{args.table} has no image yet. Wait for index_images.py, or look at the faults it names.")
    if args.image:
        image = decode_image(args.image)
        features = finder.evaluator.index_images([image])
        found = finder.nearest(features, args.k, args.probes)
    else:
        texts = finder.describe_texts(args.text)
        found = finder.nearest(texts.embeds, max(args.k, args.rerank_k), args.probes)
        found = finder.rerank(texts, found) if args.rerank_k else found
    rows = []
    pictures = []
    titles = []
    for text, best in zip(args.text or [None], found):
        query = text or args.image
        print(query)
        best = best[: args.k]
        drawn = finder.draw(best, text)
        for rank, each in enumerate(best, start=1):
            row = {
                "query": query,
                "rank": rank,
                "source": each.source,
                "similarity": each.similarity,
                "score": each.score,
                "match": each.match,
            }
            rows.append(row)
            match = "" if each.match is None else f"score {each.score:6.2f}, match {each.match:6.1%}, "
            print(f"{rank:>4}  {match}similarity {each.similarity:.3f}  {visible(each.source)}")
            picture = drawn.get(each.source)
            if picture is not None:
                picture.thumbnail((SIDE, SIDE))
                pictures.append(picture)
                titles.append(f"{rank}: {query}")
    with whole_file(args.picture) as partial:
        sheet(pictures, titles).save(partial)
    print(f"Picture: {args.picture}")
    if args.output_json is not None:
        write_json(args.output_json, rows)


if __name__ == "__main__":
    run_script(main)
