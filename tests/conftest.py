import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.data import data_folder
from tests.s3 import S3, running_s3


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not os.environ.get("LVLMVA_LONG"):
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="long: run `make test-long`"))


@pytest.fixture
def data_root() -> Path:
    folder = data_folder()
    assert folder is not None
    return folder


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    """An S3 server on loopback with an empty bucket."""
    for needed in ("moto", "boto3", "dvc_s3"):
        pytest.importorskip(needed, reason="the extra s3 and the S3 server of the tests are not installed")
    with running_s3() as server:
        yield server


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For modules whose tensors are too small for threads."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def torch_as_it_was() -> Iterator[None]:
    """Undo what `set_up_compute` does to the process: other libraries notice flushed denormals."""
    yield
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_flush_denormal(False)
        torch.use_deterministic_algorithms(False)
