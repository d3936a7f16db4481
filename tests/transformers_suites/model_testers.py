"""Small configurations and inputs for the suites. Text and vision differ in width on purpose."""

import torch

from modeling_trips import TripsConfig, TripsDecoderConfig, TripsTextConfig, TripsVisionConfig

from ...test_modeling_common import floats_tensor, ids_tensor, random_attention_mask


VOCAB_SIZE = 99
START, END = 1, 2

TEXT_FIELDS = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "num_hidden_layers": 2,  # the suites allow no more
    "num_attention_heads": 3,
    "intermediate_size": 37,
    "max_position_embeddings": 64,
}
VISION_FIELDS = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 37,
    "image_size": 16,
    "patch_size": 4,
    "schedule": "1:text:0.5,2:text:0.5",
}
# Tokens before each layer and after the last: [CLS] and 16 patches; [CLS], 8 patches and a fused token; [CLS], 5 of
# these 9 and a fused token.
VISION_LENGTHS = [17, 10, 7]


def random_ids(*shape):
    """Token ids, none of which is the padding, start or end token."""
    return ids_tensor(shape, VOCAB_SIZE - 3) + 3


class TripsTextModelTester:
    is_training = True
    batch_size, seq_length = 3, 7
    hidden_size = TEXT_FIELDS["hidden_size"]
    num_hidden_layers = TEXT_FIELDS["num_hidden_layers"]
    num_attention_heads = TEXT_FIELDS["num_attention_heads"]

    def get_config(self):
        return TripsTextConfig(**TEXT_FIELDS)

    def prepare_config_and_inputs_for_common(self):
        inputs = {
            "input_ids": random_ids(self.batch_size, self.seq_length),
            "attention_mask": random_attention_mask([self.batch_size, self.seq_length]),
        }
        return self.get_config(), inputs


class TripsVisionModelTester:
    is_training = True
    batch_size, seq_length = 3, VISION_LENGTHS[0]
    hidden_size = VISION_FIELDS["hidden_size"]
    num_hidden_layers = VISION_FIELDS["num_hidden_layers"]
    num_attention_heads = VISION_FIELDS["num_attention_heads"]

    def get_config(self):
        # The first layer scores states that no kernel has rounded, so that all kernels select the same patches.
        fields = {**VISION_FIELDS, "schedule": "1:text:0.5", "guidance_hidden_size": TEXT_FIELDS["hidden_size"]}
        return TripsVisionConfig(**fields)

    def prepare_config_and_inputs_for_common(self):
        inputs = {
            "pixel_values": floats_tensor([self.batch_size, 3, 16, 16]),
            "text_embeds": floats_tensor([self.batch_size, TEXT_FIELDS["hidden_size"]]),
        }
        return self.get_config(), inputs


class TripsSingleStreamModelTester(TripsVisionModelTester):
    text_length = 5
    seq_length = text_length + VISION_LENGTHS[0]

    def prepare_config_and_inputs_for_common(self):
        config, inputs = super().prepare_config_and_inputs_for_common()
        return config, {
            "text_states": floats_tensor([self.batch_size, self.text_length, self.hidden_size]),
            "attention_mask": random_attention_mask([self.batch_size, self.text_length]),
            "pixel_values": inputs["pixel_values"],
        }


class TripsDecoderTester(TripsTextModelTester):
    def get_config(self):
        return TripsDecoderConfig(**TEXT_FIELDS, bos_token_id=START, eos_token_id=END)

    def prepare_config_and_inputs_for_common(self):
        config, inputs = super().prepare_config_and_inputs_for_common()
        inputs["encoder_hidden_states"] = floats_tensor([self.batch_size, 5, self.hidden_size])
        inputs["encoder_attention_mask"] = random_attention_mask([self.batch_size, 5])
        return config, inputs


class TripsModelTester(TripsTextModelTester):
    """Tester of [`TripsConfig`] models without a decoder."""

    is_encoder_decoder = False

    def get_config(self):
        return TripsConfig(
            vision_config=VISION_FIELDS,
            text_config=TEXT_FIELDS,
            fusion_encoder_config={"num_hidden_layers": self.num_hidden_layers},
            decoder_config={"num_hidden_layers": self.num_hidden_layers, "bos_token_id": START, "eos_token_id": END},
            is_encoder_decoder=self.is_encoder_decoder,
        )

    def prepare_config_and_inputs_for_common(self):
        config, inputs = super().prepare_config_and_inputs_for_common()
        return config, {**inputs, "pixel_values": floats_tensor([self.batch_size, 3, 16, 16])}

    def training_inputs(self):
        """Return the labels of a head that the suites do not support."""
        return {}


class TripsModel_skip_connectedTester(TripsModelTester):
    def get_config(self):
        config = super().get_config()
        config.fusion_encoder_config.fusion_type = "skip_connected"
        config.fusion_encoder_config.skip_stride = 1
        return config


class TripsModel_single_streamTester(TripsModelTester):
    """Tester of the single stream, whose layers are as wide as the text embeddings."""

    hidden_size = VISION_FIELDS["hidden_size"]
    num_attention_heads = VISION_FIELDS["num_attention_heads"]
    encoder_seq_length = TripsModelTester.seq_length + VISION_LENGTHS[0]

    def get_config(self):
        text_fields = {**TEXT_FIELDS, "hidden_size": self.hidden_size, "num_attention_heads": 2}
        return TripsConfig(
            vision_config=VISION_FIELDS, text_config=text_fields, fusion_type="single_stream", is_encoder_decoder=False
        )


class TripsGenerativeModelTester(TripsModelTester):
    """Tester of models with a decoder."""

    is_encoder_decoder = True

    def prepare_config_and_inputs_for_common(self):
        config, inputs = super().prepare_config_and_inputs_for_common()
        inputs["decoder_input_ids"] = random_ids(self.batch_size, self.seq_length)
        inputs["decoder_attention_mask"] = random_attention_mask([self.batch_size, self.seq_length])
        return config, inputs


class TripsForImagesAndTextClassificationTester(TripsModelTester):
    def prepare_config_and_inputs_for_common(self):
        config, inputs = super().prepare_config_and_inputs_for_common()
        inputs["pixel_values"] = floats_tensor([self.batch_size, config.num_images, 3, 16, 16])
        return config, inputs

    def training_inputs(self):
        return {"labels": torch.tensor([0, 1, 1])}


class TripsForVisualGroundingTester(TripsModelTester):
    def training_inputs(self):
        return {"labels": torch.tensor([[0.5, 0.5, 0.2, 0.4]] * self.batch_size)}


class TripsForRetrievalTester(TripsModelTester):
    def training_inputs(self):
        return {"return_loss": True}


class TripsForPreTrainingTester(TripsModelTester):
    itm_weight = 1.0

    def get_config(self):
        config = super().get_config()
        config.itm_weight = self.itm_weight
        return config

    def training_inputs(self):
        texts = torch.arange(3, 24).view(self.batch_size, self.seq_length)
        return {
            "mlm_input_ids": texts + 1,
            "mlm_labels": texts,
            "prompt_input_ids": texts[:, :3],
            "labels": texts[:, 3:],
        }
