"""What one method's models say of the test splits: a record that metrics are taken from without running a model."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lvlmva_core.errors import InputError

FORMAT = 2
BASE = "base"  # the method that is the base model itself; its only seed is ""
SUBJECT = "lvlm_va"  # tested against every other method; the others against the base model


@dataclass(frozen=True)
class Outputs:
    """Outputs of S models, one a seed ("" for the base model), on all test splits.

    ids: the N samples of all test splits, sorted. logits: float32 (N, S, K).
    map_ids, maps: samples on which the attribution of the true class's logit was taken (DeepLiftSHAP, channels summed),
        float32 (n, S, H, W); none where no true mask is known.
    corrupted: name -> predicted class of the split `test` at severities 1, 2, ...: int16 (N_test, S, severities).
    features: float32 (N_test, D), what the first model's last layer sees of the split `test`.
    exchange_ids, exchanged: samples that rejected content was put into, and what became of the logit of their class,
        float32 (n, S, 3) (`lvlmva_core.exchange.run_trial`); none where nothing was rejected.
    """

    seeds: list[str]
    ids: list[str]
    logits: np.ndarray
    map_ids: list[str]
    maps: np.ndarray
    corrupted: Mapping[str, np.ndarray]
    features: np.ndarray
    exchange_ids: list[str]
    exchanged: np.ndarray

    def predictions(self) -> np.ndarray:
        """Class with the highest logit, int64 (N, S)."""
        return np.asarray(self.logits.argmax(axis=2))


def write_outputs(path: Path, outputs: Outputs) -> None:
    """Write outputs as safetensors, byte for byte the same for the same outputs."""
    from safetensors.numpy import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {"logits": outputs.logits, "maps": outputs.maps, "features": outputs.features}
    tensors["exchanged"] = outputs.exchanged
    tensors |= {f"corrupted.{name}": predicted for name, predicted in outputs.corrupted.items()}
    facts = {"format": FORMAT, "seeds": outputs.seeds, "ids": outputs.ids, "map_ids": outputs.map_ids}
    facts["exchange_ids"] = outputs.exchange_ids
    content = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    # one key: safetensors writes several in random order
    save_file(content, str(path), metadata={"lvlmva": json.dumps(facts, sort_keys=True)})


def read_outputs(path: Path) -> Outputs:
    """Read what `write_outputs` wrote. Raises InputError where the file is missing, damaged or of another format."""
    from safetensors import SafetensorError, safe_open

    remedy = "delete it and run `dvc repro`"
    try:
        with safe_open(str(path), framework="numpy") as file:
            facts = json.loads((file.metadata() or {}).get("lvlmva", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path}: not readable ({error}); {remedy}") from error
    if facts.get("format") != FORMAT:
        raise InputError(f"{path}: not the outputs of a method in format {FORMAT}; {remedy}")
    corrupted = {name.removeprefix("corrupted."): found for name, found in tensors.items() if "." in name}
    return Outputs(
        facts["seeds"],
        facts["ids"],
        tensors["logits"],
        facts["map_ids"],
        tensors["maps"],
        corrupted,
        tensors["features"],
        facts["exchange_ids"],
        tensors["exchanged"],
    )
