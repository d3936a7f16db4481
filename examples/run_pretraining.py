r"""
Pre-train TRIPS on pairs of image and caption: contrast (ITC), matching (ITM), masked words (MLM) and continuations
(PrefixLM), with a momentum teacher.

    python examples/run_pretraining.py                  # scenes of easy-VQA, the tiny preset: on a laptop
    python examples/run_pretraining.py --keep_rate 1.0 --output_dir unpruned  # its twin
    accelerate launch examples/run_pretraining.py --train_shards "cc3m-{000..331}.tar" "sbu-{00..82}.tar" \
        --validation_file coco_val.json --image_root coco --max_steps 234000 \
        --vision_model_name_or_path openai/clip-vit-base-patch16 --text_model_name_or_path bert-base-uncased \
        --image_size 256 --learning_rate 1e-4 --tower_learning_rate 1e-5 1e-4 --weight_decay 0.02 \
        --per_device_train_batch_size 64 --dataloader_num_workers 8 --save_steps 2000

Pairs come from files, the Hub or the embedded scenes, as for the other tasks, or as a stream: of tar shards or files
(`--train_shards`), or of a data set on the Hub (`--dataset_name ... --streaming`). What it ends with, any other script
starts from (`--model_name_or_path`).

Installed without its source, the script is `python -m trips_examples.run_pretraining`.
"""

from functools import partial

from trips_examples.data.pretraining import PretrainingCollator
from trips_examples.data.texts import with_fitting_texts
from trips_examples.training.pretraining_loading import PretrainingStart, load_pairs
from trips_examples.training.pretraining_options import (
    PretrainingArguments,
    PretrainingDataArguments,
    PretrainingModelArguments,
)
from trips_examples.training.pretraining_trainer import PretrainingTrainer
from trips_examples.training.runs import end_processes, parse_arguments, train_and_evaluate


def main(argv: list[str] | None = None) -> dict[str, float]:
    model_args, data_args, training_args = parse_arguments(
        argv, PretrainingModelArguments, PretrainingDataArguments, PretrainingArguments, description=__doc__
    )
    start = PretrainingStart(model_args, data_args.half_scene_size("captions"))
    data, stream = load_pairs(data_args, training_args, start.patch_size, start.processor)
    model, processor = start.finish(data_args.vocabulary(data, "caption"))
    data = with_fitting_texts(data, "captions", processor, skip=data_args.skip_bad_rows)
    make_collator = partial(
        PretrainingCollator,
        processor,
        mlm_probability=training_args.mlm_probability,
        masks_words=model.config.mlm_weight > 0,
        cuts_captions=model.config.prefix_lm_weight > 0,
        seed=training_args.seed,
    )
    if training_args.teacher_start_steps is None and model_args.starts_from_weights:
        training_args.teacher_start_steps = 0
    trainer = PretrainingTrainer(
        model=model,
        args=training_args,
        train_dataset=data.get("train") if stream is None else stream,
        eval_dataset=data.get("validation"),
        data_collator=make_collator(),
        train_collator=make_collator(training=True, augment=data_args.augment),
        processing_class=processor,
        selection_teacher=model_args.make_selection_teacher(training_args.device),
    )
    return train_and_evaluate(trainer, trainer.evaluate)


if __name__ == "__main__":
    main()
    end_processes()
