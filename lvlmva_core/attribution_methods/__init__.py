"""Attribution methods by name, each a module: one is added by a file here and its name in the line below."""

from lvlmva_core.attribution_methods import deep_lift_shap, gradient, gradient_x_input, integrated_gradients
from lvlmva_core.attribution_methods.interface import AttributionMethod

ATTRIBUTION_METHODS = AttributionMethod.kinds

__all__ = [
    "ATTRIBUTION_METHODS",
    "AttributionMethod",
    "deep_lift_shap",
    "gradient",
    "gradient_x_input",
    "integrated_gradients",
]
