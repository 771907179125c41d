"""The plain gradient of the logit (Simonyan et al. 2014)."""

from typing import TYPE_CHECKING, Literal

from lvlmva_core.attribution_methods.interface import AttributionMethod

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lvlmva_core.attribution.deep_lift import Explanation


class Gradient(AttributionMethod):
    """The gradient has no settings of its own."""

    method: Literal["gradient"] = "gradient"

    def explain(self, model: "nn.Module", inputs: "Tensor", baselines: "Tensor", targets: "Tensor") -> "Explanation":
        """See `lvlmva_core.attribution.gradient`."""
        from lvlmva_core.attribution.plain import explain_by_gradient

        return explain_by_gradient(model, inputs, baselines, targets, self.batch_size)
