r"""
Evaluate all methods that reduce visual tokens on the small LLaVA of one seed, and write a row for each.

    OMP_NUM_THREADS=1 python benchmarks/vlm_small/evaluate.py --model outputs/vlm_small/seed0 --seed 0 \
        --output_json outputs/vlm_small/seed0.json

Guides and fine-tuned weights are trained first and stored with the model. The layer of the guide and the split between
tower and exit are chosen on the validation split. All rows are measured on the test split.
"""

import json
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path

import torch
from busy_scenes import KINDS, draw_scene, one_of_each_kind
from contestants import Contestant, costs, kept_for, next_token, set_contestant
from guides import RESOLUTION_STEPS, STEPS, fine_tune_resolution, train_guide
from small_model import NUM_PATCHES, pixels_of
from small_model import encode as encode_text
from tqdm.auto import tqdm
from transformers import LlavaForConditionalGeneration

from modeling_trips.hosts import TextGuide
from modeling_trips.inspection.provenance import provenance
from trips_examples.training.files import write_json
from trips_examples.training.parser import make_parser, run_script


DIVISORS = (2, 4, 9, 16)
GUIDE_LAYERS = (1, 2, 3)
SIDES = (8, 6, 5, 4, 3)
EQUAL_COST_KEPT = (16, 9)  # token numbers with rows of equal total cost
LONG_STEPS = 900  # training steps of the long guide
BATCH_SIZE = 64
UNPRUNED = Contestant("unpruned")


@dataclass
class EvaluateArguments:
    model: str = field(metadata={"help": "Folder of the model from train.py."})
    output_json: str = field(metadata={"help": "Output file. Rows of other seeds are kept."})
    seed: int = field(default=0, metadata={"help": "Seed of the model and of the guides' training scenes."})
    test_scenes: int = field(default=200, metadata={"help": "Scenes of the test split, five questions each."})
    validation_scenes: int = field(default=80, metadata={"help": "Scenes of the validation split."})
    layer: int | None = field(
        default=None, metadata={"help": "Tower layer of the guide. Default: chosen on the validation split."}
    )


def read_questions(split: str, num_scenes: int) -> list[dict]:
    """Return one question of each kind and scene."""
    questions = []
    for number in range(num_scenes):
        scene = draw_scene(split, number)
        pixels = pixels_of(scene.image)
        for question in one_of_each_kind(scene, number):
            prompt, answer = encode_text(question.text), encode_text(question.answer)[0]
            questions.append({"pixels": pixels, "prompt": prompt, "answer": answer, "kind": question.kind})
    return questions


def batches_of(questions: list[dict]) -> list[tuple[torch.Tensor, ...]]:
    """Return batches of questions of equal length: their indices, images, prompts and answers."""
    batches = []

    def length(number: int) -> int:
        return len(questions[number]["prompt"])

    for _, group in groupby(sorted(range(len(questions)), key=length), key=length):
        for numbers in torch.tensor([*group]).split(BATCH_SIZE):
            own = [questions[number] for number in numbers]
            prompts, answers = (torch.tensor([question[name] for question in own]) for name in ("prompt", "answer"))
            batches.append((numbers, torch.stack([question["pixels"] for question in own]), prompts, answers))
    return batches


