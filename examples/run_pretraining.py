r"""
Pre-train TRIPS on pairs of image and caption: contrast (ITC), matching (ITM), masked words (MLM) and continuations
(PrefixLM), with a momentum teacher.

    python examples/run_pretraining.py --model examples/trips-tiny-scenes-unpruned --grid 2 \
        --image_size 48 --schedule 3:image:0.7,4:text:0.3  # bundled scenes
    accelerate launch examples/run_pretraining.py --train_shards "cc3m-{000..331}.tar" "sbu-{00..82}.tar" \
        --validation_file coco_val.json --image_root coco --max_steps 234000 \
        --vision_model_name_or_path openai/clip-vit-base-patch16 --text_model_name_or_path bert-base-uncased \
        --image_size 256 --learning_rate 1e-4 --tower_learning_rate 1e-5 1e-4 --weight_decay 0.02 \
        --per_device_train_batch_size 64 --dataloader_num_workers 8 --save_steps 2000

Pairs come from files, the Hub or the bundled scenes, as for the other tasks, or as a stream: of tar shards or files
(`--train_shards`), or of a data set on the Hub (`--dataset_name ... --streaming`). What it ends with, any other script
starts from (`--model`).
"""

from trips_examples.training.options import config_fields, run_script, task_parser


OPTIONS = task_parser("pretraining", __doc__, __name__)

from modeling_trips import TripsForPreTraining
from trips_examples.data.collators import PretrainingCollator
from trips_examples.training.pretraining import PretrainingTrainer, load_pairs
from trips_examples.training.runs import parse_arguments, train_and_evaluate
from trips_examples.training.start import start_run


def main(argv: list[str] | None = None) -> dict[str, float]:
    model_args, task_args, data_args, training_args = parse_arguments(OPTIONS, argv)
    model, processor, data = start_run(
        TripsForPreTraining,
        "captions",
        model_args,
        data_args,
        training_args,
        load=load_pairs,
        **config_fields(task_args),
    )
    collator = PretrainingCollator(
        processor,
        masks_words=model.config.mlm_weight > 0,
        cuts_captions=model.config.prefix_lm_weight > 0,
        seed=training_args.seed,
    )
    if task_args.teacher_start_steps is None and (model_args.model or model_args.starts_from_parts):
        task_args.teacher_start_steps = 0
    trainer = PretrainingTrainer(
        model=model,
        args=training_args,
        task_args=task_args,
        data=data,
        data_collator=collator,
        processing_class=processor,
    )
    return train_and_evaluate(trainer)


if __name__ == "__main__":
    run_script(main)
