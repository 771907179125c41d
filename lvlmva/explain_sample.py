"""`lvlmva explain`: the whole chain of one sample, as a picture and on the terminal (an extension)."""

import difflib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from lvlmva.pipeline import paths
from lvlmva_core.errors import InputError
from lvlmva_core.regions import Overlay, attribution_shares, segmentation_digest


@dataclass
class Chain:
    """What the pipeline's outputs hold of one sample; None and `lacking` (what is not there, and why) for the rest.

    regions: of each that is present, its colour, share of the positive attribution, share of the pixels, and verdict.
    """

    sample: str
    split: str
    class_name: str
    picture: np.ndarray
    entropy: float | None = None
    before: np.ndarray | None = None
    segments: np.ndarray | None = None
    regions: list[dict[str, Any]] = field(default_factory=list)
    critic: str | None = None
    overlay: Overlay = "grey"
    critique: str | None = None
    judge: str | None = None
    mask: np.ndarray | None = None
    after: np.ndarray | None = None
    lacking: list[str] = field(default_factory=list)


def explain_sample(
    sample: Annotated[str, typer.Argument(help="an id of the sample table: of your own pictures, the file's path")],
    out: Annotated[Path | None, typer.Option(help="the PNG; by default in explained/")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="for scripts: the facts, without the PNG's words")] = False,
) -> None:
    """Show one sample's whole chain: attribution, regions, what the critic said, verdicts, mask, attribution after.

    Reads what `dvc repro` made; what has not been made yet is named. The samples that the critic was asked about are
    those of data/alignment_set.parquet.
    """
    from lvlmva_core.report.chain import chain_figure
    from lvlmva_core.report.figures import save_figure

    found = read_chain(sample, {key: Path(value) for key, value in paths().items()})
    file = out or Path("explained") / f"{''.join(c if c.isalnum() else '_' for c in sample)}.png"
    parts = {name: getattr(found, name) for name in ("before", "segments", "mask", "after")}
    heading = f"{found.sample}: class {found.class_name}, {found.split}" + (
        f", entropy {found.entropy:.4f} nats" if found.entropy is not None else ""
    )
    who = f"critic: {found.critic or 'not asked'}; judge: {found.judge or 'not asked'}"
    save_figure(chain_figure(heading, found.picture, parts, found.regions, found.critique, who, found.overlay), file)
    if as_json:
        facts = {key: value for key, value in vars(found).items() if not isinstance(value, np.ndarray)}
        facts = {key: value for key, value in facts.items() if key not in ("picture", *parts)}
        typer.echo(json.dumps({**facts, "picture": str(file)}, indent=2, ensure_ascii=False))
        return
    typer.echo(heading)
    for each in found.regions:
        typer.echo(
            f"  {each['colour']:8}{each['attribution']:6.1%} of the positive attribution, {each['area']:6.1%} of the "
            f"pixels   {each['verdict'] or 'no verdict'}"
        )
    typer.echo(who)
    if found.critique:
        typer.echo("\n".join(f"  | {_shown(line)}" for line in found.critique.splitlines()))
    for line in found.lacking:
        typer.echo(f"not there: {line}")
    typer.echo(f"picture: {file}")


