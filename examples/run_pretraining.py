r"""
Pre-train TRIPS on pairs of image and caption: contrast (ITC), matching (ITM), masked words (MLM) and continuations
(PrefixLM), with a momentum teacher.

    python examples/run_pretraining.py --model examples/trips-tiny-scenes-unpruned --grid 2 \
        --image_size 48 --selection_layers 3 4 --selection_guidance image text --keep_rate 0.7 0.3  # bundled scenes
    accelerate launch examples/run_pretraining.py --train_shards "cc3m-{000..331}.tar" "sbu-{00..82}.tar" \
        --validation_file coco_val.json --image_root coco --max_steps 234000 \
        --vision_model_name_or_path openai/clip-vit-base-patch16 --text_model_name_or_path bert-base-uncased \
        --image_size 256 --learning_rate 1e-4 --tower_learning_rate 1e-5 1e-4 --weight_decay 0.02 \
        --per_device_train_batch_size 64 --dataloader_num_workers 8 --save_steps 2000

Pairs come from files, the Hub or the bundled scenes, as for the other tasks, or as a stream: of tar shards or files
(`--train_shards`), or of a data set on the Hub (`--dataset_name ... --streaming`). What it ends with, any other script
starts from (`--model`).
"""

import trips_examples  # noqa: F401  # isort: skip

from trips_examples.training.options import DataArguments, ModelArguments, PretrainingArguments, TrainingOptions
from trips_examples.training.parser import make_parser, run_script


OPTIONS = make_parser(
    ModelArguments,
    PretrainingArguments,
    DataArguments,
    TrainingOptions,
    description=__doc__,
    num_train_epochs=3.0,
    per_device_train_batch_size=48,
    texts_per_image=1,
)
if __name__ == "__main__":
    OPTIONS.check()  # before the imports that take seconds

from modeling_trips import TripsForPreTraining
from trips_examples.data.checking import with_fitting_texts
from trips_examples.data.collators import PretrainingCollator
from trips_examples.training.models import load_start, make_model, train_processor
from trips_examples.training.pretraining import PretrainingTrainer, check_objectives, load_pairs
from trips_examples.training.runs import parse_arguments, train_and_evaluate


def main(argv: list[str] | None = None) -> dict[str, float]:
    model_args, task_args, data_args, training_args = parse_arguments(OPTIONS, argv)
    side = None if task_args.is_stream else data_args.scene_size
    config, processor = load_start(model_args, side, **task_args.config_overrides())
    check_objectives(config)
    data, stream = load_pairs(task_args, data_args, training_args, config, processor)
    processor = processor or train_processor(config, data_args.vocabulary(data, "caption"))
    data = with_fitting_texts(data, "captions", processor, skip=data_args.skip_bad_rows)
    model = make_model(TripsForPreTraining, model_args, config, processor)
    collator = PretrainingCollator(
        processor,
        masks_words=model.config.mlm_weight > 0,
        cuts_captions=model.config.prefix_lm_weight > 0,
        seed=training_args.seed,
    )
    if task_args.teacher_start_steps is None and model_args.starts_from_weights:
        task_args.teacher_start_steps = 0
    trainer = PretrainingTrainer(
        model=model,
        args=training_args,
        task_args=task_args,
        train_dataset=data.get("train") if stream is None else stream,
        eval_dataset=data.get("validation"),
        data_collator=collator,
        processing_class=processor,
    )
    return train_and_evaluate(trainer, trainer.evaluate, data.get("test"))


if __name__ == "__main__":
    run_script(main)
