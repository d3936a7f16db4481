r"""
Evaluate all methods that reduce visual tokens on the small LLaVA of one seed, and write a row for each.

    OMP_NUM_THREADS=1 python benchmarks/vlm_small/compare.py --folder outputs/vlm_small/seed0 --seed 0 \
        --output_json docs/results/vlm_answers.json

Guides, and models for fewer pixels, are trained first and stored in the folder. What is chosen (where random patches
and those scored by the image leave at equal cost) is chosen on the validation split. All rows are of the test split.
"""

import trips_examples  # noqa: F401  # isort: skip

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path

import torch
from contestants import Contestant, costs, next_token, set_contestant
from guides import FIRST_SCENE, SCENES_PER_STEP, STEPS, ConstantGuide, train_guide
from small_model import GRID, NUM_PATCHES, encode, pixels_of
from tqdm.auto import tqdm
from train import STAGES, Stage, make_trained_model, train_stage

from modeling_trips.hosts import TextGuide
from modeling_trips.inspection.provenance import provenance
from trips_examples.data.busy_scenes import KINDS, draw_scene
from trips_examples.training.files import write_json
from trips_examples.training.parser import make_parser, run_script


KEPT = (21, 7, 3)  # visual tokens of the guides
ANSWERED = ("color", "shape", "presence")
# What guides learn from, and their classes.
GUIDES = {
    "answers": ("answers", TextGuide),
    "attention": ("attention", TextGuide),
    "regions": ("regions", TextGuide),
    "constant": ("answers", ConstantGuide),
}
# The model's training at a lower resolution, with as many steps as at its own, or with the guides' steps and scenes.
FEWER_PIXELS = {
    "fewer pixels": STAGES["base"],
    "fewer pixels, trained as little as a guide": replace(STAGES["base"], steps=STEPS, scenes=SCENES_PER_STEP),
}
BATCH_SIZE = 64
UNPRUNED = Contestant("unpruned")


@dataclass
class CompareArguments:
    folder: str = field(metadata={"help": "Folder of train.py."})
    output_json: str = field(metadata={"help": "Output file. Rows of the same seed and variant are replaced."})
    seed: int = field(default=0, metadata={"help": "Seed of the model and of all scenes."})
    test_scenes: int = field(default=150, metadata={"help": "Scenes of the test split, eight questions each."})
    validation_scenes: int = field(default=50, metadata={"help": "Scenes of the validation split."})
    layer: int = field(default=3, metadata={"help": "Tower layer of the guides."})


def read_questions(split: str, num_scenes: int, seed: int) -> list[dict]:
    questions = []
    for number in range(num_scenes):
        scene = draw_scene(split, number, seed)
        pixels = pixels_of(scene.image)
        for question in scene.questions:
            prompt, answer = encode(question.text), encode(question.answer)[0]
            questions.append({"pixels": pixels, "prompt": prompt, "answer": answer, "kind": question.kind})
    return questions


def batches_of(questions: list[dict]) -> Iterable[tuple[torch.Tensor, list[dict]]]:
    """Yield batches of questions of equal length: their numbers, and themselves."""

    def length(number: int) -> int:
        return len(questions[number]["prompt"])

    for _, group in groupby(sorted(range(len(questions)), key=length), key=length):
        for numbers in torch.tensor([*group]).split(BATCH_SIZE):
            yield numbers, [questions[number] for number in numbers]


class Evaluation:
    """A model with its guides, and models for fewer pixels, which are stored in its folder."""

    def __init__(self, args: CompareArguments):
        self.args, self.folder = args, Path(args.folder)
        self.models = {None: self.load("base")}
        self.model, self.guides = self.models[None], {}
        self.questions = {
            split: read_questions(split, number, args.seed)
            for split, number in (("validation", args.validation_scenes), ("test", args.test_scenes))
        }

    def load(self, stage: str):
        model = make_trained_model(self.args.seed, self.folder / stage)["llava"]
        return model.eval().requires_grad_(False)

    def add_guide(self, name: str, teacher: str, guide_class: type[TextGuide]):
        folder = self.folder / "guides" / name
        if not (folder / "config.json").exists():
            guide = train_guide(self.model, self.args.layer, teacher, self.args.seed, guide_class)
            guide.save_pretrained(folder)
        self.guides[name] = guide_class.from_pretrained(folder)

    def add_resolution(self, name: str, stage: Stage):
        """Train a copy of the model in a further stage."""
        train_stage(name, stage, self.folder, self.folder / "base", ["--seed", str(self.args.seed)], FIRST_SCENE)
        self.models[name] = self.load(name)

    @torch.no_grad()
    def measure(self, contestants: list[Contestant], split: str) -> list[dict]:
        """Return the row of each contestant."""
        questions, rows = self.questions[split], []
        kinds = [question["kind"] for question in questions]
        length = round(sum(len(question["prompt"]) for question in questions) / len(questions))
        origin = {"guide_steps": STEPS, **provenance(seed=self.args.seed)}
        for contestant in tqdm(contestants, desc=split, mininterval=10):
            model, correct = self.models[contestant.weights], torch.zeros(len(questions))
            torch.manual_seed(0)
            set_contestant(model, contestant, self.guides)
            for numbers, batch in batches_of(questions):
                pixel_values = torch.stack([question["pixels"] for question in batch])
                logits = next_token(model, contestant, pixel_values, [question["prompt"] for question in batch])
                correct[numbers] = (logits.argmax(-1) == torch.tensor([row["answer"] for row in batch])).float()
            set_contestant(model, UNPRUNED, self.guides)
            of_kinds = {kind: correct[[own == kind for own in kinds]].mean().item() for kind in KINDS}
            rows.append(
                {
                    **asdict(contestant),
                    "split": split,
                    "questions": len(questions),
                    "mean": sum(of_kinds[kind] for kind in ANSWERED) / len(ANSWERED),
                    **{f"accuracy_{kind}": accuracy for kind, accuracy in of_kinds.items()},
                    **costs(model.config, contestant, length),
                    **origin,
                }
            )
        return rows


