"""`ProcessorTesterMixin` on the processor."""

import string
import unittest

from transformers import BertTokenizer, BlipImageProcessor

from modeling_trips import TripsProcessor

from ...test_processing_common import ProcessorTesterMixin


# A chat template that joins the texts of a conversation.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endif %}"
    "{% endfor %}{% endfor %}"
)


class TripsProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = TripsProcessor

    @classmethod
    def _setup_tokenizer(cls):
        letters = [*string.ascii_lowercase, *(f"##{letter}" for letter in string.ascii_lowercase)]
        tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]
        return BertTokenizer(vocab={token: index for index, token in enumerate(tokens)})

    @classmethod
    def _setup_image_processor(cls):
        return BlipImageProcessor()

    @staticmethod
    def prepare_processor_dict():
        return {"patch_size": 8, "chat_template": CHAT_TEMPLATE}

    def test_processor_text_has_no_visual(self):
        """Either all texts of a batch have an image or none has."""
        processor = self.get_processor()
        text, images = self.prepare_text_inputs(batch_size=3), self.prepare_images_inputs(batch_size=3)
        with self.assertRaisesRegex(ValueError, "2 images and 3 texts"):
            processor(images=[[], [images[1]], [images[2]]], text=text)
        without = processor(text=text, return_tensors="pt")
        self.assertNotIn("pixel_values", without)
        with_images = processor(images=[[image] for image in images], text=text, return_tensors="pt")
        self.assertEqual(without["input_ids"].tolist(), with_images["input_ids"].tolist())
