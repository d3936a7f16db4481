"""
`ModelTesterMixin` on every model that an Auto class loads, on the decoder, and on the other forms of the bare model. A
new class is tested once it is registered; one whose inputs or labels are its own needs a tester of its name.

A test of the suites that does not fit is replaced by one of the same name and purpose. Of Transformers' mixins, only
`ModelTesterMixin` runs. `GenerationTesterMixin` is an empty stub, as the source distribution lacks tests/generation;
tests/models/test_modeling_trips_generation.py checks in its place that caches, rows, beams and draws agree. Those for
pipelines, FSDP and tensor parallelism need files that are missing, too, the one for training only has token ids, and
the one for memory has no tests.
"""

import unittest
from unittest.mock import patch

import torch
import transformers
from torch import nn

from modeling_trips import (
    TripsDecoder,
    TripsForPreTraining,
    TripsForRetrieval,
    TripsModel,
    TripsSingleStreamModel,
    TripsTextModel,
    TripsVisionModel,
)
from modeling_trips.modeling_trips_pretraining import matching_pairs
from modeling_trips.registration_trips import MODELS

from ...generation.test_utils import GenerationTesterMixin
from ...test_modeling_common import ModelTesterMixin
from . import model_testers
from .model_testers import VISION_LENGTHS


def make_names_known():
    """Register the classes in Transformers' tables of models without a loss and with texts as labels."""
    known = {
        "AutoModel": (*MODELS["AutoModel"], TripsDecoder),
        "AutoModelForImageTextToText": MODELS["AutoModelForImageTextToText"],
    }
    for auto_class, models in known.items():
        names = getattr(transformers, auto_class)._model_mapping._model_mapping
        for model in models:
            names.setdefault(model.config_class.model_type, []).append(model.__name__)


class TripsSuite(ModelTesterMixin):
    @property
    def model_class(self):
        return self.all_model_classes[0]

    def forward_with(self, output):
        """Return the outputs of a forward pass with `output_attentions` or `output_hidden_states`."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        model = self.model_class._from_config(config, attn_implementation="eager").eval()
        with torch.no_grad():
            return model(**inputs, **{output: True})

    def assert_shapes(self, tensors, shapes):
        """Check shapes, without the batch dimension."""
        self.assertEqual([tuple(tensor.shape[1:]) for tensor in tensors], shapes)


class DecoderSuite(TripsSuite):
    additional_model_inputs = ["encoder_hidden_states"]


class VisionSuite(TripsSuite):
    additional_model_inputs = ["text_embeds"]
    test_resize_embeddings = False  # no vocabulary

    def test_model_get_set_embeddings(self):
        """Images are embedded by a module and not by a table, as in ViT."""
        model = self.model_class(self.model_tester.get_config())
        self.assertIs(model.get_input_embeddings(), model.embeddings.patch_embeddings)
        replacement = nn.Conv2d(3, 32, 4)
        model.set_input_embeddings(replacement)
        self.assertIs(model.embeddings.patch_embeddings, replacement)
        self.assertIsNone(model.get_output_embeddings())

    def test_enable_input_require_grads_with_gradient_checkpointing(self):
        """The suite checks the gradient of an embedding table; here it must reach the only trained weight."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        model = self.model_class(config).train()
        model.requires_grad_(False)
        weight = model.layers[-1].mlp.fc2.weight.requires_grad_()
        model.activation_checkpointing_enable()
        model.enable_input_require_grads()
        model(**inputs).last_hidden_state.square().sum().backward()
        self.assertGreater(weight.grad.abs().sum(), 0)


class SingleStreamSuite(VisionSuite):
    additional_model_inputs = ["pixel_values", "attention_mask"]


class HeadSuite(TripsSuite):
    additional_model_inputs = ["pixel_values"]
    _is_composite = True

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        return {**inputs, **self.model_tester.training_inputs()} if return_labels else inputs

    def test_training_gradient_checkpointing_use_reentrant_true(self):
        """Layers would be recomputed without what they take by keyword."""
        with self.assertRaisesRegex(ValueError, "use_reentrant"):
            self.model_class(self.model_tester.get_config()).activation_checkpointing_enable({"use_reentrant": True})


