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

import trips_examples  # noqa: F401  # isort: skip

from dataclasses import dataclass, field

import transformers
from tqdm.auto import tqdm

from trips_examples.data.shards import hub_shards
from trips_examples.training.parser import make_parser, run_script


NAMED = 20  # largest number of unusable images to name


@dataclass
class IndexArguments:
    model: str = field(
        metadata={"help": "Retrieval checkpoint (folder or name on the Hub), or folder of an exported model."}
    )
    table: str = field(metadata={"help": "Location of the Lance table: a folder, or a URI such as s3://..."})
    images: list[str] = field(
        default_factory=list,
        metadata={"help": "Folders of images; WebDataset shards; Parquet, JSONL or CSV files with images or paths."},
    )
    dataset_name: str | None = field(default=None, metadata={"help": "A data set on the Hub, in place of --images."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the Hub data set."})
    dataset_split: str = field(default="train", metadata={"help": "Split of the Hub data set."})
    image_root: str | None = field(
        default=None,
        metadata={"help": "Folder that paths in rows are relative to. Default: the folder of their file."},
    )
    image_column: str | None = field(
        default=None, metadata={"help": "Image column of rows. Default: image, jpg, png, ..."}
    )
    schedule: str | None = field(
        default=None,
        metadata={"help": "Selection schedule in place of the checkpoint's, as in 5:image:0.7,12:image:0.5"},
    )
    dtype: str = field(default="auto", metadata={"help": "Dtype of the computation, such as bfloat16."})
    batch_size: int = field(default=32, metadata={"help": "Batch size of each actor."})
    rows_per_commit: int = field(
        default=512, metadata={"help": "Images of an actor per commit; a killed actor loses at most these."}
    )
    num_actors: int = field(default=1, metadata={"help": "Number of processes that embed, each with a model."})
    cpus_per_actor: int = field(default=1, metadata={"help": "Threads of each actor."})
    gpus_per_actor: float = field(
        default=0.0, metadata={"help": "GPUs of each actor. With 0.25, four actors share a GPU."}
    )
    num_readers: int = field(default=1, metadata={"help": "Shards that are read at a time, with one CPU each."})
    ray_address: str | None = field(
        default=None, metadata={"help": "Address of a Ray cluster. Default: this machine."}
    )
    object_store_mb: int = field(default=512, metadata={"help": "Memory of Ray's object store on this machine."})
    store_images: bool = field(
        default=True, metadata={"help": "Whether to store images of shards and rows, for reranking and display."}
    )
    retry_broken: bool = field(default=False, metadata={"help": "Try images again that could not be used before."})
    index_type: str = field(default="IVF_PQ", metadata={"help": "Index type of Lance, or none."})
    index_from: int = field(default=10_000, metadata={"help": "Number of vectors from which an index is built."})


def find_shards_of(args: IndexArguments) -> list:
    from trips_examples.indexing.sources import find_images

    if bool(args.images) == bool(args.dataset_name):
        raise SystemExit("Give either --images or --dataset_name.")
    if args.dataset_name:
        if args.image_root is not None:
            raise SystemExit("--image_root needs --images and is not supported with --dataset_name.")
        return hub_shards(args.dataset_name, args.dataset_config_name, split=args.dataset_split)
    return find_images(args.images, args.image_root)


def index(args: IndexArguments):
    # Imported late, so that --help works without the extra.
    from trips_examples.indexing import embedding
    from trips_examples.indexing import table as tables

    transformers.utils.logging.disable_progress_bar()
    shards = find_shards_of(args)
    model, processor = tables.load_model(args.model, args.schedule)
    fingerprint = tables.fingerprint_of(model, processor)
    workers = embedding.Workers(args.num_actors, args.cpus_per_actor, args.gpus_per_actor, args.num_readers)
    how = embedding.Embedding(
        checkpoint=args.model,
        schedule=args.schedule,
        dtype=args.dtype,
        device="cuda" if args.gpus_per_actor else "cpu",
        num_threads=args.cpus_per_actor,
        batch_size=args.batch_size,
        store_images=args.store_images,
    )
    with tables.only_writer(args.table):
        table = tables.open_or_create_table(args.table, fingerprint, model.config.projection_dim)
        del model
        if args.retry_broken:
            table.delete("error IS NOT NULL")
        tables.forget_missing_images(table)
        embedding.start_ray(args.ray_address, workers, args.object_store_mb)
        new = embedding.embed_images(table, shards, how, workers, args.rows_per_commit, args.image_column)
        for number, fault in enumerate(new):
            if number < NAMED:
                tqdm.write(fault)
        table = tables.open_table(args.table, fingerprint)
        outcome = tables.build_index(table, args.index_type, args.index_from)
        faults = tables.count_faults(table)
        num_usable = table.count_rows() - faults.total()
    reasons = ", ".join(f"{reason}: {count}" for reason, count in faults.most_common())
    reasons = f" ({reasons})" if reasons else ""
    print(f"{args.table}: {num_usable} images, {faults.total()} that cannot be used{reasons}; {outcome}.")
    if faults["missing image"]:
        print("Missing images are tried again by the next run. Paths in rows are relative to --image_root.")
    if faults.total() > faults["missing image"]:
        print("Images that cannot be used are tried again with --retry_broken.")
    if num_usable == 0:
        raise ValueError(f"{args.table} has no image that can be used.")


def main(argv: list[str] | None = None):
    (args,) = make_parser(IndexArguments, description=__doc__).parse_args_into_dataclasses(args=argv)
    try:
        index(args)
    except (OSError, ValueError) as error:
        raise SystemExit(f"index_images.py: {error}") from error


if __name__ == "__main__":
    run_script(main)
