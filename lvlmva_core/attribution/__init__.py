"""Attribution maps: DeepLiftSHAP that adds up, and plain maps to compare it with."""

from lvlmva_core.attribution.deep_lift import Explanation, deep_lift_shap, explain
from lvlmva_core.attribution.methods import METHODS, gradient, integrated_gradients
from lvlmva_core.attribution.tape import UnsupportedOperation

__all__ = [
    "METHODS",
    "Explanation",
    "UnsupportedOperation",
    "deep_lift_shap",
    "explain",
    "gradient",
    "integrated_gradients",
]