class Evaluation:
    """A model with its guides and fine-tuned copies, which are stored in its folder."""

    def __init__(self, args: EvaluateArguments):
        self.args, self.folder = args, Path(args.model)
        self.model = LlavaForConditionalGeneration.from_pretrained(self.folder, dtype=torch.float32)
        self.model.eval().requires_grad_(False)
        self.models, self.guides = {None: self.model}, {}
        self.questions = {
            "validation": read_questions("validation", args.validation_scenes),
            "test": read_questions("test", args.test_scenes),
        }

    def add_guide(self, name: str, layer: int, teacher: str, steps: int = STEPS):
        folder = self.folder / "guides" / name
        if not (folder / "config.json").exists():
            train_guide(self.model, layer, teacher, self.args.seed, steps).save_pretrained(folder)
        self.guides[name] = TextGuide.from_pretrained(folder)

    def add_resolution(self, side: int):
        folder = self.folder / "resolutions" / str(side)
        if not (folder / "model.safetensors").exists():
            fine_tune_resolution(self.model, side, self.args.seed).save_pretrained(folder)
        self.models[f"side{side}"] = LlavaForConditionalGeneration.from_pretrained(folder).eval()

    @torch.no_grad()
    def measure(self, contestants: list[Contestant], split: str) -> list[dict]:
        """Return the row of each contestant, with its correct answers as bits of a hexadecimal number."""
        questions, rows = self.questions[split], []
        batches = batches_of(questions)
        kinds = [question["kind"] for question in questions]
        length = round(sum(len(question["prompt"]) for question in questions) / len(questions))
        origin = {"guide_steps": STEPS, "resolution_steps": RESOLUTION_STEPS, **provenance(seed=self.args.seed)}
        for contestant in tqdm(contestants, desc=split, mininterval=10):
            model, correct = self.models[contestant.weights], torch.zeros(len(questions))
            torch.manual_seed(0)
            set_contestant(model, contestant, self.guides)
            for numbers, pixel_values, prompts, answers in batches:
                predicted = next_token(model, contestant, pixel_values, prompts).argmax(-1)
                correct[numbers] = (predicted == answers).float()
            set_contestant(model, UNPRUNED, self.guides)
            of_kinds = {kind: correct[[own == kind for own in kinds]].mean().item() for kind in KINDS}
            rows.append(
                {
                    **asdict(contestant),
                    "split": split,
                    "questions": len(questions),
                    "accuracy": correct.mean().item(),
                    **{f"accuracy_{kind}": accuracy for kind, accuracy in of_kinds.items()},
                    **costs(model.config, contestant, length),
                    "correct": f"{int(''.join(str(int(bit)) for bit in correct), 2):x}",
                    **origin,
                }
            )
        return rows


def all_contestants(config, layer: int, splits: dict[tuple[str, int], int], tuned_sides: set[int]) -> list[Contestant]:
    rows = [UNPRUNED]
    for kept in map(kept_for, DIVISORS):
        rows += [
            Contestant("random, exit", kept, scorer="random"),
            Contestant("random, tower", kept, layer=layer, guidance="random"),
            Contestant("pooling, exit", kept, scorer="pooling"),
            Contestant("image [CLS], exit", kept, layer=config.vision_config.num_hidden_layers, guidance="image"),
            Contestant("max-min diversity, exit", kept, scorer="diversity"),
            Contestant("prompt and diversity, exit", kept, scorer="prompt"),
            Contestant("FastV", kept, fastv=True),
            Contestant("image [CLS], tower", kept, layer=layer, guidance="image"),
            Contestant("TextGuide from answers, tower", kept, layer=layer, guidance=f"answers{layer}"),
            Contestant("TextGuide from attention, tower", kept, layer=layer, guidance=f"attention{layer}"),
            Contestant("TextGuide from regions, tower", kept, layer=layer, guidance=f"regions{layer}"),
        ]
        for name, guidance in (("image [CLS]", "image"), ("TextGuide from regions", f"regions{layer}")):
            in_tower = splits[guidance, kept]
            rows.append(
                Contestant(
                    f"{name}, tower, then prompt, exit", kept, layer, guidance, tower_kept=in_tower, scorer="prompt"
                )
            )
    for kept in EQUAL_COST_KEPT:
        guidance = f"regions{layer}-{LONG_STEPS}"
        rows.append(Contestant(f"TextGuide from regions, {LONG_STEPS} steps, tower", kept, layer, guidance))
    sides = sorted({*SIDES, *equal_cost_sides(config, layer)}, reverse=True)
    for side in sides:
        rows.append(Contestant("fewer pixels", side * side, side=side))
        if side in tuned_sides:
            rows.append(Contestant("fewer pixels, fine-tuned", side * side, side=side, weights=f"side{side}"))
    for kept in EQUAL_COST_KEPT:
        limit = guide_cost(config, layer, kept)
        for early in range(1, layer):
            rows.append(largest_within(config, limit, Contestant("image [CLS], earlier layer", 0, early, "image")))
        rows.append(largest_within(config, limit, Contestant("random, first layer", 0, 1, "random")))
        both = Contestant("image [CLS], first layer, then prompt, exit", kept, 1, "image", scorer="prompt")
        candidates = (replace(both, tower_kept=number) for number in range(NUM_PATCHES - 1, kept, -1))
        rows += [row for row in candidates if cost_of(config, row) <= limit][:1]
    return list(dict.fromkeys(rows))


