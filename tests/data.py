"""Where tests find real data that cannot be in the repository."""

import os
from pathlib import Path

import pytest


def data_folder() -> Path | None:
    """The folder that LVLMVA_DATA names, or None."""
    root = os.environ.get("LVLMVA_DATA")
    return Path(root) if root else None


def needs_data(relative: str) -> pytest.MarkDecorator:
    """Skip a test, with the reason, where `relative` is not under the folder that LVLMVA_DATA names."""
    folder = data_folder()
    missing = folder is None or not (folder / relative).exists()
    return pytest.mark.skipif(missing, reason=f"set LVLMVA_DATA to a folder that holds {relative}")
