# Copyright 2026 The TRIPS for Transformers authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Settings of patch selection that a model's configuration carries into vLLM."""

from dataclasses import dataclass

from transformers import PreTrainedConfig

from ..configuration_trips import SelectionSchedule
from ..hosts.vlm.pruning import ExitSelection
from ..patch_selection import num_kept_tokens


# Scorers whose choice depends on the image and the question alone, so that it may be cached.
SCORERS = ("prompt", "diversity", "pooling")


@dataclass(frozen=True)
class ServingSettings:
    """
    Selection inside and after the vision tower.

    Args:
        schedule (`SelectionSchedule`): Selection layers of the tower.
        at_exit (`ExitSelection`): Selection after the tower.
    """

    schedule: SelectionSchedule
    at_exit: ExitSelection

    @classmethod
    def parse(
        cls, schedule: str = "unpruned", visual_tokens: int | None = None, visual_scorer: str = "prompt"
    ) -> "ServingSettings":
        """
        Args:
            schedule (`str`, *optional*, defaults to `"unpruned"`): Text form of the schedule, as in `8:image:0.33`.
            visual_tokens (`int`, *optional*): Number of visual tokens per image for the language model. Default: all
                that the tower keeps.
            visual_scorer (`str`, *optional*, defaults to `"prompt"`): One of `SCORERS`.

        Raises:
            TypeError: `visual_tokens` is not an integer.
            ValueError: A setting is unknown or out of its range.
        """
        if visual_scorer not in SCORERS:
            raise ValueError(f"`visual_scorer` must be one of {', '.join(SCORERS)}, got {visual_scorer!r}.")
        return cls(SelectionSchedule.parse(schedule), ExitSelection(visual_tokens, scorer=visual_scorer))

    @classmethod
    def of(cls, config: PreTrainedConfig) -> "ServingSettings":
        """Return those of a model's configuration, which `--hf-overrides` sets."""
        names = {"patch_selection": "schedule", "visual_tokens": "visual_tokens", "visual_scorer": "visual_scorer"}
        return cls.parse(**{names[key]: getattr(config, key) for key in names if hasattr(config, key)})

    @property
    def reads_prompt(self) -> bool:
        """Whether the question decides which tokens are kept."""
        by_text = any(selection.guidance == "text" for selection in self.schedule.selections)
        return by_text or (self.at_exit.visual_tokens is not None and self.at_exit.reads_prompt)

    def num_kept_in_tower(self, num_units: int) -> int:
        """Return how many visual tokens of an image (or tile) the tower keeps."""
        for selection in self.schedule.selections:
            num_units = num_kept_tokens(num_units, selection.keep_rate)
        return num_units
