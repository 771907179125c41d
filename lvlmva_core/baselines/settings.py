"""What retrained methods can be told."""

from lvlmva_core.align_settings import Seeds
from lvlmva_core.settings import Count, NonNegative, Positive, Settings


class RetrainSettings(Settings):
    """A training of the base model's network; all but `seeds` as in the base model's own."""

    seeds: Seeds
    learning_rate: Positive
    weight_decay: NonNegative = 0.0
    batch_size: Count
    epochs: Count
