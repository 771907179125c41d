from pathlib import Path

import pytest

from tests.data import data_folder


@pytest.fixture
def data_root() -> Path:
    folder = data_folder()
    assert folder is not None
    return folder
