"""The examples in the docstrings of the models run and print the documented output."""

import doctest
import re

import pytest

from modeling_trips import TripsConfig
from modeling_trips.registration_trips import MODELS


HEADS = {model for models in MODELS.values() for model in models if model.config_class is TripsConfig}
FENCE = re.compile(r"```python\n(.*?)```", re.DOTALL)


@pytest.mark.parametrize("model_class", sorted(HEADS, key=str))
def test_the_example_of_each_head_runs(model_class):
    examples = FENCE.findall(model_class.forward.__doc__)
    assert examples
    for code in examples:
        test = doctest.DocTestParser().get_doctest(code, {}, model_class.__name__, None, 0)
        assert test.examples
        result = doctest.DocTestRunner().run(test)
        assert result.failed == 0
