"""
Plugin for vLLM that selects patches inside and after the vision towers of generative models.

vLLM finds it by its entry point. Models select patches only under the names of `ARCHITECTURES`, so nothing else
changes. `python -m modeling_trips.serving_vllm MODEL --schedule 8:image:0.33` prints the command that serves a model.
"""

import logging
import os
from collections.abc import Callable
from functools import wraps

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion


# Architecture of vLLM for each type of model.
ARCHITECTURES = {
    "gemma3": "TripsGemma3ForConditionalGeneration",
    "gemma4": "TripsGemma4ForConditionalGeneration",
    "glm4v": "TripsGlm4vForConditionalGeneration",
    "glm4v_moe": "TripsGlm4vMoeForConditionalGeneration",
    "internvl_chat": "TripsInternVLChatModel",
    "llava": "TripsLlavaForConditionalGeneration",
    "minicpmv4_6": "TripsMiniCPMV4_6ForConditionalGeneration",
    "mistral3": "TripsMistral3ForConditionalGeneration",
    "qwen2_vl": "TripsQwen2VLForConditionalGeneration",
    "qwen2_5_vl": "TripsQwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "TripsQwen3VLForConditionalGeneration",
    "qwen3_vl_moe": "TripsQwen3VLMoeForConditionalGeneration",
    "smolvlm": "TripsSmolVLMForConditionalGeneration",
    **dict.fromkeys(
        ("idefics3", "internvl", "llava_next", "llava_onevision"),
        "TripsVlmForConditionalGeneration",
    ),
}
# Module of an architecture, if it is not `exit`.
MODULES = {
    "TripsLlavaForConditionalGeneration": "llava",
    "TripsQwen2VLForConditionalGeneration": "qwen",
    "TripsQwen2_5_VLForConditionalGeneration": "qwen",
    "TripsQwen3VLForConditionalGeneration": "qwen",
    "TripsQwen3VLMoeForConditionalGeneration": "qwen",
    "TripsVlmForConditionalGeneration": "backend",
}
# Releases of vLLM whose interfaces the plugin fits.
RELEASES = SpecifierSet(">=0.32,<0.34", prereleases=True)
# Variable of the environment that tries the plugin with any release.
ANY_RELEASE = "TRIPS_ANY_VLLM"


def check_release(version: str):
    """Raise a ValueError if the plugin does not fit this release of vLLM, unless `ANY_RELEASE` is set."""
    if os.environ.get(ANY_RELEASE) == "1":
        return
    try:
        fits = version in RELEASES
    except InvalidVersion:  # such as `dev`
        fits = False
    if not fits:
        raise ValueError(f"Patch selection needs vLLM {RELEASES}, got {version}. Set {ANY_RELEASE}=1 to try it.")


def register():
    """Register the architectures. vLLM calls this in each of its processes."""
    import vllm

    try:
        check_release(vllm.__version__)
    except ValueError as error:  # other models still work
        logging.getLogger("vllm").warning("%s The architectures Trips... are not available.", error)
        return
    for name in ARCHITECTURES.values():
        module = MODULES.get(name, "exit")
        vllm.ModelRegistry.register_model(name, f"{__name__}.{module}:{name}")
    from vllm.engine.arg_utils import EngineArgs

    EngineArgs.create_model_config = refusing_settings_alone(EngineArgs.create_model_config)


def refusing_settings_alone(create: Callable) -> Callable:
    """Return a `create_model_config` that refuses settings that the architecture does not read."""

    @wraps(create)
    def create_model_config(*args, **kwargs):
        config = create(*args, **kwargs)
        if hasattr(config.hf_config, "patch_selection") and config.architectures[0] not in ARCHITECTURES.values():
            raise ValueError(
                f"`patch_selection` needs `architectures` beside it, such as Trips{config.architectures[0]}. "
                "`python -m modeling_trips.serving_vllm` sets both."
            )
        return config

    return create_model_config
