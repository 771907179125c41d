"""State of long trainings, kept outside DVC's outputs so that a killed run goes on where it was."""

import io
import logging
import os
import pickle
import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lvlmva_core.data_parallel import number, of_first
from lvlmva_core.store import Store, digest, digest_file

log = logging.getLogger(__name__)

KIND = "resume"
MIN_SECONDS = 1.0  # between two checkpoints
COST_FACTOR = 50  # so that writing takes at most a fiftieth of the time


class Checkpoint:
    """A file that holds the state of one training at the end of an epoch, replaced as a whole.

    Of several processes the first reads and writes it; the others are told.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        self.path = path
        self.device = device
        self._due = time.monotonic() + MIN_SECONDS

    def load(self) -> dict[str, Any] | None:
        """The state as it was saved, its tensors on the device; None where there is none or it cannot be read."""
        content, reason = None, ""
        if number() == 0:
            try:
                content = self.path.read_bytes()
            except FileNotFoundError:
                pass
            except OSError as error:
                reason = str(error)
        content = of_first(content)
        state: dict[str, Any] | None = None
        if content is not None:
            try:
                state = torch.load(io.BytesIO(content), map_location=self.device, weights_only=True)
            except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
                reason = str(error)
        if reason:
            reason = " ".join(reason.split())[:200]
            log.warning(f"warning: {self.path}: damaged checkpoint ({reason}); the training starts anew")
        if state is not None and number() == 0:
            log.warning(f"note: goes on from the checkpoint {self.path}")
        return state

    def save(self, state: dict[str, Any], *, always: bool = False) -> None:
        """Write `state` (tensors, numbers, text, lists and dicts of them) if enough time has passed.

        How often this happens depends on the clock; what the training computes does not.
        """
        started = time.monotonic()
        if (started < self._due and not always) or number():
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        building = self.path.with_name(f".{self.path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
        try:
            with building.open("xb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            building.replace(self.path)
        finally:
            building.unlink(missing_ok=True)
        ended = time.monotonic()
        self._due = ended + max(MIN_SECONDS, COST_FACTOR * (ended - started))


class Resume:
    """The checkpoints of one piece of work, which is named by everything that its result depends on."""

    def __init__(self, store: Store, inputs: Any, code: Sequence[Path], device: torch.device) -> None:
        """Name the work by its inputs (JSON-able, with numpy arrays), the files of its code, and torch's version."""
        files = [digest_file(file) for file in code]
        self._store = store
        self._work = digest({"inputs": inputs, "code": files, "torch": torch.__version__})
        self._device = device
        self._paths: list[Path] = []

    def part(self, name: str) -> Checkpoint:
        """The checkpoint of one part of the work."""
        path = self._store.path(KIND, digest([self._work, name]), "pt")
        self._paths.append(path)
        return Checkpoint(path, self._device)

    def clear(self) -> None:
        """Remove the checkpoints of all parts that were asked for: the work is done and stands in an output."""
        for path in self._paths if number() == 0 else ():
            path.unlink(missing_ok=True)
