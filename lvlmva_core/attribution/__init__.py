"""Attribution maps: DeepLiftSHAP that adds up, and plain maps to compare it with."""

from lvlmva_core.attribution.deep_lift import CompletenessError, Explanation, deep_lift_shap, explain
from lvlmva_core.attribution.plain import gradient, integrated_gradients
from lvlmva_core.attribution.tape import UnsupportedOperationError

__all__ = [
    "CompletenessError",
    "Explanation",
    "UnsupportedOperationError",
    "deep_lift_shap",
    "explain",
    "gradient",
    "integrated_gradients",
]
