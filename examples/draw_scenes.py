"""
Draw which patches of scenes of pictures each expression keeps, and the box that it finds: a page of a trained
grounding model.

    python examples/draw_scenes.py --model outputs/grounding --pictures pictures/emoji/pictures.jsonl --output page.png

The scenes are of names and pictures that training has not seen, if it had the same `--pictures` and
`--validation_names`. Kept patches are as they are, all others faded; green is the true box, orange the one found.
"""

import trips_examples  # noqa: F401  # isort: skip

from dataclasses import dataclass, field
from pathlib import Path

import PIL.Image
import torch
from datasets import Dataset

from modeling_trips import TripsForVisualGrounding, TripsProcessor
from modeling_trips.inspection import draw_kept_patches
from trips_examples.data.boxes import draw_boxes, sheet
from trips_examples.data.faults import BadRows
from trips_examples.data.loading import load_task_dataset
from trips_examples.data.rows import images_of
from trips_examples.data.source import DataSource
from trips_examples.training.parser import make_parser


@dataclass
class DrawArguments:
    model: str = field(metadata={"help": "Folder of a model that run_grounding.py trained, or its name."})
    pictures: list[str] = field(metadata={"help": "Folders and files of named pictures."})
    output: str = field(default="outputs/scenes.png", metadata={"help": "PNG file to write."})
    num_scenes: int = field(default=4, metadata={"help": "How many scenes to draw, a row each."})
    expressions_per_scene: int = field(default=3, metadata={"help": "How many expressions of each: columns."})
    scene_size: int = field(default=224, metadata={"help": "Height and width of the scenes in pixels."})
    validation_names: float = field(default=0.2, metadata={"help": "Share of the names that training has not seen."})
    skip_bad_rows: bool = field(default=False, metadata={"help": "Skip and count pictures that cannot be used."})
    seed: int = field(default=0, metadata={"help": "Which scenes there are."})


def rows_to_draw(scenes: Dataset, num_scenes: int, per_scene: int) -> list[dict]:
    """`per_scene` expressions about each of the first scenes that have so many."""
    _, image_of_row = images_of(scenes)
    places = [(image_of_row == image).nonzero().flatten().tolist() for image in image_of_row.unique()]
    chosen = [own[:per_scene] for own in places if len(own) >= per_scene][:num_scenes]
    return [scenes[place] for own in chosen for place in own]


@torch.inference_mode()
def drawn(model: TripsForVisualGrounding, processor: TripsProcessor, row: dict, side: int) -> PIL.Image.Image:
    """The image of a row with what the last selection layer keeps, the true box and the one that is found."""
    image = row["image"]
    outputs = model(**processor(images=image, text=row["expression"], return_tensors="pt"))
    size = (image.height, image.width)
    (found,) = processor.post_process_grounding(outputs.pred_boxes, [size]).tolist()
    if outputs.selection:
        (kept,) = processor.patch_boxes(outputs.selection[-1].kept_indices, [size])
        image = draw_kept_patches(image, kept, min_side=1)
    return draw_boxes(image, row["box"], found, side)


def main(argv: list[str] | None = None):
    (args,) = make_parser(DrawArguments, description=__doc__).parse_args_into_dataclasses(args=argv)
    model = TripsForVisualGrounding.from_pretrained(args.model).eval()
    processor = TripsProcessor.from_pretrained(args.model)
    source = DataSource(
        dataset_name="picture_scenes",
        pictures=args.pictures,
        scene_size=args.scene_size,
        train_scenes=1,
        validation_scenes=20 * args.num_scenes,  # not all have so many expressions
        validation_names=args.validation_names,
    )
    data = load_task_dataset("grounding", source, BadRows(skip=args.skip_bad_rows), args.seed)
    rows = rows_to_draw(data["validation"], args.num_scenes, args.expressions_per_scene)
    pictures = [drawn(model, processor, row, side=240) for row in rows]
    page = sheet(pictures, [row["expression"] for row in rows], columns=args.expressions_per_scene)
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    page.save(args.output)
    print(f"{len(rows)} expressions about {args.num_scenes} scenes: {args.output}")


if __name__ == "__main__":
    main()
