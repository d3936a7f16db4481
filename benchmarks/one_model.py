"""
Measure accuracy and time of one trained model on the same questions about busy scenes, beside its unpruned baseline.

    python benchmarks/one_model.py --num_threads 1 --clock process --output_json rows.json

Each batch of test questions is answered by all in turns, so accuracy and time are of the same calls of `generate`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from measuring import OutputArguments, run_benchmark

from modeling_trips import SelectionSchedule
from modeling_trips.inspection.checkpoints import load_checkpoint, load_processor
from modeling_trips.inspection.cost import forward_cost
from modeling_trips.inspection.speed import seconds_in_turns
from trips_examples.data.busy_scenes import draw_scene
from trips_examples.data.source import option
from trips_examples.training.options import run_script


@dataclass(kw_only=True)
class OneModelArguments(OutputArguments):
    model: str = option("examples/trips-tiny-scenes", "Folder of a model that answers questions about busy scenes.")
    baseline: str = option("examples/trips-tiny-scenes-unpruned", "Folder of the model that is asked unpruned.")
    schedule: list[str] = option(["2:text:0.1", "2:text:0.02", "2:text:0.005"], "Schedules of the model.")
    texts_per_image: int = option(8, "Questions that share an image: 1, 2, 4 or 8 of the eight of a scene.")
    batch_size: int = option(64, "Questions that are answered together.")
    test_scenes: int = option(300, "Test scenes.")
    clock: str = option("wall", "wall, or process (CPU time of one thread, for a shared machine).")
    seed: int = option(42, "Seed of the scenes.")


def measure(args: OneModelArguments) -> Iterator[dict]:
    """Yield a row for the baseline, then one for each schedule."""
    models = {"unpruned": load_checkpoint(args.baseline, schedule=SelectionSchedule())}
    for schedule in args.schedule:
        models[schedule] = load_checkpoint(args.model, schedule=SelectionSchedule.parse(schedule))
    processor = load_processor(args.model, models["unpruned"].config)
    seconds = dict.fromkeys(models, 0.0)
    correct = dict.fromkeys(models, 0)
    num_questions = 0
    scenes_per_batch = args.batch_size // 8
    for first in range(0, args.test_scenes, scenes_per_batch):
        numbers = range(first, min(first + scenes_per_batch, args.test_scenes))
        scenes = [draw_scene("test", number, args.seed) for number in numbers]
        questions = [question for scene in scenes for question in scene.questions]
        copies = 8 // args.texts_per_image  # of each image
        inputs = processor(
            images=[scene.image for scene in scenes for _ in range(copies)],
            text=[question["question"] for question in questions],
            image_index=[number // args.texts_per_image for number in range(len(questions))],
            return_tensors="pt",
        )
        answers = {}

        def answer(name: str, inputs=inputs, answers=answers):
            answers[name] = models[name].generate(**inputs)

        steps = {name: partial(answer, name) for name in models}
        times = seconds_in_turns(steps, warmup=0, repeats=1, clock=args.clock)
        num_questions += len(questions)
        for name in models:
            seconds[name] += times[name][0]
            texts = processor.post_process_answers(answers[name])
            pairs = zip(texts, questions)
            correct[name] += sum(text == question["answer"] for text, question in pairs)

    text_length = inputs["input_ids"].shape[1]
    costs = {name: forward_cost(model.config, text_length) for name, model in models.items()}
    macs = {name: cost.macs(args.texts_per_image) for name, cost in costs.items()}
    for name in models:
        yield {
            "model": args.baseline if name == "unpruned" else args.model,
            "schedule": name,
            "patches": costs[name].num_kept,
            "texts_per_image": args.texts_per_image,
            "questions": num_questions,
            "accuracy": correct[name] / num_questions,
            "macs_ratio": macs[name] / macs["unpruned"],
            "time_ratio": seconds[name] / seconds["unpruned"],
            "seconds": seconds[name],
            "clock": args.clock,
        }


def print_table(rows: list[dict], args: OneModelArguments):
    for row in rows:
        print(
            f"{row['schedule']:<15} {row['accuracy']:.2%}  time {row['time_ratio']:.2f}  MACs {row['macs_ratio']:.2f}"
        )


def main(argv: list[str] | None = None) -> list[dict]:
    return run_benchmark(
        arguments_class=OneModelArguments,
        description=__doc__,
        measure=measure,
        report=print_table,
        argv=argv,
    )


if __name__ == "__main__":
    run_script(main)
