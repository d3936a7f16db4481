r"""
Evaluate all methods that reduce visual tokens on the small LLaVA of one seed, and write a row for each.

    OMP_NUM_THREADS=1 python benchmarks/vlm_small/evaluate.py --model outputs/vlm_small/seed0 --seed 0 \
        --output_json outputs/vlm_small/seed0.json

Guides and fine-tuned weights are trained first and stored with the model. The layer of the guide and the split between
tower and exit are chosen on the validation split. All rows are measured on the test split.
"""

import json
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from busy_scenes import KINDS, draw_scene, one_of_each_kind
from contestants import Contestant, costs, kept_for, next_token, set_contestant
from guides import RESOLUTION_STEPS, STEPS, fine_tune_resolution, train_guide
from safetensors.torch import load_file, save_file
from small_model import NUM_PATCHES, pixels_of
from small_model import encode as encode_text
from tqdm.auto import tqdm
from transformers import LlavaForConditionalGeneration

from modeling_trips.hosts import TextGuide
from modeling_trips.inspection.provenance import provenance
from trips_examples.training.files import write_json
from trips_examples.training.parser import make_parser


DIVISORS = (2, 4, 9, 16)
GUIDE_LAYERS = (1, 2, 3)
SIDES = (8, 6, 5, 4, 3)
EQUAL_COST_KEPT = (16, 9)  # token numbers with rows of equal total cost
LONG_STEPS = 900  # training steps of the long guide
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
    batch_size: int = field(default=64, metadata={"help": "Questions per forward pass."})


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


def batches_of(questions: list[dict], batch_size: int) -> list[list[int]]:
    """Group the indices of questions with equal lengths."""
    by_length: dict[int, list[int]] = {}
    for number, question in enumerate(questions):
        by_length.setdefault(len(question["prompt"]), []).append(number)
    return [rows[at : at + batch_size] for rows in by_length.values() for at in range(0, len(rows), batch_size)]


@torch.no_grad()
def correct_answers(models: dict, guides: dict, contestants: list[Contestant], questions: list[dict], batch_size: int):
    """Mark correct answers: `(num_contestants, num_questions)`."""
    correct = torch.zeros(len(contestants), len(questions), dtype=torch.bool)
    batches = []
    for numbers in batches_of(questions, batch_size):
        pixel_values = torch.stack([questions[number]["pixels"] for number in numbers])
        prompt = torch.tensor([questions[number]["prompt"] for number in numbers])
        answers = torch.tensor([questions[number]["answer"] for number in numbers])
        batches.append((numbers, pixel_values, prompt, answers))
    for row, contestant in enumerate(tqdm(contestants, desc="evaluate", mininterval=10)):
        model = models[contestant.weights]
        torch.manual_seed(0)
        set_contestant(model, contestant, guides)
        for numbers, pixel_values, prompt, answers in batches:
            correct[row, numbers] = next_token(model, contestant, pixel_values, prompt).argmax(-1) == answers
        set_contestant(model, UNPRUNED, guides)
    return correct


def stored_guide(model, folder: Path, name: str, **options) -> TextGuide:
    folder = folder / "guides" / name
    if folder.exists():
        return TextGuide.from_pretrained(folder).eval()
    start = time.perf_counter()
    guide = train_guide(model, **options)
    print(f"guide {name}: {time.perf_counter() - start:.0f} s", flush=True)
    guide.save_pretrained(folder)
    return guide


def stored_resolution(model, folder: Path, side: int, seed: int):
    file = folder / "resolutions" / f"{side}.safetensors"
    if file.exists():
        tuned = LlavaForConditionalGeneration(model.config).eval()
        tuned.load_state_dict(load_file(file), strict=False)
        tuned.tie_weights()
        return tuned
    start = time.perf_counter()
    tuned = fine_tune_resolution(model, side, seed)
    print(f"resolution {side}: {time.perf_counter() - start:.0f} s", flush=True)
    file.parent.mkdir(exist_ok=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in tuned.state_dict().items() if name != "lm_head.weight"}, file
    )
    return tuned


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
            Contestant("TextGuide from answers, tower", kept, layer=layer, guidance="answers"),
            Contestant("TextGuide from attention, tower", kept, layer=layer, guidance="attention"),
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


