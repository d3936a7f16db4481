"""
What a run on own data does where no option says otherwise: the best known values, see docs/pictures.md. They are
defaults, so that every option on the command line wins. Where an image has many texts, `settle_schedule` takes the
cheaper `MANY_TEXTS` in place of `FEW`.
"""

from pathlib import Path
from typing import Any

from trips_examples.data.source import BUNDLED


TOWERS = {
    "vision_model_name_or_path": "facebook/dinov2-small",
    "text_model_name_or_path": "sentence-transformers/all-MiniLM-L6-v2",
}
# Copies that examples/make_towers.py writes, by default into the working directory, and the folders to look for them.
COPIES = {"vision_model_name_or_path": "dinov2-small", "text_model_name_or_path": "minilm"}
PLACES = (Path("towers"), Path(__file__).resolve().parents[2] / "towers")

# Of a model from these towers. One layer more that is trained from the first step on slowed the learning of answers.
NEW = {"num_fusion_layers": 2, "freeze_vision_layers": 6, "max_image_size": 224}
ON_CPU = {"max_image_size": 112}  # a step takes a third of the time

# Of 12 layers. A text keeps few patches, early, so that what runs once per text is short; relevance teaches it which.
# Few patches show where a thing is, not where it ends: boxes keep a quarter, late. A prompt or a search has no text
# that says where to look: the image scores, in two steps.
FEW = "6:text:0.0625"
MANY_TEXTS = "9:image:0.25"  # they share the image's: fewer operations from seven per image on at 112 px
BOXES = "9:text:0.25"
BY_IMAGE = "6:image:0.5,9:image:0.5"
SCHEDULES = {"vqa": FEW, "nlvr2": FEW, "grounding": BOXES, "captioning": BY_IMAGE, "retrieval": BY_IMAGE}
# Where answers alone teach which patches matter. Boxes have regions.
FROM_ANSWERS = ("vqa", "nlvr2")

TRAINING = {  # of a model from towers, of a TRIPS checkpoint
    "per_device_train_batch_size": (60, 60),
    "texts_per_image": (5, 5),
    "learning_rate": (3e-4, 2e-4),
    "tower_learning_rate": ([1e-4], [7e-5]),
    "max_steps": (1_250, 150),
    "bf16": (None, None),  # where the device computes in it: less than half the time, equal losses
}

# The share of the steps that run unpruned first, 750 of 1,250 in a new model, and the share of these, the last, that
# teach the scores which patches the answers need. A trained model that gets a schedule has learnt to answer.
NEW_PHASES: dict[str, Any] = {"unpruned_share": 0.6, "relevance_share": 0.25}
START_PHASES: dict[str, Any] = {"unpruned_share": 0.125, "relevance_share": 1.0}


def towers() -> dict[str, str]:
    """Return the folders of the towers that a new model starts from, or else their names on the Hub."""
    for place in PLACES:
        found = {name: place / folder for name, folder in COPIES.items()}
        if all(folder.is_dir() for folder in found.values()):
            return {name: str(folder) for name, folder in found.items()}
    return TOWERS


def recipe(task: str | None, typed: dict, on_cpu: bool = False) -> dict:
    """
    Return the defaults of options for a run.

    Args:
        task (`str`, *optional*): A key of `SCHEDULES`. Other runs only begin unpruned.
        typed (`dict`): The options on the command line by name.
        on_cpu (`bool`, *optional*, defaults to `False`): Whether the run has no accelerator.
    """
    is_new = "model" not in typed
    start: dict = {"unpruned_share": NEW_PHASES["unpruned_share"] if is_new else 0.0}
    if task in FROM_ANSWERS:
        start["learns_relevance"] = True
        if is_new:
            start |= NEW_PHASES
        elif "schedule" in typed:
            start |= START_PHASES
    has_files = not typed.keys().isdisjoint(("train_file", "validation_file", "test_file"))
    if task is None or not (has_files or typed.get("dataset_name", BUNDLED) != BUNDLED):
        return start
    if not typed.keys().isdisjoint(("preset", "tokenizer")):
        return start  # from scratch
    has_other_tower = "vision_model_name_or_path" in typed  # another text model keeps tower and schedule
    defaults = start | {name: values[0 if is_new else 1] for name, values in TRAINING.items()}
    if is_new and not has_other_tower:
        defaults |= {**towers(), **NEW, "schedule": SCHEDULES[task]}
        if on_cpu:
            defaults |= ON_CPU
    if "learning_rate" in typed:  # the towers' is the same share of it
        share = typed["learning_rate"] / defaults["learning_rate"]
        defaults["tower_learning_rate"] = [share * rate for rate in defaults["tower_learning_rate"]]
    if task == "grounding":
        defaults["attention_loss_weight"] = 2.0
    if "num_train_epochs" in typed:
        del defaults["max_steps"]
    return defaults