def cost_of(config, contestant: Contestant) -> float:
    return costs(config, contestant, prompt_length=6)["total_mmacs"]


def guide_cost(config, layer: int, kept: int) -> float:
    return cost_of(config, Contestant("guide", kept, layer, "regions"))


def largest_within(config, limit: float, contestant: Contestant) -> Contestant:
    """Return the contestant with the most tokens at a cost of at most `limit`."""
    rows = (replace(contestant, kept=number) for number in range(NUM_PATCHES - 1, 0, -1))
    return next(row for row in rows if cost_of(config, row) <= limit)


def equal_cost_sides(config, layer: int) -> set[int]:
    """Return the largest image sides at the cost of the guide."""
    limits = [guide_cost(config, layer, kept) for kept in EQUAL_COST_KEPT]
    cost = {side: cost_of(config, Contestant("", side * side, side=side)) for side in range(2, 12)}
    return {max(side for side in cost if cost[side] <= limit) for limit in limits}


def choose_layer(evaluation: Evaluation) -> tuple[int, list[dict]]:
    """Return the first layer within a point of the best guide, because earlier layers cost less, and all rows."""
    candidates = [
        Contestant("TextGuide from regions, tower", kept_for(divisor), layer, f"regions{layer}")
        for layer in GUIDE_LAYERS
        for divisor in (9, 16)
    ]
    rows = evaluation.measure([UNPRUNED, *candidates], "validation")
    sums = {layer: sum(row["accuracy"] for row in rows if row["layer"] == layer) for layer in GUIDE_LAYERS}
    return min(layer for layer in sums if sums[layer] >= max(sums.values()) - 0.02), rows


def choose_splits(evaluation: Evaluation, layer: int) -> tuple[dict[tuple[str, int], int], list[dict]]:
    """Return the best number of patches in the tower by guidance and number of tokens at the exit, and all rows."""
    candidates = [
        Contestant(guidance, kept, layer, guidance, tower_kept=round(kept * factor), scorer="prompt")
        for guidance in ("image", f"regions{layer}")
        for kept in map(kept_for, DIVISORS)
        for factor in (1.5, 2, 3)
        if kept * factor < NUM_PATCHES
    ]
    rows = evaluation.measure(candidates, "validation")
    ascending = sorted(rows, key=lambda row: row["accuracy"])
    return {(row["guidance"], row["kept"]): row["tower_kept"] for row in ascending}, rows


def main(argv: list[str] | None = None):
    (args,) = make_parser(EvaluateArguments, description=__doc__).parse_args_into_dataclasses(argv)
    evaluation = Evaluation(args)
    config = evaluation.model.config
    for layer in GUIDE_LAYERS:
        evaluation.add_guide(f"regions{layer}", layer, "regions")
    layer, rows = choose_layer(evaluation)
    layer = args.layer or layer
    for teacher in ("attention", "answers"):
        evaluation.add_guide(f"{teacher}{layer}", layer, teacher)
    evaluation.add_guide(f"regions{layer}-{LONG_STEPS}", layer, "regions", LONG_STEPS)
    splits, rows_of_splits = choose_splits(evaluation, layer)
    tuned_sides = {4, *equal_cost_sides(config, layer)}
    for side in sorted(tuned_sides):
        evaluation.add_resolution(side)
    tested = evaluation.measure(all_contestants(config, layer, splits, tuned_sides), "test")
    output = Path(args.output_json)
    others = json.loads(output.read_text()) if output.exists() else []
    write_json(output, [row for row in others if row["seed"] != args.seed] + rows + rows_of_splits + tested)
    for row in tested:
        print(f"{row['name']:45} {row['kept']:4} {100 * row['accuracy']:6.2f} {row['total_mmacs']:7.1f}")


if __name__ == "__main__":
    run_script(main)
