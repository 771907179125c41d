"""SUBG: sub-sample every group to the size of the smallest, and train anew (Idrissi et al. 2022; LVLM-VA §5)."""

from lvlmva_core.baselines import Retrained, Task
from lvlmva_core.baselines.groups import balanced_rows
from lvlmva_core.baselines.settings import RetrainSettings


class Settings(RetrainSettings):
    """SUBG has no settings of its own."""


def retrain(task: Task, settings: Settings) -> Retrained:
    """Train the model anew on group-balanced rows, which are drawn for each seed."""
    import torch

    table = task.training.table
    groups = table["group"].to_numpy()
    models, used = {}, 0
    for seed in settings.seeds:
        rows = torch.from_numpy(balanced_rows(groups, seed))
        models[seed], used = task.fit(settings, seed, settings.epochs, rows), len(rows)
    one_group = table.groupby("label")["spurious"].nunique().max() == 1
    note = "every class has one group in training, so that the classes are balanced and nothing more"
    return Retrained(models, {"samples": used, "samples_in_training": len(groups), "note": note if one_group else ""})
