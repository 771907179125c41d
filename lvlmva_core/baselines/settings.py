"""What retrained methods can be told."""

import math
from itertools import product
from typing import Any, Self

from pydantic import Field, ValidationError, model_validator

from lvlmva_core.align_settings import Seeds, SelectionSettings
from lvlmva_core.settings import Count, NonNegative, Positive, Settings


class Retraining(Settings):
    """What every retrained method can be told.

    grid: setting -> values to try, in the place of the one value; all combinations are tried with all seeds.
    selection: what chooses among them, and the epoch: that of `align`, so that one rule and one set of donors choose
        for every method; a method's own goes before.
    """

    seeds: Seeds
    selection: SelectionSettings | None = None
    grid: dict[str, list[Any]] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _first_of_the_grid(cls, content: Any) -> Any:
        """A setting that the grid names need not be given besides."""
        grid = content.get("grid") if isinstance(content, dict) else None
        if not isinstance(grid, dict):
            return content
        fields = set(cls.model_fields) - set(Retraining.model_fields)
        for key, values in grid.items():
            if key not in fields:
                raise ValueError(f"grid: '{key}' is no setting of this method; known: {', '.join(sorted(fields))}")
            if not isinstance(values, list) or not values:
                raise ValueError(f"grid.{key}: give a list of values to try")
        return {**content, **{key: values[0] for key, values in grid.items()}}

    @model_validator(mode="after")
    def _grid_can_be_chosen_from(self) -> Self:
        count = math.prod(len(values) for values in self.grid.values())
        if count > 1 and self.selection is None:
            raise ValueError(
                f"grid has {count} candidates and nothing chooses among them; set align.selection, for every method "
                "alike, or give one value of each"
            )
        if self.selection is not None and self.selection.rrr_lambdas:
            raise ValueError("selection.rrr_lambdas: there is no penalty here; remove it")
        try:
            self.candidates()
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise ValueError(f"grid.{'.'.join(map(str, first['loc']))} = {first['input']!r}: {first['msg']}") from None
        return self

    def candidates(self) -> list[tuple[dict[str, Any], Self]]:
        """Every combination of the grid, and the settings with it; one without changes where there is no grid."""
        if not self.grid:
            return [({}, self)]
        plain = {**self.model_dump(), "grid": {}}
        combined = (dict(zip(self.grid, values, strict=True)) for values in product(*self.grid.values()))
        return [(values, self.model_validate({**plain, **values})) for values in combined]


class RetrainSettings(Retraining):
    """A training of the base model's network; all but `seeds` as in the base model's own.

    weight_decay: decoupled from Adam's scale, a step of learning_rate · weight_decay · parameter, as in plain SGD.
    """

    learning_rate: Positive
    weight_decay: NonNegative = 0.0
    batch_size: Count
    epochs: Count
