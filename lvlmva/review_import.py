"""`lvlmva review --import`: a reviewer's answers that came by mail (an extension)."""

from collections.abc import Sequence
from pathlib import Path

import typer

from lvlmva_core.errors import InputError
from lvlmva_core.mailed_reviews import Mailed, Prefer, Regions, read_mailed, take_in

SHOWN = 20  # lines of what is wrong


def import_reviews(
    known: dict[str, Path], files: Sequence[Path], reviewer: str | None, prefer: Prefer | None, *, keep_stale: bool
) -> None:
    """Take CSV files in, each as the page downloads it: all of them, or nothing where a row cannot be taken in.

    Args:
        known: name -> path, of dvc.yaml. reviewer: whose they must be, or None. prefer: of verdicts that contradict
            those that are there. keep_stale: take in those of other segmentations too.

    Raises:
        InputError: a row cannot be taken in, or contradicts what is there; all such rows are listed before.
    """
    shown = _regions_now(known["segments"])
    came = [read_mailed(path, shown) for path in files]
    for each in came:
        for note in each.notes:
            typer.echo(f"note: {note}", err=True)
    problems = [line for each in came for line in [*each.problems, *_of_another(each, reviewer)]]
    stale = [line for each in came for line in each.stale]
    _list(problems)
    if problems:
        raise InputError(f"{len(problems)} rows cannot be taken in, listed above; nothing was taken in")
    if stale and not keep_stale:
        _list(stale)
        raise InputError(
            f"{len(stale)} rows are about earlier segmentations, listed above, and would not count; nothing was taken "
            "in; leave these rows out, or keep them for when the regions come back with --keep-stale"
        )
    done, conflicts = take_in(known["overrides"], came, prefer)
    if conflicts:
        _list(
            [
                f"{each.path}: region {each.key[2]} of '{each.key[0]}': '{each.mailed}', but '{each.present}' stands"
                for each in conflicts
            ]
        )
        raise InputError(
            f"{len(conflicts)} verdicts contradict what the reviewer said before, listed above; nothing was taken in; "
            "--prefer mailed lets the mailed ones count, --prefer present leaves these out"
        )
    for file in done:
        typer.echo(f"{file.path}: {file.added} new rows into {file.into}; nothing new about {file.known} regions")
    if stale:
        typer.echo(f"{len(stale)} rows are about earlier segmentations and do not count now", err=True)
    if any(file.added for file in done):
        typer.echo("`dvc repro` masks by them")


def _regions_now(segments: Path) -> dict[str, Regions]:
    from lvlmva_core.arrays import read_array, read_attrs
    from lvlmva_core.regions import regions_present, segmentation_digest

    if not segments.exists():
        raise InputError(f"{segments}: not made yet; run `dvc repro segment`")
    return {
        str(sample): Regions(segmentation_digest(label_map), regions_present(label_map))
        for sample, label_map in zip(read_attrs(segments)["ids"], read_array(segments, "segments"), strict=True)
    }


def _of_another(came: Mailed, reviewer: str | None) -> list[str]:
    if reviewer is None or came.reviewer.casefold() == reviewer.strip().casefold():
        return []
    return [f"{came.path}: is of '{came.reviewer[:80]}', not of --reviewer '{reviewer[:80]}'"]


def _list(lines: Sequence[str]) -> None:
    for line in lines[:SHOWN]:
        typer.echo("".join(each if each.isprintable() else " " for each in line), err=True)
    if len(lines) > SHOWN:
        typer.echo(f"and {len(lines) - SHOWN} more", err=True)
