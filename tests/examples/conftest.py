"""Data of several tests of pre-training."""

import pytest
from toy_pairs import file_options, make_tokenizer, stream_options, write_pairs

from modeling_trips import TripsConfig
from trips_examples.training.models import make_processor


@pytest.fixture(scope="module")
def processor():
    return make_processor(make_tokenizer(), TripsConfig.from_preset("tiny"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_pairs(folder)
    return folder


@pytest.fixture(scope="module")
def files(folder):
    return file_options(folder)


@pytest.fixture(scope="module")
def stream(folder):
    return stream_options(folder)