class GenerativeSuite(HeadSuite, GenerationTesterMixin):  # a test of `ModelTesterMixin` wants it
    is_encoder_decoder = True

    def test_attention_outputs(self):
        """The suite counts the outputs, without `selection`."""
        outputs = self.forward_with("output_attentions")
        for attentions in (outputs.encoder_attentions, outputs.decoder_attentions, outputs.cross_attentions):
            self.assert_shapes(attentions, [(3, 7, 7)] * 2)
        self.assertNotIn("encoder_hidden_states", outputs)
        self.assertNotIn("decoder_hidden_states", outputs)
        self.assert_shapes([entry.kept_indices for entry in outputs.selection], [(8,), (5,)])


class RetrievalSuite(HeadSuite):
    def setUp(self):
        """Draw the same negatives each time."""

        def pairs(logits, image_ids):
            with torch.random.fork_rng():
                torch.manual_seed(0)
                return matching_pairs(logits, image_ids)

        patched = patch("modeling_trips.modeling_trips_pretraining.matching_pairs", pairs)
        patched.start()
        self.addCleanup(patched.stop)

    def test_attention_outputs(self):
        """Text and image are not fused here, so that there are two stacks of layers."""
        outputs = self.forward_with("output_attentions")
        self.assert_shapes(outputs.vision_model_output.attentions, [(2, n, n) for n in VISION_LENGTHS[:-1]])
        self.assert_shapes(outputs.text_model_output.attentions, [(3, 7, 7)] * 2)

    def test_hidden_states_output(self):
        outputs = self.forward_with("output_hidden_states")
        vision = outputs.vision_model_output.hidden_states
        self.assert_shapes(vision, [(length, 32) for length in VISION_LENGTHS])
        self.assert_shapes(outputs.text_model_output.hidden_states, [(7, 48)] * 3)

    def test_retain_grad_hidden_states_attentions(self):
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        model = self.model_class._from_config(config, attn_implementation="eager")
        outputs = model(**inputs, output_hidden_states=True, output_attentions=True)
        parts = (outputs.text_model_output, outputs.vision_model_output)
        captured = [states[0] for part in parts for states in (part.hidden_states, part.attentions)]
        for states in captured:
            states.retain_grad()
        outputs.logits_per_text[0, 0].backward()
        for states in captured:
            self.assertIsNotNone(states.grad)


class PreTrainingSuite(RetrievalSuite):
    def test_batching_equivalence(self):
        """The matching loss is off, because its negatives depend on the batch."""
        with patch.object(self.model_tester, "itm_weight", 0.0):
            super().test_batching_equivalence()


SUITES = {
    TripsDecoder: DecoderSuite,
    TripsForPreTraining: PreTrainingSuite,
    TripsForRetrieval: RetrievalSuite,
    TripsSingleStreamModel: SingleStreamSuite,
    TripsTextModel: TripsSuite,
    TripsVisionModel: VisionSuite,
}


def add_test_case(name, model_class):
    """Add the suite of a class, and the tester of its name or, of a class that writes, the common one."""
    suite = SUITES.get(model_class, GenerativeSuite if model_class.can_generate() else HeadSuite)
    tester = getattr(model_testers, f"{name}Tester", model_testers.TripsGenerativeModelTester)
    attributes = {"all_model_classes": (model_class,), "model_tester": tester(), "__module__": __name__}
    globals()[f"{name}Test"] = type(f"{name}Test", (suite, unittest.TestCase), attributes)


make_names_known()
for _model in dict.fromkeys([*(model for models in MODELS.values() for model in models), TripsDecoder]):
    add_test_case(_model.__name__, _model)
for _name in ("TripsModel_skip_connected", "TripsModel_single_stream"):
    add_test_case(_name, TripsModel)