def main(argv: list[str] | None = None):
    (args,) = make_parser(EvaluateArguments, description=__doc__).parse_args_into_dataclasses(argv)
    folder = Path(args.model)
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    validation = read_questions("validation", args.validation_scenes)
    guides = {
        f"regions{layer}": stored_guide(
            model, folder, f"regions{layer}", layer=layer, teacher="regions", seed=args.seed
        )
        for layer in GUIDE_LAYERS
    }
    models = {None: model}

    origin = {"guide_steps": STEPS, "resolution_steps": RESOLUTION_STEPS, **provenance(seed=args.seed)}

    def measure(*contestants: Contestant, split: str = "validation") -> list[dict]:
        questions = validation if split == "validation" else read_questions("test", args.test_scenes)
        correct = correct_answers(models, guides, contestants, questions, args.batch_size)
        kinds = [question["kind"] for question in questions]
        length = round(sum(len(question["prompt"]) for question in questions) / len(questions))
        return [
            {
                **asdict(contestant),
                "split": split,
                "questions": len(questions),
                "accuracy": row.float().mean().item(),
                **{f"accuracy_{kind}": row[[own == kind for own in kinds]].float().mean().item() for kind in KINDS},
                **costs(model.config, contestant, length),
                "correct": f"{int(''.join('01'[bit] for bit in row.int().tolist()), 2):x}",
                **origin,
            }
            for contestant, row in zip(contestants, correct, strict=True)
        ]

    candidates = [
        Contestant("TextGuide from regions, tower", kept_for(divisor), layer, f"regions{layer}")
        for layer in GUIDE_LAYERS
        for divisor in (9, 16)
    ]
    rows = measure(UNPRUNED, *candidates)
    by_layer: dict[int, list[float]] = {}
    for row in rows[1:]:
        by_layer.setdefault(row["layer"], []).append(row["accuracy"])
    # The first layer within a point of the best, because earlier layers cost less.
    best = max(map(sum, by_layer.values()))
    layer = args.layer or min(number for number, values in by_layer.items() if sum(values) >= best - 0.02)
    for teacher in ("attention", "answers"):
        guides[teacher] = stored_guide(
            model, folder, f"{teacher}{layer}", layer=layer, teacher=teacher, seed=args.seed
        )
    name = f"regions{layer}-{LONG_STEPS}"
    guides[name] = stored_guide(model, folder, name, layer=layer, teacher="regions", seed=args.seed, steps=LONG_STEPS)
    candidates = [
        Contestant(guidance, kept, layer, guidance, tower_kept=round(kept * factor), scorer="prompt")
        for guidance in ("image", f"regions{layer}")
        for kept in map(kept_for, DIVISORS)
        for factor in (1.5, 2, 3)
        if kept * factor < NUM_PATCHES
    ]
    rows_of_splits = measure(*candidates)
    splits = {}
    for row in sorted(rows_of_splits, key=lambda row: row["accuracy"]):  # the last is the best
        splits[row["guidance"], row["kept"]] = row["tower_kept"]
    tuned_sides = {4, *equal_cost_sides(model.config, layer)}
    for side in sorted(tuned_sides):
        models[f"side{side}"] = stored_resolution(model, folder, side, args.seed)
    rows += rows_of_splits + measure(*all_contestants(model.config, layer, splits, tuned_sides), split="test")
    output = Path(args.output_json)
    others = json.loads(output.read_text()) if output.exists() else []
    write_json(output, [row for row in others if row["seed"] != args.seed] + rows)
    for row in rows:
        if row["split"] == "test":
            print(f"{row['name']:45} {row['kept']:4} {100 * row['accuracy']:6.2f} {row['total_mmacs']:7.1f}")


if __name__ == "__main__":
    main()
