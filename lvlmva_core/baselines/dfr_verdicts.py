"""DFR on the alignment set's pseudo-groups from verdicts, class x flagged (an extension): without a group label."""

from lvlmva_core.baselines import Retrained, Task, dfr
from lvlmva_core.baselines.groups import pseudo_groups_of_alignment


class Settings(dfr.AnyDfr):
    """As DFR's, without a choice of a split."""


def retrain(task: Task, settings: Settings) -> Retrained:
    """The base model with its last layer refitted on the alignment samples, balanced by class and flag."""
    from lvlmva_core.models import penultimate_features

    found = pseudo_groups_of_alignment(task)
    features = penultimate_features(task.base, task.training.images).cpu().numpy()
    labels = task.training.labels.cpu().numpy()
    samples = dfr.Samples(features[found.rows], labels[found.rows], found.groups)
    refitted = dfr.refit(task, settings, samples, features, of_validation=False)
    return Retrained(refitted.models, {**refitted.facts, **found.facts})
