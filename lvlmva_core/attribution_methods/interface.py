"""What every attribution method is: its settings, and how it explains a logit."""

from typing import TYPE_CHECKING, ClassVar

from lvlmva_core.settings import Choice, Count, Positive, Seed

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lvlmva_core.attribution.deep_lift import Explanation


class AttributionMethod(Choice):
    """A way to explain a logit; a subclass is one, with settings of its own.

    version: goes up whenever the maps change, so that stored ones are not taken for new ones. complete: the maps add up
    to the difference of outputs but for rounding; where False, the gap is a property of the method and no error.
    decisive: keys of its own that change the maps.

    batch_size: (sample, baseline) pairs that are held at once. completeness_tolerance: of the sum of absolute
    attributions, for methods that are complete. seed: of the draw of n_baselines training samples.

    Modules of methods are read with params.yaml, by stages that do without torch: they import it inside `explain`.
    """

    version: ClassVar[int] = 1
    complete: ClassVar[bool] = False
    decisive: ClassVar[tuple[str, ...]] = ()

    method: str
    n_baselines: Count
    batch_size: Count
    completeness_tolerance: Positive = 1e-6
    seed: Seed = 0

    def explain(self, model: "nn.Module", inputs: "Tensor", baselines: "Tensor", targets: "Tensor") -> "Explanation":
        """Explain each sample by itself: its map has the same bits whatever else is explained beside it.

        Args:
            model: maps inputs to logits (B, K); its modes, weights and hooks are left as they were.
            inputs: (B, C, H, W) in [0, 1]. baselines: (R, C, H, W). targets: int64 (B,), the logits to explain.
        """
        raise NotImplementedError
