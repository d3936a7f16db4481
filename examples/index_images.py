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

from trips_examples.indexing.options import IndexArguments
from trips_examples.training.options import make_parser, run_script


OPTIONS = make_parser(IndexArguments, description=__doc__, script=__name__)

from collections import Counter

import transformers

from trips_examples.data.shards import hub_shards
from trips_examples.indexing import table as tables
from trips_examples.indexing.embedding import embed_images, start_ray
from trips_examples.indexing.sources import Shard, find_images


NAMED = 20  # largest number of unusable images to name


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
