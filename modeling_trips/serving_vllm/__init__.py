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
"""
Plugin for vLLM that selects patches inside and after the vision towers of generative models.

vLLM finds it by its entry point. Models select patches only under the names of `ARCHITECTURES`, so nothing else
changes. `python -m modeling_trips.serving_vllm MODEL --schedule 8:image:0.33` prints the command that serves a model.
"""

import logging


# Module of each architecture that `--hf-overrides` can name.
ARCHITECTURES = {"TripsLlavaForConditionalGeneration": "llava", "TripsForConditionalGeneration": "backend"}
# Releases of vLLM whose interfaces the plugin fits: from the first, before the second.
RELEASES = ("0.32", "0.34")


def check_release(version: str):
    """
    Raises:
        ValueError: The plugin does not fit this release of vLLM.
    """
    first, end = (tuple(int(part) for part in release.split(".")) for release in RELEASES)
    if not first <= tuple(int(part) for part in version.split(".")[:2]) < end:
        raise ValueError(f"Patch selection needs vLLM >={RELEASES[0]},<{RELEASES[1]}, got {version}.")


def register():
    """Register the architectures. vLLM calls this in each of its processes."""
    import vllm

    try:
        check_release(vllm.__version__)
    except ValueError as error:  # other models still work
        logging.getLogger("vllm").warning("%s The architectures Trips... are not available.", error)
        return
    for name, module in ARCHITECTURES.items():
        vllm.ModelRegistry.register_model(name, f"{__name__}.{module}:{name}")
