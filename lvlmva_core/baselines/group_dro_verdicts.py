"""GroupDRO on pseudo-groups from verdicts, class x flagged (an extension): no group label is needed."""

from lvlmva_core.baselines import Retrained, Task, group_dro
from lvlmva_core.baselines.groups import pseudo_groups_of_training


class Settings(group_dro.Settings):
    """As GroupDRO's."""


def retrain(task: Task, settings: Settings) -> Retrained:
    """GroupDRO on the alignment samples' pseudo-groups, carried to all training pictures by the base's features."""
    from lvlmva_core.models import penultimate_features

    found = pseudo_groups_of_training(task, penultimate_features(task.base, task.training.images).cpu().numpy())
    trained = group_dro.train_groups(task, settings, found.groups)
    return Retrained(trained.models, {**trained.facts, **found.facts})
