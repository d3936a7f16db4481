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
"""Pooling mode of a text encoder, from the files of Sentence Transformers."""

import json
import os

from transformers.utils import cached_file

from .rules import ConversionError


POOLING_MODES = ("cls", "mean")
# The older form of the configuration has a switch per mode.
SWITCH = "pooling_mode_"
MODES_OF_SWITCHES = {"cls_token": "cls", "mean_tokens": "mean"}


def stated_pooling_mode(source: str | os.PathLike) -> str:
    """
    Read the pooling mode of a text encoder from the folder that `modules.json` names.

    Args:
        source (`str`): Hub repository or folder.

    Returns:
        `"cls"` or `"mean"`. Default: `"cls"`, as in BERT.

    Raises:
        ConversionError: The pooling is of another kind.
    """
    modules = _json_beside(source, "modules.json") or []
    folders = [module["path"] for module in modules if module["type"].rpartition(".")[2] == "Pooling"]
    if not folders:
        return "cls"
    config = _json_beside(source, f"{folders[0]}/config.json") or {}
    switched_on = [name.removeprefix(SWITCH) for name, on in config.items() if name.startswith(SWITCH) and on is True]
    modes = config.get("pooling_mode", [MODES_OF_SWITCHES.get(mode, mode) for mode in switched_on])
    modes = [modes] if isinstance(modes, str) else modes
    if len(modes) != 1 or modes[0] not in POOLING_MODES:
        raise ConversionError(
            f"The pooling of `text` must be one of {', '.join(POOLING_MODES)}, got {' and '.join(modes) or 'nothing'} "
            f"in {folders[0]}/config.json. Choose one with `pooling_mode`."
        )
    return modes[0]


def _json_beside(source: str | os.PathLike, name: str):
    """Read a JSON file from a model's folder or Hub repository; `None` if it does not exist."""
    path = cached_file(
        source,
        name,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if path is None:
        return None
    with open(path, encoding="utf-8") as file:
        return json.load(file)
