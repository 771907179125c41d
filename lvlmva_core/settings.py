"""What settings are made of: unknown keys and wrong types are refused, numbers have ranges (pydantic)."""

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]


class Settings(BaseModel):
    """Values with names: unknown ones and wrong types are refused, and none changes later."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Choice(Settings):
    """Settings of which one key, `kind_key`, names the kind: a segmenter, an attribution method.

    What can be chosen is a direct subclass, with the keys that all kinds share. Each kind is a subclass of that, with
    keys of its own, and has its name as a Literal: `method: Literal["grid"] = "grid"`. It is registered where it is
    defined. `model_validate` of what can be chosen gives an instance of the kind.

    Keys that only other kinds have may stand there too: they are passed over, so that another kind is one key away.
    """

    kind_key: ClassVar[str] = "method"
    kinds: ClassVar[dict[str, type["Choice"]]] = {}

    @classmethod
    def __pydantic_init_subclass__(cls, **options: Any) -> None:
        super().__pydantic_init_subclass__(**options)
        if Choice in cls.__bases__:
            cls.kinds = {}
            return
        names = get_args(cls.model_fields[cls.kind_key].annotation)
        if len(names) != 1:
            raise TypeError(f"{cls.__name__}.{cls.kind_key} must be a Literal of one name: what the kind is called")
        if names[0] in cls.kinds:
            raise TypeError(
                f"{cls.__name__}: '{names[0]}' is {cls.kinds[names[0]].__name__} already; take another name"
            )
        cls.kinds[names[0]] = cls

    @classmethod
    def known_keys(cls) -> list[str]:
        """Every key that may stand there, whatever the kind; those that all kinds share come first."""
        every = [key for kind in (cls, *cls.kinds.values()) for key in kind.model_fields]
        return list(dict.fromkeys(every))

    @model_validator(mode="wrap")
    @classmethod
    def _of_the_kind(cls, content: Any, handler: ModelWrapValidatorHandler["Choice"]) -> "Choice":
        if not isinstance(content, Mapping):
            return handler(content)
        if Choice not in cls.__bases__:
            of_others = set(cls.known_keys()) - set(cls.model_fields)
            return handler({key: value for key, value in content.items() if key not in of_others})
        if cls.kind_key not in content:
            raise _error(cls, "missing", cls.kind_key, dict(content))
        name = content[cls.kind_key]
        if name not in cls.kinds:
            close = difflib.get_close_matches(str(name), list(cls.kinds), n=1)
            known = f"did you mean '{close[0]}'?" if close else f"expected one of {', '.join(cls.kinds)}"
            raise _error(cls, PydanticCustomError("unknown_kind", "{known}", {"known": known}), cls.kind_key, name)
        return cls.kinds[name].model_validate(content)


def _error(section: type[Choice], kind: str | PydanticCustomError, key: str, value: Any) -> ValidationError:
    details: list[InitErrorDetails] = [{"type": kind, "loc": (key,), "input": value}]
    return ValidationError.from_exception_data(section.__name__, details)
