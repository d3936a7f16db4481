"""`ConfigTester` on every configuration."""

import unittest

from transformers import PreTrainedConfig

import modeling_trips

from ...test_configuration_common import ConfigTester
from .model_testers import TripsModelTester


class TripsConfigTest(unittest.TestCase):
    model_tester = TripsModelTester()

    def test_every_configuration(self):
        public = vars(modeling_trips).values()
        configs = [cls for cls in public if isinstance(cls, type) and issubclass(cls, PreTrainedConfig)]
        self.assertGreaterEqual(len(configs), 5)
        for config_class in configs:
            with self.subTest(config_class.__name__):
                has_vocabulary = hasattr(config_class, "vocab_size")
                ConfigTester(self, config_class, has_text_modality=has_vocabulary).run_common_tests()
