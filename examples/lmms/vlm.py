r"""
Any vision-language model of Transformers as a model of lmms-eval, with patch selection.

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

from modeling_trips.hosts import TextGuide, apply_patch_selection
from trips_examples.lmms.generation import VisionLanguageModel


class TripsVlm(lmms):
    """
    Args:
        pretrained (`str`): Folder or Hub repository of a model that `AutoModelForImageTextToText` loads.
        schedule (`str`, *optional*, defaults to `"unpruned"`): Selection inside the vision tower. With several
            layers it stands in quotes: `schedule="5:image:0.7,12:image:0.5"`.
        visual_tokens (`int`, *optional*): Number of visual tokens per image that the language model gets.
        scorer (`str`, *optional*, defaults to `"prompt"`): What chooses these tokens.
        guide (`str`, *optional*): Folder or Hub repository of a `TextGuide`, for a layer that the text scores.
        resolution_tokens (`int`, *optional*): Reduce images to about this number of visual tokens.
        batch_size (`int`, *optional*, defaults to 1): Conversations per step.
        device (`str`, *optional*): By default the device of this process.
        dtype (`str`, *optional*, defaults to `"auto"`): Of the weights.

    Raises:
        TypeError: Selection does not support the model.
        ValueError: The schedule does not fit the model, or it has no images of a lower resolution.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        schedule: str = "unpruned",
        visual_tokens: int | None = None,
        scorer: str = "prompt",
        guide: str | None = None,
        resolution_tokens: int | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "auto",
    ):
        super().__init__()
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.batch_size = int(batch_size)
        self.vlm = VisionLanguageModel(pretrained, dtype)
        self.vlm.model.to(device or self.accelerator.device)
        schedule = schedule.strip("\"'")  # lmms-eval leaves the quotes
        if resolution_tokens is not None:
            self.vlm.lower_resolution(int(resolution_tokens))
        if schedule != "unpruned" or visual_tokens is not None or guide is not None:
            loaded = None if guide is None else TextGuide.from_pretrained(guide).to(self.vlm.model.device).eval()
            apply_patch_selection(self.vlm.model, schedule, visual_tokens, scorer, loaded)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The answer to each request."""
        # Conversations of equal options form batches. Those of similar length follow each other.
        collator = Collator(
            [request.args for request in requests],
            sort_fn=lambda arguments: -len(arguments[0]),
            group_fn=lambda arguments: arguments[2],
            grouping=True,
        )
        answers: list[str] = []
        with tqdm(total=len(requests), desc="Answers", disable=self.rank != 0) as bar:
            for batch in collator.get_batched(n=self.batch_size):
                answers += self.vlm.answer([self.conversation(*arguments) for arguments in batch], batch[0][2])
                bar.update(len(batch))
        return collator.get_original(answers)

    def conversation(self, context: str, messages_of, options: dict, number: int, task: str, split: str) -> list[dict]:
        messages = ChatMessages(messages=messages_of(self.task_dict[task][split][number]))
        _, videos, audios = messages.extract_media()
        if videos or audios:
            raise NotImplementedError(f"{task}, {split}, {number}: `trips_vlm` takes images, got video or audio.")
        return messages.to_hf_messages()

    def loglikelihood(self, requests: list[Instance]):
        raise NotImplementedError("`trips_vlm` generates text: choose a task whose output_type is generate_until.")

    def generate_until_multi_round(self, requests: list[Instance]):
        raise NotImplementedError("`trips_vlm` answers one question at a time: choose a task of one round.")