def write_rows(args: CompareArguments, rows: list[dict]):
    """Replace rows of the same seed and variant in the file, add the others, and print them."""
    output = Path(args.output_json)
    others = json.loads(output.read_text()) if output.exists() else []
    new = {(row["seed"], row["variant"]) for row in rows}
    write_json(output, [row for row in others if (row["seed"], row["variant"]) not in new] + rows)
    for row in rows:
        print(f"{row['variant']:45} {row['kept']:4} {100 * row['mean']:6.2f} {row['total_mmacs']:7.1f}")


def cost_of(config, contestant: Contestant) -> float:
    return costs(config, contestant, prompt_length=6)["total_mmacs"]


def rivals_at_equal_cost(config, layer: int, kept: int) -> dict[str, list[Contestant]]:
    """Return selections without training that cost at most what a guide costs, as much as they can, by their names."""
    limit = cost_of(config, Contestant("guide", kept, layer, "answers"))
    tower = Contestant("tower", layer=1, guidance="image")
    image = [replace(tower, layer=early) for early in range(1, layer + 1)]
    families = {
        "image at equal cost": [[replace(own, kept=number) for number in range(1, NUM_PATCHES)] for own in image],
        "image, then FastV at equal cost": [
            [replace(own, kept=left, tower_kept=number, fastv=True) for number in range(left + 1, NUM_PATCHES)]
            for own in image
            for left in (kept // 2, kept)
        ],
        "random at equal cost": [[replace(tower, kept=number, guidance="random") for number in range(1, NUM_PATCHES)]],
    }
    rivals = {}
    for name, groups in families.items():
        cheap = ([one for one in group if cost_of(config, one) <= limit] for group in groups)
        rivals[name] = [replace(group[-1], variant=f"{name} {kept}") for group in cheap if group]
    return rivals


def largest_side(config, layer: int, kept: int) -> int:
    """Return the patches along each side of the largest images at the cost of a guide."""
    limit = cost_of(config, Contestant("guide", kept, layer, "answers"))
    return max(side for side in range(2, GRID) if cost_of(config, Contestant("", side * side, side=side)) <= limit)


def main(argv: list[str] | None = None):
    (args,) = make_parser(CompareArguments, description=__doc__).parse_args_into_dataclasses(argv)
    evaluation, layer = Evaluation(args), args.layer
    config = evaluation.model.config
    for name, (teacher, guide_class) in GUIDES.items():
        evaluation.add_guide(name, teacher, guide_class)
    contestants = [UNPRUNED]
    for kept in KEPT:
        contestants += [
            Contestant(f"random, exit {kept}", kept, scorer="random"),
            Contestant(f"diversity, exit {kept}", kept, scorer="diversity"),
            Contestant(f"prompt, exit {kept}", kept, scorer="prompt"),
            Contestant(f"FastV {kept}", kept, fastv=True),
            Contestant(f"image {kept}", kept, layer, "image"),
            *(Contestant(f"guide from {name} {kept}", kept, layer, name) for name in GUIDES),
        ]
        for rivals in rivals_at_equal_cost(config, layer, kept).values():
            scores = [row["mean"] for row in evaluation.measure(rivals, "validation")]
            contestants.append(rivals[scores.index(max(scores))])
        side = largest_side(config, layer, kept)
        for way, stage in FEWER_PIXELS.items():
            pixels = Contestant(f"{way} {kept}", side**2, side=side, weights=f"{way}, {side} x {side}")
            evaluation.add_resolution(pixels.weights, replace(stage, side=side))
            contestants.append(pixels)
    rows = evaluation.measure(contestants, "test")
    write_rows(args, rows)


if __name__ == "__main__":
    run_script(main)
