"""Options of `index_images.py`, without the packages of the extra `index`."""

from dataclasses import dataclass, field

from trips_examples.data.source import option


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
