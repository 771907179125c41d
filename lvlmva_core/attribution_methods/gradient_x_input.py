"""The gradient of the logit times the input."""

from typing import TYPE_CHECKING, Literal

from lvlmva_core.attribution_methods.interface import AttributionMethod

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lvlmva_core.attribution.deep_lift import Explanation


class GradientXInput(AttributionMethod):
    """The product has no settings of its own."""

    method: Literal["gradient_x_input"] = "gradient_x_input"

    def explain(self, model: "nn.Module", inputs: "Tensor", baselines: "Tensor", targets: "Tensor") -> "Explanation":
        """See `lvlmva_core.attribution.gradient`."""
        from lvlmva_core.attribution.deep_lift import Explanation
        from lvlmva_core.attribution.plain import explain_by_gradient

        found = explain_by_gradient(model, inputs, baselines, targets, self.batch_size)
        return Explanation(found.attributions * inputs, found.output, found.expected)
