"""Output entropy, and the choice of the alignment set (LVLM-VA §4.1)."""

from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lvlmva_core.errors import InputError
from lvlmva_core.samples import groups_known

Strategy = Literal["low_entropy", "high_entropy", "random", "mixed"]


def output_entropy(logits: Tensor) -> Tensor:
    """Entropy of the softmax of each row: -sum_k p_k log p_k (LVLM-VA §4.1).

    Args:
        logits: (B, K), finite.

    Returns:
        (B,) float64 in nats, 0..log K. Log-probabilities are taken in float64: a confident model's entropies lie
        below what float32 can tell from zero.

    Raises:
        ValueError: `logits` is not (B, K) or not finite.
    """
    if logits.ndim != 2:
        raise ValueError(f"logits must be (B, K), not {tuple(logits.shape)}")
    if not bool(torch.isfinite(logits).all()):
        row = int((~torch.isfinite(logits)).any(dim=1).nonzero()[0])
        raise ValueError(f"logits of row {row} are not finite")
    log_p = torch.log_softmax(logits.double(), dim=1)
    return -(log_p.exp() * log_p).sum(dim=1).clamp(max=0.0)


def select_alignment_set(
    candidates: pd.DataFrame, n_samples: int, strategy: Strategy, *, stratify: bool, seed: int
) -> pd.DataFrame:
    """Choose N samples from the candidates.

    Args:
        candidates: columns id (str), entropy (float64, nats), label (int64), prediction (int64).
        strategy: "low_entropy" | "high_entropy" (ties broken by id) | "random" (the prefix of one seeded permutation of
            the ids, so that a smaller N is a subset of a larger one) | "mixed" (an extension: the lowest, the
            highest, the second lowest, ..., so that half of them are of either kind).
        stratify: take the first N / K of each class in that order (the first classes get the remainder).

    Returns:
        The chosen rows sorted by id, with `rank` (int64, 0 = first by the strategy).

    Raises:
        InputError: N exceeds the candidates, or a class has too few for stratification.
        ValueError: an unknown strategy.
    """
    if strategy not in get_args(Strategy):
        raise ValueError(f"strategy '{strategy}': expected one of {', '.join(get_args(Strategy))}")
    if n_samples > len(candidates):
        raise InputError(
            f"rank.n_samples = {n_samples} is larger than the training set ({len(candidates)} samples); lower it"
        )
    table = candidates.sort_values("id", kind="stable", ignore_index=True)
    if strategy == "random":
        table = table.iloc[np.random.default_rng(seed).permutation(len(table))]
    else:
        table = table.sort_values("entropy", ascending=strategy != "high_entropy", kind="stable")
    if strategy == "mixed":
        table = _from_both_ends(table, "label" if stratify else None)
    if stratify:
        classes = sorted(table["label"].unique())
        quota = {k: n_samples // len(classes) + (i < n_samples % len(classes)) for i, k in enumerate(classes)}
        place = table.groupby("label").cumcount()
        for k in classes:
            if (available := int((table["label"] == k).sum())) < quota[k]:
                raise InputError(
                    f"rank.stratify: class {k} has {available} training samples, fewer than its share of "
                    f"{quota[k]}; lower rank.n_samples"
                )
        table = table[place < table["label"].map(quota)]
    chosen = table.head(n_samples).assign(rank=np.arange(n_samples, dtype=np.int64))
    return chosen.sort_values("id", kind="stable", ignore_index=True)


def _from_both_ends(table: pd.DataFrame, within: str | None) -> pd.DataFrame:
    """Rows in the order first, last, second, last but one, ...; within each value of a column, if one is named."""
    groups = np.zeros(len(table)) if within is None else table[within].to_numpy()
    place = pd.Series(groups).groupby(groups).cumcount().to_numpy()
    left = pd.Series(groups).groupby(groups).transform("size").to_numpy() - 1 - place
    turn = np.where(place <= left, 2 * place, 2 * left + 1)
    return table.iloc[np.argsort(turn, kind="stable")]


def summary_of(chosen: pd.DataFrame, training: pd.DataFrame) -> dict[str, Any]:
    """What an alignment set is made of, for the metrics file; without its groups where these are not known.

    Args:
        chosen: as `select_alignment_set` returned it. training: rows of the sample table of the training split.
    """
    members = training.set_index("id").loc[chosen["id"]]
    summary = {
        "samples": len(chosen),
        "samples_per_class": {str(k): int(n) for k, n in members["label"].value_counts().sort_index().items()},
        "entropy_largest_nats": float(chosen["entropy"].max()),
    }
    if groups_known(training):
        summary |= {
            "share_with_spurious_feature": float(members["spurious"].mean()),
            "share_with_spurious_feature_in_training": float(training["spurious"].mean()),
            "samples_per_group": {str(k): int(n) for k, n in members["group"].value_counts().sort_index().items()},
        }
    return summary


def masked_share(attributions: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Share of each map's positive attribution that is masked, float64 (N,), 0..1.

    Args:
        attributions: float (N, H, W), each with some positive value. masks: bool (N, H, W), or weights in [0, 1].
    """
    positive = np.maximum(attributions, 0)
    return np.asarray((positive * masks).sum(axis=(1, 2)) / positive.sum(axis=(1, 2)))


def by_class_in_turn(shares: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Rows by falling share, class by class in turn, so that the first few show many classes."""
    order = pd.DataFrame({"share": shares, "label": labels}).sort_values("share", ascending=False, kind="stable")
    order["turn"] = order.groupby("label").cumcount()
    return order.sort_values(["turn", "share"], ascending=[True, False], kind="stable").index.to_numpy()
