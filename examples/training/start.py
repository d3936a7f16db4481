"""
What a model from scratch learns first, where its task alone teaches it little: the questions of easy-VQA.

True or false about two images, or a box, says little to a model that knows neither words nor shapes. On data of one's
own, training starts from a pre-trained model; on the embedded data there is none.
"""

import logging
from dataclasses import dataclass, field, replace
from pathlib import Path

from accelerate import PartialState

from trips_examples.data.scenes import TILE_SIZE
from trips_examples.training.options import DataArguments, ModelArguments, TripsTrainingArguments
from trips_examples.training.question_answering import train_question_answering


logger = logging.getLogger(__name__)

START_EPOCHS = 6.0


@dataclass
class StartedTrainingArguments(TripsTrainingArguments):
    """`TripsTrainingArguments` for a task that begins from a model which knows words and shapes."""

    start_epochs: float | None = field(
        default=None,
        metadata={
            "help": "How often a model from scratch sees easy-VQA's questions before it trains on embedded scenes. "
            "Default: 6; none in a short trial with --max_steps. That model is kept in easy_vqa in the output folder; "
            "a run that resumes does not train it again."
        },
    )
    num_train_epochs: float = field(default=5.0, metadata={"help": "How often to train on each row."})
    per_device_train_batch_size: int = field(default=64, metadata={"help": "Rows per device and step."})
    learning_rate: float = field(default=5e-4, metadata={"help": "Peak learning rate of AdamW."})


def start_from_questions(
    model_args: ModelArguments, data_args: DataArguments, training_args: StartedTrainingArguments
) -> ModelArguments:
    """
    Trains a model of these options on easy-VQA at half size, as these tasks show their scenes, if it is to be from
    scratch and the data are the embedded ones.

    Returns:
        `ModelArguments`: those of a start from that model, or `model_args`.
    """
    if model_args.starts_from_weights or not data_args.is_embedded or not training_args.do_train:
        return model_args
    if training_args.start_epochs is None and training_args.max_steps > 0:
        logger.warning(
            "A short trial (--max_steps %d): it skips the %g epochs on easy-VQA's questions that a whole run begins "
            "with, and so learns little. --start_epochs %g does not skip them.",
            training_args.max_steps,
            START_EPOCHS,
            START_EPOCHS,
        )
        return model_args
    epochs = START_EPOCHS if training_args.start_epochs is None else training_args.start_epochs
    if epochs == 0:
        return model_args
    if training_args.deepspeed_plugin is not None:
        raise ValueError(
            "DeepSpeed trains one model per launch: train on easy-VQA first (run_vqa.py --image_size 32) and give "
            "that model with --model_name_or_path, or begin from nothing with --start_epochs 0."
        )
    folder = Path(training_args.output_dir) / "easy_vqa"
    if training_args.resume_from_checkpoint is None or not (folder / "train_results.json").exists():
        logger.info("First the questions of easy-VQA (--start_epochs %g), in %s", epochs, folder)
        questions_args = replace(  # type: ignore[call-arg]  # of fields that Transformers declares
            training_args,
            output_dir=str(folder),
            do_train=True,
            do_eval=False,
            num_train_epochs=epochs,
            max_steps=-1,
            per_device_train_batch_size=TripsTrainingArguments.per_device_train_batch_size,
            learning_rate=TripsTrainingArguments.learning_rate,
            eval_strategy="no",
            save_strategy="no",
            resume_from_checkpoint=None,
        )
        questions = DataArguments(max_train_samples=data_args.max_train_samples)
        started_args = replace(model_args, image_size=TILE_SIZE // 2, pointing_loss_coefficient=None)
        train_question_answering(started_args, questions, questions_args)
        PartialState().wait_for_everyone()
    return replace(model_args, model_name_or_path=str(folder))
