"""The options of retrieval, which pre-training adds to."""

from dataclasses import dataclass, field

from trips_examples.training.late_choice import LateChoiceModelArguments
from trips_examples.training.options import TripsTrainingArguments


@dataclass
class RetrievalModelArguments(LateChoiceModelArguments):
    """`LateChoiceModelArguments` with the losses of retrieval."""

    itc_weight: float | None = field(
        default=None, metadata={"help": "Weight of the contrastive loss. Default: the model's, 1."}
    )
    itm_weight: float | None = field(
        default=None, metadata={"help": "Weight of the matching loss. Default: the model's, 1."}
    )

    def config_overrides(self) -> dict:
        names = ("itc_weight", "itm_weight")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return {**super().config_overrides(), **given}


@dataclass
class RetrievalTrainingArguments(TripsTrainingArguments):
    """`TripsTrainingArguments` with how the evaluation searches."""

    num_train_epochs: float = field(default=5.0, metadata={"help": "How often to train on each caption."})
    per_device_train_batch_size: int = field(default=48, metadata={"help": "Captions per device and step."})
    per_device_eval_batch_size: int = field(
        default=128, metadata={"help": "Images, captions or pairs per device and step of the evaluation."}
    )
    texts_per_image: int = field(
        default=1,
        metadata={"help": "Captions of one image in a training batch; they share its cached image states."},
    )
    rerank_k: int = field(
        default=16,
        metadata={"help": "How many candidates of each query are matched and ranked again in evaluation. 0: none."},
    )
    rerank_by: str = field(
        default="both",
        metadata={
            "help": "What ranks them: both (log-odds of a match plus similarity over temperature) or matching (the "
            "log-odds alone)."
        },
    )
