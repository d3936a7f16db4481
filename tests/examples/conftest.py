"""Data of several tests of pre-training."""

from pathlib import Path

import pytest
from toy_pairs import file_options, make_tokenizer, stream_options, write_pairs

from modeling_trips import TripsConfig, TripsProcessor
from trips_examples.training.models import make_processor


@pytest.fixture(scope="module")
def processor() -> TripsProcessor:
    return make_processor(make_tokenizer(), TripsConfig.from_preset("tiny"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_pairs(folder)
    return folder


@pytest.fixture(scope="module")
def files(folder) -> list[str]:
    return file_options(folder)


@pytest.fixture(scope="module")
def stream(folder) -> list[str]:
    return stream_options(folder)