def read_chain(sample: str, known: dict[str, Path]) -> Chain:
    """What is there of a sample.

    Raises:
        InputError: the data set is not prepared, or has no such sample.
    """
    from lvlmva_core.arrays import read_attrs, read_table
    from lvlmva_core.lvlm.records import CritiqueRow, VerdictRow
    from lvlmva_core.render import COLOUR_NAMES
    from lvlmva_core.samples import read_class_names, read_images, read_samples

    if not known["samples"].exists():
        raise InputError(f"{known['samples']}: not made yet; run `dvc repro prepare`")
    table = read_samples(known["samples"])
    rows = np.flatnonzero(table["id"].to_numpy(dtype=str) == sample)
    if not len(rows):
        close = difflib.get_close_matches(sample, table["id"].tolist(), n=3, cutoff=0.3)
        raise InputError(f"no sample '{sample}' among {len(table)}; alike: {', '.join(close) or table['id'].iloc[0]}")
    row = table.iloc[int(rows[0])]
    chain = Chain(
        sample,
        str(row["split"]),
        read_class_names(known["images"])[int(row["label"])],
        read_images(known["images"], rows)[0],
    )
    if _there(chain, known["entropies"], "rank"):
        entropies = read_table(known["entropies"], ["id", "entropy"]).set_index("id")["entropy"]
        chain.entropy = float(entropies[sample]) if sample in entropies.index else None
    ranked = _there(chain, known["alignment_set"], "rank")
    if ranked and sample not in set(read_table(known["alignment_set"], ["id"])["id"]):
        chain.lacking.append(
            f"all that follows: '{sample}' is not in the alignment set (rank.n_samples, rank.strategy choose it)"
        )
        return chain
    chain.before = _row(chain, known["attributions"], "attributions", "attribute")
    chain.segments = _row(chain, known["segments"], "segments", "segment")
    critique = _record(chain, known["critiques"], CritiqueRow, "critique")
    verdict = _record(chain, known["verdicts"], VerdictRow, "judge")
    verdicts = verdict.by_region() if verdict else {}
    if critique is not None:
        nothing = critique.failure or "nobody was asked: the prediction depends on no region"
        chain.critic, chain.critique = critique.critic, critique.critique or f"({nothing})"
        chain.overlay = critique.settings.get("overlay", "grey")
    if verdict is not None:
        chain.judge = verdict.judge
        if verdict.not_asked is not None and verdict.failure is None:
            verdicts |= {each.region: "yes (not asked)" for each in verdict.not_asked.regions}
    if chain.segments is not None:
        before = chain.before if chain.before is not None else np.zeros(chain.segments.shape)
        chain.regions = [
            {
                "region": region,
                "colour": COLOUR_NAMES[region],
                "attribution": share,
                "area": float((chain.segments == region).mean()),
                "verdict": verdicts.get(region),
            }
            for region, share in attribution_shares(before, chain.segments).items()
        ]
    weighed = known["masks"].exists() and read_attrs(known["masks"]).get("weights")
    chain.mask = _row(chain, known["masks"], "weights" if weighed else "masks", "mask")
    chain.after = _row(chain, known["explanations"], "attributions", "explain")
    return chain


def _there(chain: Chain, path: Path, stage: str) -> bool:
    if path.exists():
        return True
    chain.lacking.append(f"{path}: run `dvc repro {stage}`")
    return False


def _row(chain: Chain, path: Path, name: str, stage: str) -> np.ndarray | None:
    """The sample's row of an output whose attributes name its samples."""
    from lvlmva_core.arrays import read_array, read_attrs

    if not _there(chain, path, stage):
        return None
    ids = list(read_attrs(path)["ids"])
    if chain.sample not in ids:
        why = "the panel shows others (explain.panel_samples)" if stage == "explain" else "left out there"
        chain.lacking.append(f"{path}: holds no '{chain.sample}' ({why})")
        return None
    return np.asarray(read_array(path, name, np.array([ids.index(chain.sample)]))[0])


def _record(chain: Chain, path: Path, kind: Any, stage: str) -> Any:
    from lvlmva_core.lvlm.records import read_rows

    if not _there(chain, path, stage):
        return None
    rows = [row for row in read_rows(path, kind) if row.sample == chain.sample]
    if not rows:
        chain.lacking.append(f"{path}: holds no '{chain.sample}'; run `dvc repro {stage}`")
        return None
    if chain.segments is not None and rows[0].segmentation != segmentation_digest(chain.segments):
        chain.lacking.append(f"{path}: is of another segmentation of the sample; run `dvc repro {stage}`")
        return None
    return rows[0]


def _shown(line: str) -> str:
    """A model's words without what a terminal would obey."""
    return "".join(character if character.isprintable() else " " for character in line)
