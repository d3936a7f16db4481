"""
`ModelTesterMixin` on patched models of Transformers: the save and load tests of towers and encoders, and all tests of
a LLaVA that prunes its inputs but keeps every token, against the plain model.
"""

import unittest

import torch
from transformers import (
    BlipConfig,
    BlipForQuestionAnswering,
    BridgeTowerConfig,
    BridgeTowerModel,
    CLIPConfig,
    CLIPModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    SiglipConfig,
    SiglipModel,
    ViltConfig,
    ViltForQuestionAnswering,
)

from modeling_trips.hosts.apply import apply_patch_selection

from ...test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor, random_attention_mask


VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 37,
    "image_size": 16,
    "patch_size": 4,
}
TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 37,
    "vocab_size": 99,
    "max_position_embeddings": 20,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BRIDGETOWER_VISION = {"hidden_size": 64, "num_hidden_layers": 3, "image_size": 16, "patch_size": 4}
BRIDGETOWER_TEXT = {**TEXT, "hidden_size": 64, "num_hidden_layers": 3}


def selecting(model_class: type[PreTrainedModel], guidance: str) -> type[PreTrainedModel]:
    """Return a subclass that applies selection to every instance."""

    class Selecting(model_class):
        def __init__(self, config):
            super().__init__(config)
            apply_patch_selection(self, f"1:{guidance}:0.5,2:{guidance}:0.5")

    Selecting.__name__ = model_class.__name__  # the suites look up classes by name
    return Selecting


class PlainLlava(LlavaForConditionalGeneration):
    def __init__(self, config):
        super().__init__(config)


class PruningLlava(LlavaForConditionalGeneration):
    """LLaVA that prunes its inputs but keeps every token."""

    def __init__(self, config):
        super().__init__(config)
        apply_patch_selection(self, "unpruned", visual_tokens=1000)


PlainLlava.__name__ = PruningLlava.__name__ = LlavaForConditionalGeneration.__name__


class HostTester:
    is_training = True
    batch_size, seq_length = 3, 7

    def __init__(self, config):
        self.config = config

    def prepare_config_and_inputs_for_common(self):
        inputs = {
            "input_ids": ids_tensor((self.batch_size, self.seq_length), 96) + 3,
            "attention_mask": random_attention_mask([self.batch_size, self.seq_length]),
            "pixel_values": floats_tensor([self.batch_size, 3, 16, 16]),
        }
        if isinstance(self.config, BlipConfig):
            inputs["decoder_input_ids"] = inputs["input_ids"]
        return self.config, inputs


class HostSuite(ModelTesterMixin):
    all_generative_model_classes = ()


class ViltTest(HostSuite, unittest.TestCase):
    all_model_classes = (selecting(ViltForQuestionAnswering, "text"),)

    def setUp(self):
        config = ViltConfig(**VISION, vocab_size=99, max_position_embeddings=20, max_image_length=-1)
        self.model_tester = HostTester(config)


class BlipTest(HostSuite, unittest.TestCase):
    all_model_classes = (selecting(BlipForQuestionAnswering, "text"),)

    def setUp(self):
        text = {**TEXT, "encoder_hidden_size": 32, "sep_token_id": 2}
        self.model_tester = HostTester(BlipConfig(vision_config=VISION, text_config=text))


class BridgeTowerTest(HostSuite, unittest.TestCase):
    all_model_classes = (selecting(BridgeTowerModel, "image"),)

    def setUp(self):
        sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = BridgeTowerConfig(vision_config=BRIDGETOWER_VISION, text_config=BRIDGETOWER_TEXT, **sizes)
        self.model_tester = HostTester(config)


class CLIPTest(HostSuite, unittest.TestCase):
    all_model_classes = (selecting(CLIPModel, "image"),)

    def setUp(self):
        self.model_tester = HostTester(CLIPConfig(vision_config=VISION, text_config=TEXT, projection_dim=16))


class SiglipTest(HostSuite, unittest.TestCase):
    all_model_classes = (selecting(SiglipModel, "image"),)

    def setUp(self):
        text = {**TEXT, "projection_size": 32}
        self.model_tester = HostTester(SiglipConfig(vision_config=VISION, text_config=text))


class LlavaTester(HostTester):
    num_visual_tokens = 16
    seq_length = 7 + num_visual_tokens

    def prepare_config_and_inputs_for_common(self):
        ids = ids_tensor((self.batch_size, self.seq_length), 90) + 3
        ids[:, 1 : 1 + self.num_visual_tokens] = self.config.image_token_id
        pixels = floats_tensor([self.batch_size, 3, 16, 16])
        return self.config, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


class PlainLlavaTest(HostSuite, unittest.TestCase):
    all_model_classes = (PlainLlava,)
    _is_composite = True

    def setUp(self):
        text = {**TEXT, "model_type": "llama", "max_position_embeddings": 64}
        vision = {**VISION, "model_type": "clip_vision_model"}
        config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=98, vision_feature_layer=-2)
        self.model_tester = LlavaTester(config)


class PruningLlavaTest(PlainLlavaTest):
    all_model_classes = (PruningLlava,)
