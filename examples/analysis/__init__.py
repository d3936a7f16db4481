"""Where two models differ on the same items, and a page that shows it."""

SAME_WEIGHTS = "same weights, keep rate 1.0"
SAME_WEIGHTS_NOTE = (
    f'"{SAME_WEIGHTS[0].upper()}{SAME_WEIGHTS[1:]}" prunes nothing, but the weights were not trained that way. '
    "An unpruned baseline needs its own training."
)
