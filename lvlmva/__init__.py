"""What knows the project's folder, DVC and the terminal; below it stands `lvlmva_core`, above it the stages."""

try:
    import typer  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError(
        "lvlmva needs typer and more: pip install 'lvlmva[pipeline]'; lvlmva_core does without"
    ) from error
