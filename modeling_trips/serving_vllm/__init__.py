"""
Plugin for vLLM that selects patches inside and after the vision towers of generative models.

vLLM finds it by its entry point. Models select patches only under the names of `MODULES`, so nothing else
changes. `python -m modeling_trips.serving_vllm MODEL --schedule 8:image:0.33` prints the command that serves a model.
"""

import logging
import os
import re


# Module of each architecture that `--hf-overrides` can name.
MODULES = {
    "TripsInternVLChatModel": "internvl",
    "TripsLlavaForConditionalGeneration": "llava",
    "TripsQwen2VLForConditionalGeneration": "qwen",
    "TripsQwen2_5_VLForConditionalGeneration": "qwen",
    "TripsQwen3VLForConditionalGeneration": "qwen",
    "TripsQwen3VLMoeForConditionalGeneration": "qwen",
    "TripsSmolVLMForConditionalGeneration": "smolvlm",
    "TripsVlmForConditionalGeneration": "backend",
}
# Releases of vLLM whose interfaces the plugin fits: from the first, before the second.
RELEASES = ("0.32", "0.34")
# Variable of the environment that tries the plugin with any release.
ANY_RELEASE = "TRIPS_ANY_VLLM"


def check_release(version: str):
    """Raise a ValueError if the plugin does not fit this release of vLLM, unless `ANY_RELEASE` is set."""
    if os.environ.get(ANY_RELEASE) == "1":
        return
    first = parse_release(RELEASES[0])
    end = parse_release(RELEASES[1])
    given = parse_release(version)
    if given is None or not first <= given < end:
        raise ValueError(
            f"Patch selection needs vLLM >={RELEASES[0]},<{RELEASES[1]}, got {version}. Set {ANY_RELEASE}=1 to try it."
        )


def parse_release(version: str) -> tuple[int, int] | None:
    """Return the first two numbers of a version, `None` for others, such as `dev`."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return None if found is None else (int(found[1]), int(found[2]))


def register():
    """Register the architectures. vLLM calls this in each of its processes."""
    import vllm

    try:
        check_release(vllm.__version__)
    except ValueError as error:  # other models still work
        logging.getLogger("vllm").warning("%s The architectures Trips... are not available.", error)
        return
    for name, module in MODULES.items():
        vllm.ModelRegistry.register_model(name, f"{__name__}.{module}:{name}")
