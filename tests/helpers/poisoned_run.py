"""run_vqa.py with a NaN loss for the row that the environment variable POISONED names."""

import os

from trips_examples import run_vqa


class PoisonedCollator(run_vqa.VqaCollator):
    def weighted_labels(self, rows):
        labels = super().weighted_labels(rows)
        if any(row["source"] == os.environ["POISONED"] for row in rows):
            labels["loss_weights"][0] = float("nan")
        return labels


if __name__ == "__main__":
    run_vqa.VqaCollator = PoisonedCollator
    run_vqa.main()
