"""Integrated gradients (Sundararajan et al. 2017)."""

from typing import TYPE_CHECKING, ClassVar, Literal

from lvlmva_core.attribution_methods.interface import AttributionMethod
from lvlmva_core.settings import Count

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lvlmva_core.attribution.deep_lift import Explanation


class IntegratedGradients(AttributionMethod):
    """integration_steps: a baseline."""

    decisive: ClassVar[tuple[str, ...]] = ("integration_steps",)

    method: Literal["integrated_gradients"] = "integrated_gradients"
    integration_steps: Count = 50

    def explain(self, model: "nn.Module", inputs: "Tensor", baselines: "Tensor", targets: "Tensor") -> "Explanation":
        """See `lvlmva_core.attribution.integrated_gradients`."""
        from lvlmva_core.attribution.plain import explain_by_integrated_gradients

        return explain_by_integrated_gradients(
            model, inputs, baselines, targets, self.batch_size, self.integration_steps
        )
