"""Stage critique: what the Critic says about the regions of each alignment sample."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import typer

from lvlmva.ask import ask_all
from lvlmva.entry import run
from lvlmva.params import Critique, load_params
from lvlmva_core.arrays import read_array, read_attrs
from lvlmva_core.errors import InputError
from lvlmva_core.lvlm.calls import Call, Record, answer_text
from lvlmva_core.lvlm.client import Client, Question, model_name
from lvlmva_core.lvlm.critic import critic_call
from lvlmva_core.lvlm.offline import criticise_by_oracle, criticise_by_rules
from lvlmva_core.lvlm.prompts import load_critic_prompts
from lvlmva_core.lvlm.records import Row, write_rows
from lvlmva_core.regions import ON_OBJECT, regions_present, segmentation_digest
from lvlmva_core.render import COLOUR_NAMES
from lvlmva_core.samples import (
    read_class_names,
    read_images,
    read_object_masks,
    read_samples,
    read_spurious_masks,
    rows_of_ids,
)


def critique(
    params: Path,
    images: Path,
    samples: Path,
    segments: Path,
    attributions: Path,
    spurious_masks: Path,
    prompts: Path,
    critiques: Path,
    dry_run: bool = False,
) -> None:
    """Have the regions of each alignment sample criticised."""
    config = load_params(params).critique
    attrs = read_attrs(segments)
    ids = list(attrs["ids"])
    table = read_samples(samples)
    places = rows_of_ids(table, ids)
    labels = table["label"].to_numpy()[places]
    class_names = read_class_names(images)
    label_maps, pictures = read_array(segments, "segments"), read_images(images, places)
    rows = [
        _row(config, sample, label_map, status, int(label), class_names)
        for sample, label_map, status, label in zip(ids, label_maps, attrs["status"], labels, strict=True)
    ]
    if config.critic in ("rules", "oracle") and dry_run:
        typer.echo(f"critique: '{config.critic}' is a stand-in; nothing to buy", err=True)
        return
    if config.critic == "rules":
        for place, row in _with_regions(rows):
            row["critique"] = criticise_by_rules(pictures[place], label_maps[place])
    elif config.critic == "oracle":
        _ask_oracle(config, rows, label_maps, ids, attributions, spurious_masks, places)
    else:
        _ask_model(config, rows, label_maps, pictures, class_names, prompts / config.prompts, critiques, dry_run)
    if not dry_run:
        write_rows(critiques, rows)


def _row(config: Critique, sample: str, label_map: np.ndarray, status: str, label: int, class_names: list[str]) -> Row:
    """A row without a critique yet; its failure is set where there is nothing to ask about."""
    regions = regions_present(label_map)
    return {
        "sample": sample,
        "segmentation": segmentation_digest(label_map),
        "regions": [{"region": region, "color": COLOUR_NAMES[region]} for region in regions],
        "class_name": class_names[label],
        "critic": model_name(config.endpoint) if config.critic in ("model", "replay") else config.critic,
        "settings": {},
        "critique": None,
        "failure": None if regions else f"no region to judge (segmentation: {status})",
        "record": None,
    }


def _with_regions(rows: list[Row]) -> Iterator[tuple[int, Row]]:
    """Place and row of each sample that has a region to ask about."""
    return ((place, row) for place, row in enumerate(rows) if row["failure"] is None)


def _ask_oracle(
    config: Critique,
    rows: list[Row],
    label_maps: np.ndarray,
    ids: list[str],
    attributions: Path,
    spurious_masks: Path,
    places: np.ndarray,
) -> None:
    if read_attrs(attributions)["ids"] != ids:
        raise InputError(f"{attributions}: other samples than the segmentations; rerun `dvc repro segment`")
    masks, known = read_spurious_masks(spurious_masks, places)
    if not known.all():
        sample = ids[int(np.flatnonzero(~known)[0])]
        raise InputError(
            f"critique.critic 'oracle' needs the true mask of '{sample}', which is unknown; use another critic"
        )
    objects = None
    if config.oracle_rejects == "off_object":
        objects = read_object_masks(spurious_masks, places)
        if objects is None:
            raise InputError(
                "critique.oracle_rejects 'off_object' needs masks of the object, which this data set does not have; "
                "set it to spurious_feature"
            )
    settings = {
        "rejects": config.oracle_rejects,
        "overlap": config.overlap if objects is None else ON_OBJECT,
        "false_positive_rate": config.false_positive_rate,
        "false_negative_rate": config.false_negative_rate,
        "seed": config.seed,
    }
    effects = read_array(attributions, "attributions")
    for place, row in _with_regions(rows):
        row["settings"] = settings
        row["critique"] = criticise_by_oracle(
            row["sample"],
            label_maps[place],
            masks[place],
            effects[place],
            rule=config.overlap,
            false_positive_rate=config.false_positive_rate,
            false_negative_rate=config.false_negative_rate,
            seed=config.seed,
            object_mask=None if objects is None else objects[place],
        )


def _ask_model(
    config: Critique,
    rows: list[Row],
    label_maps: np.ndarray,
    pictures: np.ndarray,
    class_names: list[str],
    folder: Path,
    critiques: Path,
    dry_run: bool,
) -> None:
    """Fill in the critiques of a model; after a dry run there are none."""
    endpoint = config.endpoint
    assert endpoint is not None
    loaded = load_critic_prompts(folder, class_names)

    def call_of(place: int) -> Call:
        return critic_call(
            endpoint,
            loaded,
            rows[place]["class_name"],
            pictures[place],
            label_maps[place],
            name_spurious_feature=config.name_spurious_feature,
        )

    async def ask(client: Client, place: int, question: Question) -> Record:
        return await client.ask(question)

    places = [place for place, _ in _with_regions(rows)]
    results = ask_all(
        places,
        name_of=lambda place: str(rows[place]["sample"]),
        first_call=call_of,
        work=ask,
        failure_of=lambda record: None,
        endpoint=endpoint,
        section="critique.endpoint",
        out=critiques,
        replay=config.critic == "replay",
        pictures=True,
        max_failed_share=config.max_failed_share,
        dry_run=dry_run,
    )
    if results is None:
        return
    settings = {"name_spurious_feature": config.name_spurious_feature, "prompt": loaded.digest}
    for place, result in zip(places, results, strict=True):
        rows[place]["settings"] = settings
        if isinstance(result, str):
            rows[place]["failure"] = f"no critique: {result}"
        else:
            rows[place] |= {"critique": answer_text(result), "record": result}


if __name__ == "__main__":
    run(critique)
