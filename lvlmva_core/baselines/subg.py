"""SUBG: sub-sample every group to the size of the smallest, and train anew (Idrissi et al. 2022; LVLM-VA §5)."""

from lvlmva_core.baselines import Fitted, Retrained, Task, train_each
from lvlmva_core.baselines.groups import balanced_rows
from lvlmva_core.baselines.settings import RetrainSettings


class Settings(RetrainSettings):
    """SUBG has no settings of its own; its authors try learning rates, weight decays and batch sizes."""


def retrain(task: Task, settings: Settings) -> Retrained:
    """Train the model anew on group-balanced rows, which are drawn for each seed."""
    import torch

    table = task.training.table
    groups = table["group"].to_numpy()

    def fit(candidate: Settings, seed: int) -> Fitted:
        return task.fit(candidate, seed, rows=torch.from_numpy(balanced_rows(groups, seed)))

    found = train_each(task, settings, fit)
    one_group = table.groupby("label")["spurious"].nunique().max() == 1
    note = "every class has one group in training, so that the classes are balanced and nothing more"
    facts = {"samples": len(balanced_rows(groups, 0)), "samples_in_training": len(groups)}
    return Retrained(found.models, {**found.facts, **facts, "note": note if one_group else ""})
