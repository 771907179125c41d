"""What knows the project's folder, DVC and the terminal; below it stands `lvlmva_core`, above it the stages."""

from importlib.util import find_spec


def _is_there(library: str) -> bool:
    """Without importing it, which would cost every stage a tenth of a second before it can be handed over (`warm`)."""
    try:
        return find_spec(library) is not None
    except ModuleNotFoundError:  # raised by import hooks that hide a library
        return False


if not _is_there("typer"):
    raise ImportError("lvlmva needs typer and more: pip install 'lvlmva[pipeline]'; lvlmva_core does without")
