"""`lvlmva review`: a page on this machine on which an expert judges regions (an extension)."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from lvlmva.pipeline import paths
from lvlmva_core.errors import InputError


def review(
    files: Annotated[list[Path] | None, typer.Argument(help="with --import: CSV files that came by mail")] = None,
    take_in: Annotated[bool, typer.Option("--import", help="take FILES in, serve nothing")] = False,
    prefer: Annotated[
        Literal["mailed", "present"] | None, typer.Option(help="with --import: of verdicts that contradict")
    ] = None,
    keep_stale: Annotated[
        bool, typer.Option("--keep-stale", help="with --import: also what is about earlier segmentations")
    ] = False,
    reviewer: Annotated[str | None, typer.Option(help="your name, and so your file's; the page asks otherwise")] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free")] = 0,
    browser: Annotated[bool, typer.Option(help="open the page; its address is printed in any case")] = True,
) -> None:
    """Serve the page on which an expert says for each region whether it is relevant.

    Each verdict goes to overrides/<reviewer>.csv at once; `dvc repro` then masks by it. Only this machine is listened
    to, and the address works once. With --import nothing is served: answers that came by mail are taken in, every row
    checked, all or nothing.
    """
    known = {name: Path(path) for name, path in paths().items()}
    if not known:
        raise InputError("no dvc.yaml here; run it in the project's folder")
    if take_in != bool(files):
        raise InputError("--import and files belong together: `lvlmva review --import anna.csv`")
    if take_in:
        from lvlmva.review_import import import_reviews

        import_reviews(known, files or [], reviewer, prefer, keep_stale=keep_stale)
        return
    try:
        from lvlmva.review_server import Review
        from lvlmva.serving import serve
    except ImportError as error:
        raise InputError(f"{error.name} is not installed; run `pip install 'lvlmva[review]'`") from error
    from lvlmva.review_content import read_content
    from lvlmva_core.overrides import read_reviews, reviewer_file

    read_reviews(known["overrides"])  # a bad row is said before anybody reviews
    if reviewer is not None:
        reviewer_file(known["overrides"], reviewer)
    content = read_content(known)
    said = f"{len(content.ids)} samples; verdicts go to {known['overrides']}/"
    serve(Review(content, known["overrides"], reviewer).app(), "lvlmva review", port, said, browser=browser)
