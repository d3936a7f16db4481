r"""
How far do a vision tower and a text encoder get that were trained apart? A ridge regression from the pictures'
features to the vectors of their names, tested on pictures and names that it has not seen: the baseline of retrieval.

    python benchmarks/ridge_retrieval.py --vision towers/dinov2-small --text towers/minilm --skip_bad_rows True \
        --pictures pictures/emoji/pictures.jsonl /usr/share/openclipart/png --output_json ridge.json

A picture's features are the tower's [CLS] and the mean of its patches, a name's the encoder's vector, as its folder
says. The strength of the regression is chosen on a fifth of the training pictures. The same pictures, sizes and splits
are those of `run_retrieval.py --dataset_name pictures`.
"""

import time
from dataclasses import dataclass, field

import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import AutoImageProcessor, AutoTokenizer

from modeling_trips import TripsModel, from_vision_text_pretrained
from modeling_trips.inspection.speed import provenance
from trips_examples.data.faults import BadRows
from trips_examples.data.picture_tasks import load_pictures_alone
from trips_examples.metrics.retrieval import RECALL_AT
from trips_examples.training.files import write_json
from trips_examples.training.parser import make_parser


STRENGTHS = [10.0**power for power in range(-1, 6)]


@dataclass
class RidgeArguments:
    vision: str = field(metadata={"help": "Folder or name of a ViT, DeiT, CLIP or DINOv2."})
    text: str = field(metadata={"help": "Folder or name of a BERT, MiniLM or RoBERTa."})
    pictures: list[str] = field(metadata={"help": "Folders and files of named pictures."})
    scene_size: int = field(default=224, metadata={"help": "Height and width of the images in pixels."})
    validation_names: float = field(default=0.2, metadata={"help": "Share of the names that is tested."})
    skip_bad_rows: bool = field(default=False, metadata={"help": "Skip and count pictures that cannot be used."})
    batch_size: int = field(default=32, metadata={"help": "Pictures, or names, at a time."})
    output_json: str | None = field(default=None, metadata={"help": "Write the results to this file."})


@torch.inference_mode()
def encode(model: TripsModel, processor, tokenizer, rows: Dataset, batch_size: int) -> tuple[torch.Tensor, ...]:
    """Features of the pictures, `(num_rows, 2 * vision_width)`, and of the names, `(num_rows, text_width)`."""
    images, texts = [], []
    for start in tqdm(range(0, len(rows), batch_size), desc="Encoding"):
        batch = [rows[row] for row in range(start, min(start + batch_size, len(rows)))]
        pixels = processor([row["image"] for row in batch], return_tensors="pt", do_resize=False, do_center_crop=False)
        states = model.vision_model(pixels["pixel_values"]).last_hidden_state.float()
        images.append(torch.cat((states[:, 0], states[:, 1:].mean(dim=1)), dim=1))
        names = tokenizer([row["caption"] for row in batch], padding=True, return_tensors="pt")
        texts.append(model.text_model(names["input_ids"], names["attention_mask"]).pooler_output.float())
    return torch.cat(images), torch.cat(texts)


class Ridge:
    """A linear map from standardised features to centered vectors, with the squares of its weights held down."""

    def __init__(self, features: torch.Tensor, vectors: torch.Tensor, strength: float):
        self.mean, self.deviation = features.mean(dim=0), features.std(dim=0) + 1e-6
        self.target_mean = vectors.mean(dim=0)
        inputs = (features - self.mean) / self.deviation
        gram = inputs.T @ inputs + strength * torch.eye(inputs.shape[1])
        self.weights = torch.linalg.solve(gram, inputs.T @ (vectors - self.target_mean))

    def recalls(self, features: torch.Tensor, vectors: torch.Tensor) -> dict[str, float]:
        """Of pictures by their names (t2i) and of names by their pictures (i2t), by cosine."""
        predicted = torch.nn.functional.normalize((features - self.mean) / self.deviation @ self.weights, dim=1)
        similarities = torch.nn.functional.normalize(vectors - self.target_mean, dim=1) @ predicted.T
        found = {}
        for direction, scores in (("t2i", similarities), ("i2t", similarities.T)):
            before = (scores > scores.diagonal()[:, None]).sum(dim=1)
            found |= {f"{direction}_r{k}": (before < k).double().mean().item() for k in RECALL_AT}
        return found


def best_ridge(features: torch.Tensor, vectors: torch.Tensor) -> tuple[Ridge, float]:
    """With the strength that finds most of every fifth picture among the first ten, trained on the others."""
    held_out = torch.arange(len(features)) % 5 == 0

    def found(strength: float) -> float:
        ridge = Ridge(features[~held_out], vectors[~held_out], strength)
        return ridge.recalls(features[held_out], vectors[held_out])["t2i_r10"]

    strength = max(STRENGTHS, key=found)
    return Ridge(features, vectors, strength), strength


def main(argv: list[str] | None = None) -> dict:
    (args,) = make_parser(RidgeArguments, description=__doc__).parse_args_into_dataclasses(args=argv)
    start = time.perf_counter()
    bad_rows = BadRows(skip=args.skip_bad_rows)
    data = load_pictures_alone(args.pictures, args.scene_size, args.validation_names, bad_rows)
    model = from_vision_text_pretrained(TripsModel, args.vision, args.text, keep_rate=1.0, image_size=args.scene_size)
    tools = (AutoImageProcessor.from_pretrained(args.vision), AutoTokenizer.from_pretrained(args.text))
    train, test = (encode(model, *tools, data[split], args.batch_size) for split in ("train", "validation"))
    ridge, strength = best_ridge(*train)
    result = {
        "images": len(data["validation"]),
        "train_images": len(data["train"]),
        "strength": strength,
        **ridge.recalls(*test),
        "minutes": round((time.perf_counter() - start) / 60, 2),
        "num_threads": torch.get_num_threads(),
        "options": {name: value for name, value in vars(args).items() if name != "output_json"},
        **provenance("cpu"),
    }
    if args.output_json is not None:
        write_json(args.output_json, result)
    print(", ".join(f"{name} {value:.2%}" for name, value in result.items() if "2" in name))
    return result


if __name__ == "__main__":
    main()
