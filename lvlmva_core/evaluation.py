"""A method's models on the test splits (LVLM-VA §5): what `lvlmva_core.outputs` keeps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from lvlmva_core.attribution import deep_lift_shap
from lvlmva_core.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from lvlmva_core.exchange import Trial, draw_trial, run_trial
from lvlmva_core.exchange_settings import Exchange
from lvlmva_core.models import penultimate_features, predict_logits
from lvlmva_core.outputs import Outputs
from lvlmva_core.samples import Split


def is_test(split: str) -> bool:
    """Whether a split is measured: `test`, and every other whose name starts so."""
    return split.startswith("test")


def probe_rows(has_mask: np.ndarray, n_samples: int, seed: int) -> np.ndarray:
    """Rows on which attributions are taken, rising: at most `n_samples` of those with a true mask that is not empty.

    Args:
        has_mask: bool (N,). seed: of the draw, in which fewer samples are a subset of more.
    """
    drawn = np.random.default_rng(seed).permutation(np.flatnonzero(has_mask))[:n_samples]
    return np.sort(drawn)


@dataclass(frozen=True)
class Rejected:
    """What was rejected, to be put into test pictures: the alignment samples and their masks, bool (N, H, W)."""

    samples: Split
    masks: Tensor
    settings: Exchange

    def trial(self, held_out: Split) -> Trial | None:
        """Which content goes into which of the pictures; None where nothing was rejected."""
        return draw_trial(
            held_out.labels.cpu().numpy(),
            self.masks.cpu().numpy(),
            self.samples.labels.cpu().numpy(),
            n_held_out=self.settings.n_held_out,
            n_donors=self.settings.n_donors,
            seed=self.settings.seed,
        )


def evaluate_models(
    models: Mapping[str, nn.Module],
    tests: Mapping[str, Split],
    probe: Split | None,
    baselines: Tensor,
    rejected: Rejected,
    *,
    batch_size: int,
    robustness: bool,
) -> Outputs:
    """Run each model on each test split.

    Args:
        models: seed -> model in eval mode. tests: split -> its samples; `test` is among them.
        probe: samples that are explained, or None. baselines: (R, C, H, W), of the explanation.
        rejected: what is put into the pictures of `test`.
        batch_size: (sample, baseline) pairs held at once. robustness: whether corrupted pictures are asked about too.
    """
    ids = np.concatenate([split.table["id"].to_numpy(dtype=str) for split in tests.values()])
    order = np.argsort(ids, kind="stable")
    logits, maps, exchanged = [], [], []
    trial = rejected.trial(tests["test"])
    for model in models.values():
        found = [predict_logits(model, split.images) for split in tests.values()]
        logits.append(torch.cat(found).float().cpu().numpy()[order])
        if probe is not None:
            explained = deep_lift_shap(model, probe.images, baselines, probe.labels, batch_size=batch_size)
            maps.append(explained.sum(1).cpu().numpy())
        if trial is not None:
            size = rejected.settings.batch_size
            exchanged.append(run_trial(model, tests["test"], rejected.samples.images, rejected.masks, trial, size))
    pictures = tests["test"].images
    names = CORRUPTIONS if robustness else {}
    first = next(iter(models.values()))
    return Outputs(
        seeds=list(models),
        ids=ids[order].tolist(),
        logits=np.stack(logits, axis=1),
        map_ids=[] if probe is None else probe.table["id"].tolist(),
        maps=np.stack(maps, axis=1) if maps else np.zeros((0, len(models), *pictures.shape[2:]), dtype=np.float32),
        corrupted={name: _under_corruption(list(models.values()), pictures, name) for name in names},
        features=penultimate_features(first, pictures).cpu().numpy(),
        exchange_ids=[] if trial is None else tests["test"].table["id"].iloc[trial.rows].tolist(),
        exchanged=np.stack(exchanged, axis=1) if exchanged else np.zeros((0, len(models), 3), dtype=np.float32),
    )


def _under_corruption(models: Sequence[nn.Module], images: Tensor, name: str) -> np.ndarray:
    """Predicted classes of each model at each severity, int16 (N, S, severities)."""
    predicted = np.zeros((len(images), len(models), SEVERITIES), dtype=np.int16)
    for severity in range(1, SEVERITIES + 1):
        changed = corrupt(images, name, severity)
        for place, model in enumerate(models):
            predicted[:, place, severity - 1] = predict_logits(model, changed).argmax(1).cpu().numpy()
    return predicted
