"""DeepLIFT by the rescale rule, the mean over baselines (LVLM-VA §4.1)."""

from typing import TYPE_CHECKING, ClassVar, Literal

from lvlmva_core.attribution_methods.interface import AttributionMethod

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lvlmva_core.attribution.deep_lift import Explanation


class DeepLiftShap(AttributionMethod):
    """DeepLiftSHAP that adds up has no settings of its own."""

    complete: ClassVar[bool] = True
    version: ClassVar[int] = 2  # since softmax is split otherwise

    method: Literal["deep_lift_shap"] = "deep_lift_shap"

    def explain(self, model: "nn.Module", inputs: "Tensor", baselines: "Tensor", targets: "Tensor") -> "Explanation":
        """See `lvlmva_core.attribution.deep_lift_shap`."""
        from lvlmva_core.attribution.deep_lift import explain

        return explain(model, inputs, baselines, targets, batch_size=self.batch_size, samples_at_once=1)
