"""One model for all tests of indexing."""

import pytest
from tiny_collection import save_model


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> str:
    return save_model(tmp_path_factory.mktemp("model"))
