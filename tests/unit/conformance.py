"""What the suites of `lvlmva_core.testing` say of an implementation that is broken on purpose."""

import inspect
import tempfile
from pathlib import Path


def complaints(suite: type) -> set[str]:
    """Names of the tests of a suite that fail, run as pytest would, each on an object of its own."""
    failed = set()
    for name, test in inspect.getmembers(suite, inspect.isfunction):
        if not name.startswith("test_"):
            continue
        with tempfile.TemporaryDirectory() as folder:
            given = {"tmp_path": Path(folder)} if "tmp_path" in inspect.signature(test).parameters else {}
            try:
                test(suite(), **given)
            except Exception:  # noqa: BLE001 - a broken implementation may raise anything
                failed.add(name)
    return failed
