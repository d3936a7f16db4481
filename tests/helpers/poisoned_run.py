"""run_vqa.py with a NaN loss for the row that the environment variable POISONED names."""

import os

from trips_examples import run_vqa
from trips_examples.training.runs import parse_arguments


class PoisonedCollator(run_vqa.VqaCollator):
    def encode(self, images, image_index, rows):
        inputs = super().encode(images, image_index, rows)
        if any(row["source"] == os.environ["POISONED"] for row in rows):
            inputs["loss_weights"][0] = float("nan")
        return inputs


if __name__ == "__main__":
    run_vqa.VqaCollator = PoisonedCollator
    run_vqa.train_question_answering(*parse_arguments(run_vqa.OPTIONS))
