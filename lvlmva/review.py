"""`lvlmva review`: a page on this machine on which an expert judges regions (an extension)."""

from pathlib import Path
from typing import Annotated

import typer

from lvlmva.pipeline import paths
from lvlmva_core.errors import InputError


def review(
    reviewer: Annotated[str | None, typer.Option(help="your name, and so your file's; the page asks otherwise")] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free")] = 0,
    browser: Annotated[bool, typer.Option(help="open the page; its address is printed in any case")] = True,
) -> None:
    """Serve the page on which an expert says for each region whether it is relevant.

    Each verdict goes to overrides/<reviewer>.csv at once; `dvc repro` then masks by it. Only this machine is listened
    to, and the address works once.
    """
    try:
        from lvlmva.review_server import Review
        from lvlmva.serving import serve
    except ImportError as error:
        raise InputError(f"{error.name} is not installed; run `pip install 'lvlmva[review]'`") from error
    from lvlmva.review_content import read_content
    from lvlmva_core.overrides import read_reviews, reviewer_file

    known = {name: Path(path) for name, path in paths().items()}
    if not known:
        raise InputError("no dvc.yaml here; run it in the project's folder")
    read_reviews(known["overrides"])  # a bad row is said before anybody reviews
    if reviewer is not None:
        reviewer_file(known["overrides"], reviewer)
    content = read_content(known)
    said = f"{len(content.ids)} samples; verdicts go to {known['overrides']}/"
    serve(Review(content, known["overrides"], reviewer).app(), "lvlmva review", port, said, browser=browser)
