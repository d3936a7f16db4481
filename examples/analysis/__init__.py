"""Comparison of two models on the same items, with an HTML report."""

SAME_WEIGHTS = "same weights, keep rate 1.0"
SAME_WEIGHTS_NOTE = (
    f'"{SAME_WEIGHTS[0].upper()}{SAME_WEIGHTS[1:]}" prunes nothing, but the weights were not trained that way. '
    "An unpruned baseline needs its own training."
)
