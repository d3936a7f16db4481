r"""
Vision-language models of Transformers as models of lmms-eval, with patch selection.

    lmms-eval --model trips_vlm --model_args pretrained=llava-hf/llava-1.5-7b-hf --tasks gqa --batch_size 16
    lmms-eval --model trips_vlm --tasks gqa --batch_size 16 \
        --model_args pretrained=llava-hf/llava-1.5-7b-hf,schedule=8:image:0.33,visual_tokens=64
"""

from accelerate import Accelerator
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from lmms_eval.utils import Collator
from tqdm.auto import tqdm

from trips_examples.lmms.generation import VisionLanguageModel


class TripsVlm(lmms):
    """
    Args:
        batch_size (`int`, *optional*, defaults to 1): Conversations per step.
        options: Arguments of [`VisionLanguageModel`]. Several layers of a schedule need quotes:
            `schedule="5:image:0.7,12:image:0.5"`.
    """

    is_simple = False

    def __init__(self, batch_size: int | str = 1, **options):
        super().__init__()
        self.accelerator = Accelerator()
        self._rank = self.accelerator.process_index
        self._world_size = self.accelerator.num_processes
        self.batch_size = int(batch_size)
        if "schedule" in options:
            options["schedule"] = options["schedule"].strip("\"'")  # lmms-eval keeps the quotes
        self.vlm = VisionLanguageModel(**options)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        # Batches have equal options and similar lengths.
        collator = Collator(
            [request.args for request in requests],
            sort_fn=lambda arguments: -len(arguments[0]),
            group_fn=lambda arguments: arguments[2],
            grouping=True,
        )
        answers: list[str] = []
        with tqdm(total=len(requests), desc="Answers", disable=self.rank != 0) as bar:
            for batch in collator.get_batched(n=self.batch_size):
                conversations = [self.conversation(*arguments) for arguments in batch]
                options = batch[0][2]  # those of the whole batch
                answers += self.vlm.answer(conversations, options)
                bar.update(len(batch))
        return collator.get_original(answers)

    def conversation(self, context: str, messages_of, options: dict, number: int, task: str, split: str) -> list[dict]:
        messages = ChatMessages(messages=messages_of(self.task_dict[task][split][number]))
        _, videos, audios = messages.extract_media()
        if videos or audios:
            raise NotImplementedError(f"{task}, {split}, {number}: `trips_vlm` needs images, got video or audio.")
        return messages.to_hf_messages()

    def loglikelihood(self, requests: list[Instance]):
        raise NotImplementedError("`trips_vlm` only generates text. Choose a task with output_type generate_until.")

    def generate_until_multi_round(self, requests: list[Instance]):
        raise NotImplementedError("`trips_vlm` only supports one round. Choose a task of one round.")
