"""What knows the project's folder, DVC and the terminal; below it stands `lvlmva_core`, above it the stages."""

from importlib.util import find_spec

if find_spec("typer") is None:  # to import it would cost every stage a tenth of a second before it can hand over
    raise ImportError("lvlmva needs typer and more: pip install 'lvlmva[pipeline]'; lvlmva_core does without")
