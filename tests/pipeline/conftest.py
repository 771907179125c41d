"""A model server on loopback for each module of tests, and a small project that asks it."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lvlmva.warm import SOCKET
from lvlmva_core.lvlm import client
from tests.pipeline.browser import CHROMIUM
from tests.pipeline.calls import COUNT, KEY, Server, project, running_server
from tests.pipeline.warm_process import address


@pytest.fixture(scope="module")
def process() -> Iterator[Server]:
    with running_server() as server:
        yield server


@pytest.fixture(scope="module")
def warm_stages() -> Iterator[None]:
    """Stages find the libraries in memory, as with `lvlmva repro`: for tests of what comes out, not of how."""
    os.environ[SOCKET] = address()
    yield
    del os.environ[SOCKET]


@pytest.fixture
def server(process: Server) -> Server:
    process.set()
    return process


@pytest.fixture
def folder(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> Path:
    here = project(tmp_path / "project", server, COUNT)
    monkeypatch.chdir(here)
    monkeypatch.setenv("LVLMVA_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("LVLMVA_TEST_API_KEY", KEY)
    monkeypatch.delenv("LVLMVA_OFFLINE", raising=False)
    monkeypatch.setattr(client, "FIRST_WAIT_S", 0.02)  # between a failure and the next attempt, of stages called here
    return here


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()
