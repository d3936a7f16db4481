"""
Train and evaluate TRIPS on image-text retrieval: texts find images, images find texts.

    accelerate launch examples/run_retrieval.py                  # scenes of easy-VQA, the tiny preset: on a laptop
    accelerate launch examples/run_retrieval.py --keep_rate 1.0 --output_dir unpruned  # its twin
    accelerate launch examples/run_retrieval.py --train_file train.jsonl --validation_file val.jsonl \
        --image_root images --model_name_or_path albef_trips --rerank_k 128 --learning_rate 1e-5

Two losses are added: contrast (ITC) of each image and text with all of the batch, of all processes, and matching
(ITM) on hard negatives, which each process draws from its own part of the batch. Accumulating gradients enlarges
neither: the loss is then the mean of the losses of smaller batches. The training loop is Transformers' `Trainer`: see
`--help` for all of its options.
"""

import json
from pathlib import Path

from datasets import Dataset

from modeling_trips import TripsForRetrieval
from trips_examples.data.collators import without_long_texts
from trips_examples.data.task_collators import RetrievalCollator
from trips_examples.metrics.retrieval import RECALL_AT, Ranking, RetrievalResults
from trips_examples.training.files import write_whole
from trips_examples.training.models import load_model
from trips_examples.training.options import DataArguments
from trips_examples.training.retrieval import (
    RetrievalModelArguments,
    RetrievalTrainer,
    RetrievalTrainingArguments,
    images_of,
)
from trips_examples.training.runs import end_processes, load_data, parse_arguments, train_and_evaluate


def write_rankings(folder: Path, dataset: Dataset, results: RetrievalResults, num_shown: int = 10):
    """
    Writes `found_images.jsonl`, an object per caption, and `found_texts.jsonl`, one per image: the best that it found,
    and the place of the first right one, from 1.
    """
    rows, _ = images_of(dataset)
    sources, image_ids = dataset["source"], [dataset["image_id"][row] for row in rows]

    def write(name: str, queries: list[dict], ranking: Ranking, candidates: list[str]):
        lines = (
            {**query, "found": [candidates[number] for number in best[:num_shown]], "first_right": first + 1}
            for query, best, first in zip(queries, ranking.candidates.tolist(), ranking.first_right.tolist())
        )
        write_whole(folder / name, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))

    captions = [{"source": source, "caption": caption} for source, caption in zip(sources, dataset["caption"])]
    write("found_images.jsonl", captions, results.found_images, image_ids)
    write("found_texts.jsonl", [{"image_id": image_id} for image_id in image_ids], results.found_texts, list(sources))


def describe(metrics: dict[str, float]) -> str:
    """The recalls as a table."""
    columns = [f"{direction}_r{k}" for direction in ("i2t", "t2i") for k in RECALL_AT] + ["r_mean"]
    lines = [" " * 14 + "".join(f"{column:>10}" for column in columns)]
    for title, prefix in (("by features", "features_"), ("matched again", "")):
        if f"{prefix}r_mean" in metrics:
            lines.append(f"{title:<14}" + "".join(f"{metrics[prefix + column]:10.2%}" for column in columns))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict[str, float]:
    model_args, data_args, training_args = parse_arguments(
        argv, RetrievalModelArguments, DataArguments, RetrievalTrainingArguments, description=__doc__
    )
    data = load_data("captions", data_args, training_args)
    texts, side = data_args.vocabulary(data, "caption"), data_args.half_scene_size("captions")
    model, processor = load_model(TripsForRetrieval, model_args, texts, image_size=side)
    data = without_long_texts(data, "caption", processor, skip=data_args.skip_bad_rows)
    trainer = RetrievalTrainer(
        model=model,
        args=training_args,
        train_dataset=data.get("train"),
        eval_dataset=data.get("validation"),
        data_collator=RetrievalCollator(processor),
        train_collator=RetrievalCollator(processor, training=True, augment=data_args.augments),
        processing_class=processor,
    )

    def evaluate_search() -> dict[str, float]:
        results = trainer.search(trainer.eval_dataset)
        if trainer.is_world_process_zero():
            write_rankings(Path(training_args.output_dir), trainer.eval_dataset, results)
            print(describe(results.metrics))
        samples = {"samples": len(trainer.eval_dataset), "images": len(results.found_texts.candidates)}
        return {f"eval_{name}": value for name, value in {**results.metrics, **samples}.items()}

    return train_and_evaluate(trainer, evaluate_search)


if __name__ == "__main__":
    main()
    end_processes()
