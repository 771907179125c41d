"""Changes to params given on the command line, `-S section.key=value`, and sections laid over others."""

import io
import json
from collections.abc import Iterable, Mapping, MutableMapping
from pathlib import Path
from typing import Any

from lvlmva_core.errors import InputError

WHOLE = ("methods", "retrained")  # say which run: what a new value does not name does not run


def apply_changes(content: Any, changes: Iterable[str]) -> None:
    """Lay each `section.key=value` over the sections of params, in place; values are read as in params.yaml.

    A mapping is laid over the one that is there, key by key; one for `methods` or `retrained` replaces it.

    Raises:
        InputError: a change has another form, or its value is not valid YAML.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    for change in changes:
        key, separator, value = change.partition("=")
        if not separator or not all(key.split(".")):
            raise InputError(f"--set {change}: expected section.key=value")
        try:
            layer = YAML(typ="safe", pure=True).load(value)
        except YAMLError as error:
            raise InputError(f"--set {change}: '{value}' is not valid YAML; quote it as params.yaml would") from error
        if key in WHOLE and isinstance(content, MutableMapping):
            content[key] = layer
            continue
        for part in reversed(key.split(".")):
            layer = {part: layer}
        lay_over(content, layer, f"--set {change}")


def lay_over(content: Any, layer: Any, name: str) -> None:
    """Put each value of `layer` into `content`, in place, section by section.

    Raises:
        InputError: `layer` holds no sections, or `content` a value where a section is; the message begins with `name`.
    """
    if not isinstance(layer, Mapping):
        raise InputError(f"{name}: expected sections with keys")
    if not isinstance(content, Mapping):
        raise InputError(f"{name}: there are no sections to lay it over")
    for key, value in layer.items():
        if isinstance(value, Mapping) and isinstance(content.get(key), Mapping):
            lay_over(content[key], value, f"{name}: {key}")
        else:
            content[key] = value  # type: ignore[index]


def read_content(params: Path) -> Any:
    """What a params.yaml holds, unchecked; sections that share an anchor change one by one."""
    from ruamel.yaml import YAML

    # through JSON, which has no anchors
    return json.loads(json.dumps(YAML(typ="safe", pure=True).load(params.read_text(encoding="utf-8"))))


def content_bytes(content: Any) -> bytes:
    """Content of params as YAML; comments are gone."""
    from ruamel.yaml import YAML

    written = io.StringIO()
    YAML(typ="safe", pure=True).dump(content, written)
    return written.getvalue().encode("utf-8")
