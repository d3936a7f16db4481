"""
Transformers' test suites pass: `ModelTesterMixin` on every model, `ProcessorTesterMixin` and `ConfigTester`, but not
`GenerationTesterMixin`, which its source distribution lacks. Our part of them is in tests/transformers_suites.
"""

import re
import sys
from xml.etree import ElementTree

import pytest
import transformers
from places import ROOT
from programs import output_of
from transformers_suites.source_tree import build_tree, download_source

from modeling_trips.registration_trips import MODELS


# Tests that the suites skip, and the feature that TRIPS lacks. This project adds no skips.
PART = "Trips(TextModel|VisionModel|SingleStreamModel|Decoder)"
MODEL_NAMES = {model.__name__ for models in MODELS.values() for model in models}
MAIN_MODELS = ("TripsModel", "TripsForQuestionAnswering", "TripsForRetrieval", "TripsTextModel", "TripsVisionModel")
FURTHER = {"TripsDecoder", "TripsModel_skip_connected", "TripsModel_single_stream"}
OTHER_MODELS = tuple(sorted(MODEL_NAMES - {*MAIN_MODELS} | FURTHER))
WRITERS = "|".join(model.__name__ for models in MODELS.values() for model in models if model.can_generate())
NOT_APPLICABLE = {
    r"\w+\.test_(model_rope_\w+|vision_axial_rope)": "rotary positions",
    r"\w+\.test_resize_position_vector_embeddings": "a method that resizes the positions",
    r"\w+\.test_(moe_models_\w+|output_router_logits_\w+|eager_matches_batched_and_grouped_\w+)": "experts",
    r"\w+\.test_keep_in_fp32_modules\w*": "modules that stay in float32",
    r"\w+\.test_sliding_window_mask": "a sliding window",
    r"\w+\.test_tp_plan_matches_params": "a plan for tensor parallelism",
    r"\w+\.test_reverse_loading_mapping": "weights that loading converts",
    r"\w+\.test_causal_lm_loss_honors_shift_labels": "a language model without an encoder",
    rf"{PART}\.test_(attn_implementation|sdpa_can_dispatch)_composite_models": "sub-models",
    rf"{PART}\.test_internal_model_config_and_subconfig_are_same": "sub-models",
    rf"{PART}\.test_can_set_attention_dynamically_composite_model": "sub-models",
    rf"(?!{WRITERS})\w+\.test_encoder_decoder_loss_no_double_shift": "a loss of what a decoder writes",
    r"Trips(Model\w*|For\w+)\.test_sdpa_can_dispatch_non_composite_models": "no sub-models",
    rf"(?!{WRITERS}|TripsDecoder)\w+\.test_bc_cache_name_forward": "a cache",
    r"TripsFor(Retrieval|PreTraining)\.test_inputs_embeds(_matches_input_ids)?": "no embeddings as text, as in CLIP",
    r"Trips(Vision|SingleStream)Model\.test_(inputs_embeds\w*|resize_\w*embeddings\w*)": "a vocabulary",
    r"TripsDecoder\.test_(torch_save_load|can_load_from_already_mapped_keys)": "an Auto class",
    r"TripsFor\w+\.test_can_capture_specific_layers_hidden_states": "hidden states of one stack alone",
    r"TripsProcessor\.\w+_(video|videos|audio|audio_from_video|video_frame_sampling)(_\d)?": "videos and audio",
    r"TripsProcessor\.test_(get_num_multimodal_tokens\w*|replacement_offsets|processor_single_text_same_as_batched)": (
        "placeholder tokens for images"
    ),
    r"TripsProcessor\.test_apply_chat_template_tool_calls_no_content": "tools",
}
NOT_HERE = r"test requires .+|test is slow"  # accelerators, flash attention, ...; slow tests need an accelerator too


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    source = download_source(transformers.__version__, cache=ROOT / "build" / "transformers_source")
    path = tmp_path_factory.mktemp("transformers") / "tree"
    build_tree(source, path)
    return path


def run_suite(tree, file, names):
    """Run the tests of some models. Return the passed tests, and the skipped tests with the reason."""
    report = tree / "report.xml"
    command = [sys.executable, "-m", "pytest", f"tests/models/trips/{file}", f"--junitxml={report}"]
    command += ["-k", " or ".join(f"{name}Test" for name in names), "--tb=short", "--disable-warnings"]
    variables = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    output_of(*command, cwd=tree, variables=variables)
    passed, skipped = [], {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname').rpartition('.')[2].removesuffix('Test')}.{case.get('name')}"
        reason = case.find("skipped")
        if reason is not None:
            skipped[name] = reason.get("message")
        elif len(case) == 0:
            passed.append(name)
    return passed, skipped


@pytest.mark.parametrize(
    "file, names",
    [
        pytest.param("model_suites.py", MAIN_MODELS, marks=pytest.mark.slow),
        pytest.param("model_suites.py", OTHER_MODELS, marks=pytest.mark.release),
        pytest.param("processor_suite.py", ("TripsProcessor",), marks=pytest.mark.slow),
        pytest.param("config_suite.py", ("TripsConfig",), marks=pytest.mark.slow),
    ],
)
def test_the_suites_of_transformers_pass(tree, file, names):
    passed, skipped = run_suite(tree, file, names)
    assert set(names) <= {name.partition(".")[0] for name in passed}
    unexplained = {
        name: reason
        for name, reason in skipped.items()
        if not re.fullmatch(NOT_HERE, reason) and not any(re.fullmatch(test, name) for test in NOT_APPLICABLE)
    }
    assert unexplained == {}
