"""`lvlmva study`: LVLM-VA's user study, repeated with any number of participants, and its summary (an extension)."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from lvlmva.pipeline import paths
from lvlmva_core.errors import InputError

SUMMARY = "summary.json"
QUESTIONS = {
    "regions": "are these the irrelevant regions?",
    "reasoning": "is the reasoning right?",
    "explanation": "which explanation is better? (after)",
}


def study(
    summary: Annotated[
        bool, typer.Option("--summary", help="print and write what was answered, serve nothing")
    ] = False,
    samples: Annotated[int | None, typer.Option(min=1, help="how many are drawn, three questions each [9]")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="of the draw, the order and the sides [0]")] = None,
    all_judged: Annotated[
        bool | None,
        typer.Option("--all-judged/--rejected-only", help="draw also from those without a rejected region"),
    ] = None,
    participant: Annotated[str | None, typer.Option(help="a code for who answers; the page asks otherwise")] = None,
    folder: Annotated[Path | None, typer.Option(help="of the study; another folder is another study")] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free")] = 0,
    browser: Annotated[bool, typer.Option(help="open the page; its address is printed in any case")] = True,
) -> None:
    """Serve the questionnaire of the paper's user study over a random set of alignment samples.

    With words like bases=0..4 this is another command: many base models in the place of many people, see `lvlmva
    experiments --help`.

    Asked of each sample: which explanation is better, before or after alignment (blinded); are these the irrelevant
    regions; is the reasoning right. The set is drawn and kept when the study is first served. Each answer is on the
    disk at once, in a file a participant. Only this machine is listened to, and the address works once.
    """
    from lvlmva.questionnaire import begin, open_questionnaire
    from lvlmva_core.questionnaire import participant_file

    known = {name: Path(path) for name, path in paths().items()}
    if not known:
        raise InputError("no dvc.yaml here; run it in the project's folder")
    place = folder or known["questionnaire"]
    found = open_questionnaire(place)
    if summary:
        if found is None:
            raise InputError(f"{place}: no study there; begin one with `lvlmva study`")
        _summarise(found)
        return
    try:
        from lvlmva.serving import serve
        from lvlmva.study_server import Study
    except ImportError as error:
        raise InputError(f"{error.name} is not installed; run `pip install 'lvlmva[review]'`") from error
    if found is None:
        found = begin(place, known, samples or 9, seed or 0, rejected_only=not all_judged)
    drawn = {"samples": len(found.samples), "seed": found.facts["seed"]}
    wanted: dict[str, Any] = {"samples": samples, "seed": seed}
    for name, value in wanted.items():
        if value not in (None, drawn[name]):
            raise InputError(
                f"--{name} {value}: the study in {place} was begun with {drawn[name]}; take another --folder"
            )
    if all_judged is not None and all_judged == found.facts["drawn_from"]["rejected_only"]:
        raise InputError(f"{place}: the study was begun with the other draw; take another --folder")
    if participant is not None:
        participant_file(place, participant)
    said = f"{len(found.samples)} samples, three questions each; answers go to {place}/"
    serve(Study(found, participant).app(), "lvlmva study", port, said, browser=browser)


def _summarise(found: Any) -> None:
    """Print the summary and write it beside the answers."""
    from lvlmva_core.lvlm.offline import is_stand_in
    from lvlmva_core.questionnaire import answers_so_far, summarise
    from lvlmva_core.store import replace_file

    answers = {path.stem: answers_so_far(path, found.study) for path in sorted(found.folder.glob("*.csv"))}
    content = summarise(answers, found.samples)
    names = {kind: found.facts[kind] for kind in ("critics", "judges")}
    stand_ins = sorted({name for each in names.values() for name in each if is_stand_in(name)})
    content |= {"study": found.study, **names, "stand_ins": stand_ins, "explained": found.facts["explained"]}
    content |= {"drawn_from": found.facts["drawn_from"], "seed": found.facts["seed"]}
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    replace_file(found.folder / SUMMARY, text.encode())
    for line in lines_of(content, len(found.samples)):
        typer.echo(line)
    typer.echo(f"\nwritten to {found.folder / SUMMARY}")


def lines_of(content: dict[str, Any], samples: int) -> list[str]:
    """The summary for a terminal."""
    people = content["participants"]
    begun = [f"{name} ({count})" for name, count in people.items() if count < content["questions_each"]]
    lines = [
        f"{len(people)} participants, {samples} samples, {content['questions_each']} questions each; "
        + (f"not finished: {', '.join(begun)}" if begun else "all finished"),
        f"critic: {', '.join(content['critics'])}; judge: {', '.join(content['judges'])}"
        + (f"; {' and '.join(content['stand_ins'])} is a stand-in, no model" if content["stand_ins"] else ""),
        "",
        f"{'':40}{'share':>7} {'Wilson 95 %':>15} {'resampled 95 %':>16} {'decided':>8} {'n':>5} {'paper':>6}",
    ]
    for name, title in QUESTIONS.items():
        each = content["questions"][name]
        lines.append(
            f"{title:40}{_percent(each['share']):>7} {_range(each['wilson']):>15} {_range(each['interval']):>16} "
            f"{_percent(each['share_decided']):>8} {each['answers']:>5} {_percent(each['published']):>6}"
        )
    lines += ["", f"{'agreement':40}{'pairs':>7} {'kappa':>7}"]
    for name, title in QUESTIONS.items():
        each = content["questions"][name]
        kappa = "-" if each["kappa"] is None else f"{each['kappa']:.3f}"
        of = {"cohen": "Cohen's, of 2", "fleiss": f"Fleiss', of {each['kappa_participants']}"}.get(each["kappa_of"], "")
        lines.append(f"{title:40}{_percent(each['pairwise_agreement']):>7} {kappa:>7}  {of}")
    left = content["questions"]["explanation"].get("left")
    lines += [
        "",
        "share: of all answers, 'unsure' and 'no difference' counted against; decided: without those. Wilson's",
        "interval takes all answers for independent; the resampled one draws participants and samples anew (an",
        "extension).",
        f"The left explanation was preferred in {_percent(left)} of the comparisons; sides were drawn.",
    ]
    return lines


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f} %"


def _range(interval: Any) -> str:
    return "-" if interval is None else f"{100 * interval[0]:.0f} to {100 * interval[1]:.0f} %"
