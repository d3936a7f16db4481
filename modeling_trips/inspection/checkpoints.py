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
"""Loading of checkpoints for tools, with checks of the head and the weights."""

from collections.abc import Sequence
from pathlib import Path

from transformers import AutoConfig

import modeling_trips
from modeling_trips import TripsPreTrainedModel


EXPORT_MANIFEST = "export.json"


def is_exported(name: str | Path) -> bool:
    """Return whether `name` is a folder that `python -m modeling_trips.export` wrote."""
    return (Path(name) / EXPORT_MANIFEST).is_file()


def check_head(
    name: str | Path, heads: Sequence[type[TripsPreTrainedModel]] | None = None, revision: str = "main"
) -> type[TripsPreTrainedModel]:
    """
    Return the class of a checkpoint or an exported model.

    Raises:
        OSError: There is no such checkpoint.
        ValueError: Its class is none of `heads`, by default none of this project.
    """
    try:
        config = AutoConfig.from_pretrained(name, revision=revision)
    except OSError as error:
        raise OSError(f"{name} cannot be loaded. {error}") from error
    architecture = (getattr(config, "architectures", None) or ["model without a head"])[0]
    model_class = getattr(modeling_trips, architecture, None)
    if not (isinstance(model_class, type) and issubclass(model_class, TripsPreTrainedModel)):
        raise ValueError(f"{name} is a {architecture}, which is not a TRIPS model.")
    if heads is not None and not issubclass(model_class, tuple(heads)):
        raise ValueError(f"{name} is a {architecture}. Give a {' or '.join(head.__name__ for head in heads)}.")
    return model_class


def load_checkpoint(
    name: str | Path,
    heads: Sequence[type[TripsPreTrainedModel]] | None = None,
    revision: str = "main",
    **options,
) -> TripsPreTrainedModel:
    """
    Load a trained model in its saved class and in evaluation mode.

    Args:
        name (`str` or `Path`): Folder or Hub repository of a checkpoint.
        heads (`Sequence[type]`, *optional*): Accepted model classes. By default every model of this project.
        revision (`str`, *optional*, defaults to `"main"`): Branch, tag or commit on the Hub.
        options: Passed to `from_pretrained`, such as `dtype` or `keep_rate`.

    Raises:
        OSError: There is no such checkpoint.
        ValueError: The checkpoint is of another class or an exported model; or weights are missing, unexpected, of
            another shape, NaN or infinite.
    """
    model_class = check_head(name, heads, revision)
    if is_exported(name):
        raise ValueError(f"{name} is an exported model. Load it with `modeling_trips.export.load_exported`.")
    model, report = model_class.from_pretrained(name, revision=revision, output_loading_info=True, **options)
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[problem]:
            raise ValueError(
                f"The weights of {name} do not fit a {model_class.__name__}: {problem} {sorted(report[problem])}."
            )
    broken = [key for key, tensor in model.state_dict().items() if not tensor.isfinite().all()]
    if broken:
        raise ValueError(f"The weights of {name} are NaN or infinite in {', '.join(broken[:5])}.")
    return model.eval()
