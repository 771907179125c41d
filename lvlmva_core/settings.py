"""What settings are made of: unknown keys and wrong types are refused, numbers have ranges (pydantic)."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]


class Settings(BaseModel):
    """Values with names: unknown ones and wrong types are refused, and none changes later."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
