"""A name that nobody knows is refused, whatever takes it: it never falls through to a default."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from lvlmva_core.align_settings import AlignSettings, SelectionSettings
from lvlmva_core.alignment.selection import selection_of
from lvlmva_core.compute import set_up_compute
from lvlmva_core.corruptions import corrupt
from lvlmva_core.lvlm.offline import criticise_by_oracle
from lvlmva_core.methods import in_order, method
from lvlmva_core.penalties import penalty_of
from lvlmva_core.ranking import select_alignment_set
from lvlmva_core.regions import overlaps
from lvlmva_core.samples import Split
from lvlmva_core.segmentation import fit_chosen_gmm
from lvlmva_core.segmenters import Segmenter

ONE = np.zeros((2, 2), dtype=np.uint8)
TABLE = pd.DataFrame({"id": ["a"], "entropy": [0.1], "label": [0], "prediction": [0]})
SPLIT = Split(torch.zeros(1, 1, 2, 2), torch.zeros(1, dtype=torch.int64))


def _selection() -> Any:
    chosen = SelectionSettings.model_construct(rule="best")  # type: ignore[arg-type]
    settings = AlignSettings(rrr_lambda=1.0, learning_rate=1.0, epochs=1, seeds=[0]).model_copy(
        update={"selection": chosen}
    )
    return selection_of(settings, SPLIT, lambda: (SPLIT, torch.zeros(1, 2, 2, dtype=torch.bool)))


def _oracle() -> Any:
    return criticise_by_oracle(
        "a",
        ONE,
        ONE > 0,
        ONE,
        rule="best",
        false_positive_rate=0,
        false_negative_rate=0,
        seed=0,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: AlignSettings(rrr_lambda=1.0, learning_rate=1.0, epochs=1, seeds=[0], penalty="contrst"), "contrast"),
        (lambda: penalty_of("contrst"), "no penalty 'contrst'; expected one of log_probabilities, contrast"),
        (lambda: corrupt(torch.zeros(1, 1, 4, 4), "blur", 1), "no corruption 'blur'; expected one of gamma_up"),
        (lambda: corrupt(torch.zeros(1, 1, 4, 4), "gamma_up", 6), "severity 6: expected 1 to 5"),
        (lambda: select_alignment_set(TABLE, 1, "best", stratify=False, seed=0), "strategy 'best': expected one of"),
        (lambda: overlaps(ONE, ONE > 0, ONE, "best"), "unknown overlap rule 'best'"),
        (_oracle, "unknown overlap rule 'best'"),
        (_selection, "rule 'best': expected one of pseudo_group, worst_group, accuracy"),
        (lambda: fit_chosen_gmm(torch.ones(1, 4, 4), [1], "best"), "criterion 'best': expected bic or held_out"),
        (lambda: set_up_compute("gpu", 1), "device 'gpu': expected cpu, cuda"),
        (lambda: method("lvlmva"), "no method 'lvlmva'"),
        (lambda: in_order(["base", "lvlmva"]), "no method 'lvlmva'"),
        (lambda: Segmenter.model_validate({"method": "slick", "n_regions": 2}), "did you mean 'slic'"),
        (lambda: Segmenter.model_validate({"method": "watershed", "n_regions": 2}), "expected one of grid"),
    ],
)
def test_an_unknown_name_is_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
