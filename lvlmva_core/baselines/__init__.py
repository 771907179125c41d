"""Methods that LVLM-VA is compared with (LVLM-VA §5), and the supervision that each needs beside class labels."""

from collections.abc import Mapping
from types import MappingProxyType

SUPERVISION: Mapping[str, str] = MappingProxyType(
    {
        "base": "none",
        "lambda_zero": "none",
        "random_masks": "which pictures LVLM-VA masks, and how much of each",
        "random_pictures": "area of LVLM-VA's masks",
        "lvlm_va": "a description per class; verdicts of the critic",
        "rrr_gt": "true spurious masks of the alignment set",
        "subg": "group labels in training",
        "dfr": "group labels of the split that it is refitted on",
        "jtt": "none in training; in validation what jtt.rule says",
    }
)
