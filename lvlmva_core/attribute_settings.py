"""What an attribution method can be told."""

from typing import Literal

from lvlmva_core.settings import Count, Positive, Seed, Settings


class Attribute(Settings):
    """Explanation maps of the alignment samples."""

    method: Literal["deep_lift_shap", "gradient", "gradient_x_input", "integrated_gradients"]
    n_baselines: Count
    batch_size: Count
    completeness_tolerance: Positive
    integration_steps: Count
    seed: Seed
