"""Does pruning cost fine detail? What a model makes of small things in a training, as it is and unpruned."""

from transformers import Trainer

from modeling_trips import UNPRUNED, TripsForQuestionAnswering, TripsForVisualGrounding, use_schedule
from trips_examples.analysis.comparison import Group, compare, join
from trips_examples.data.rows import image_size
from trips_examples.metrics.selection import regions_of
from trips_examples.training.predictions import texts_of


SMALL = 1 / 16  # of the image, at most


def small_things(rows: list[dict]) -> list[dict]:
    """The rows that are about something small, as far as their `region` or `box` tells."""
    small = []
    for number, (x0, y0, x1, y1) in regions_of(rows).items():
        height, width = image_size(rows[number])
        if (x1 - x0) * (y1 - y0) <= SMALL * height * width:
            small.append(rows[number])
    return small


def compare_with_twin(trainer: Trainer, rows: list[dict]) -> Group | None:
    """
    The model beside its own weights unpruned, on small things.

    Args:
        trainer (`Trainer`): its model is in evaluation mode.
        rows (`list[dict]`): of its task.

    Returns:
        [`Group`]: accuracies, what only one of them has right, and McNemar's test; None where nothing is known to be
        small, or where the model neither answers questions nor finds boxes.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    rows = small_things(rows)
    if not rows or not isinstance(model, (TripsForQuestionAnswering, TripsForVisualGrounding)):
        return None
    own = _predicted(trainer, rows)
    with use_schedule(model, UNPRUNED):
        return compare(join(own, _predicted(trainer, rows))).overall


def _predicted(trainer: Trainer, rows: list[dict]) -> list[dict]:
    """The rows, each with its `prediction`."""
    size, predicted = trainer.args.per_device_eval_batch_size, []
    for start in range(0, len(rows), size):
        batch = rows[start : start + size]
        _, output, _ = trainer.prediction_step(trainer.model, trainer.data_collator(batch), prediction_loss_only=False)
        if "answers" in batch[0]:
            predictions = texts_of(output.cpu().numpy(), trainer.processing_class)
        else:
            sizes = [image_size(row) for row in batch]
            predictions = trainer.processing_class.post_process_grounding(output, sizes).tolist()
        predicted += [{**row, "prediction": prediction} for row, prediction in zip(batch, predictions)]
    return predicted
