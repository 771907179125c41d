"""What the user study shows: a drawn set of alignment samples, kept as it was when the study began.

A study outlives retraining: pictures, explanations and the critic's words are copied into its folder once, so that the
last participant is asked what the first one was.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import typer

from lvlmva_core.errors import InputError
from lvlmva_core.questionnaire import Item, draw_samples
from lvlmva_core.store import digest, replace_file

FACTS, SHOWN = "study.json", "shown.zarr"
SCHEMA = 1
Kind = Literal["image", "rejected", "regions", "left", "right"]
IGNORED = f"# pictures may be patients'; answers and {FACTS} are for git\n/{SHOWN}\n/.*\n!/.gitignore\n"


@dataclass(frozen=True)
class Questionnaire:
    """A study as it was begun. folder: where it lies. facts: of study.json."""

    folder: Path
    facts: dict[str, Any]

    @property
    def samples(self) -> list[str]:
        """Ids, in the order in which they were drawn."""
        return [each["id"] for each in self.facts["samples"]]

    @cached_property
    def study(self) -> str:
        """What names the study in each answer: 16 hex digits of a digest of all that is shown."""
        return digest(self.facts)[:16]

    def facts_of(self, sample: str) -> dict[str, Any]:
        """Class, critique, regions and verdicts of a sample."""
        return dict(self.facts["samples"][self.samples.index(sample)])

    def picture(self, item: Item, kind: Kind) -> bytes:
        """A PNG for a question. Which model an explanation is of, its bytes alone do not say.

        Raises:
            ValueError: another kind, or one that the question does not show.
        """
        from lvlmva_core.render import render_image, render_overlay, render_region, to_png

        shown = {"explanation": ("image", "left", "right")}.get(item.question, ("image", "rejected", "regions"))
        if kind not in shown:
            raise ValueError(f"picture '{kind}' is none of {', '.join(shown)}")
        place = self.samples.index(item.sample)
        pixels, segments = self._array("images", place), self._array("segments", place)
        if kind == "image":
            return to_png(render_image(pixels))
        if kind == "regions":
            return to_png(render_overlay(pixels, segments, style="grey" if len(pixels) == 1 else "colour"))
        if kind == "rejected":
            regions = self.facts["samples"][place]["regions"]
            rejected = [each["region"] for each in regions if each["verdict"] == "no"]
            return to_png(render_region(pixels, np.isin(segments, rejected)))
        other = {"before": "after", "after": "before"}
        side = item.left if kind == "left" else other[item.left]
        return to_png(explained(pixels, self._array(side, place)))

    def _array(self, name: str, place: int) -> np.ndarray:
        from lvlmva_core.arrays import read_array

        return np.asarray(read_array(self.folder / SHOWN, name, np.array([place]))[0])


def explained(image: np.ndarray, attribution: np.ndarray) -> np.ndarray:
    """An attribution over the paled image: red speaks for the class, blue against: uint8 (H', W', 3), enlarged.

    Each is drawn on its own scale, so that no model is told by how strong its colours are.

    Args:
        image: uint8 (C, H, W). attribution: float (H, W).
    """
    from lvlmva_core.render import attribution_limit, enlarge

    pale = 185 + 70 * image.mean(axis=0) / 255
    level = np.clip(attribution / attribution_limit(attribution), -1, 1)[..., None]
    colour = np.where(level > 0, (190.0, 20.0, 30.0), (30.0, 80.0, 190.0))
    return enlarge(np.rint((1 - abs(level)) * pale[..., None] + abs(level) * colour).astype(np.uint8))


def open_questionnaire(folder: Path) -> Questionnaire | None:
    """The study that was begun in a folder, or None.

    Raises:
        InputError: its file is damaged or of another version.
    """
    path = folder / FACTS
    if not path.exists():
        return None
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        if facts["schema"] != SCHEMA or not facts["samples"]:
            raise ValueError(f"schema {facts['schema']}, {SCHEMA} is read")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); restore it with `git checkout {path}`") from None
    return Questionnaire(folder, facts)


def begin(folder: Path, known: dict[str, Path], count: int, seed: int, *, rejected_only: bool) -> Questionnaire:
    """Draw the samples, explain them by the aligned model, and keep all of it in the study's folder.

    Args:
        known: name -> path, of dvc.yaml. count: samples. rejected_only: draw from those of which the critic rejected a
            region; else from all that it judged.

    Raises:
        InputError: a stage did not run yet, files are of different segmentations, or too few samples can be drawn.
    """
    from lvlmva_core.arrays import read_array, read_attrs, write_arrays
    from lvlmva_core.lvlm.records import CritiqueRow, VerdictRow, read_rows
    from lvlmva_core.outputs import SUBJECT
    from lvlmva_core.regions import segmentation_digest
    from lvlmva_core.render import COLOUR_NAMES
    from lvlmva_core.samples import read_class_names, read_images, read_samples, rows_of_ids

    stages = {"segments": "segment", "attributions": "attribute", "critiques": "critique", "verdicts": "judge"}
    for name, stage in stages.items():
        if not known[name].exists():
            raise InputError(f"{known[name]}: not made yet; run `dvc repro {stage}`")
    verdicts = {row.sample: row for row in read_rows(known["verdicts"], VerdictRow) if row.failure is None}
    critiques = {row.sample: row for row in read_rows(known["critiques"], CritiqueRow) if row.critique is not None}
    possible = [
        sample
        for sample, row in verdicts.items()
        if sample in critiques and (not rejected_only or "no" in row.by_region().values())
    ]
    samples = draw_samples(possible, count, seed)
    attrs, before = read_attrs(known["segments"]), read_attrs(known["attributions"])
    places = [list(attrs["ids"]).index(sample) for sample in samples]
    segments = read_array(known["segments"], "segments", np.array(places))
    if before["ids"] != attrs["ids"]:
        raise InputError(f"{known['attributions']}: other samples than the segmentations; run `dvc repro segment`")
    for sample, label_map in zip(samples, segments, strict=True):
        if not verdicts[sample].segmentation == critiques[sample].segmentation == segmentation_digest(label_map):
            raise InputError(f"{known['verdicts']}: '{sample}' is of another segmentation; run `dvc repro judge`")
    table, class_names = read_samples(known["samples"]), read_class_names(known["images"])
    rows = rows_of_ids(table, samples)
    explained_before = read_array(known["attributions"], "attributions", np.array(places))
    images = read_images(known["images"], rows)
    model, after = _explain_after(known, samples)
    facts = {
        "schema": SCHEMA,
        "seed": seed,
        "drawn_from": {"samples": len(possible), "rejected_only": rejected_only},
        "critics": sorted({name for sample in samples for name in verdicts[sample].critics()}),
        "judges": sorted({verdicts[sample].judge for sample in samples}),
        "explained": {"method": before["method"], "before": known["base"].stem, "after": f"{SUBJECT}/{model.stem}"},
        "samples": [
            {
                "id": sample,
                "class": class_names[int(label)],
                "segmentation": verdicts[sample].segmentation,
                "pictures": digest(pictures),
                "critique": critiques[sample].critique,
                "regions": [
                    {"region": region, "colour": COLOUR_NAMES[region], "verdict": verdict}
                    for region, verdict in sorted(verdicts[sample].by_region().items())
                ],
            }
            for sample, label, *pictures in zip(
                samples, table["label"].to_numpy()[rows], images, explained_before, after, strict=True
            )
        ],
    }
    arrays = {"images": images, "segments": segments, "before": explained_before, "after": after}
    folder.mkdir(parents=True, exist_ok=True)
    write_arrays(folder / SHOWN, arrays, {"ids": samples})
    (folder / ".gitignore").write_text(IGNORED, encoding="utf-8")
    text = json.dumps(facts, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    replace_file(folder / FACTS, text.encode())  # last: a study that was killed while it began is begun anew
    return Questionnaire(folder, facts)


def _explain_after(known: dict[str, Path], samples: list[str]) -> tuple[Path, np.ndarray]:
    """The first aligned model's checkpoint and its attributions, float32 (n, H, W), computed as in stage `explain`."""
    from lvlmva.params import load_params
    from lvlmva_core.arrays import read_attrs
    from lvlmva_core.compute import set_up_compute
    from lvlmva_core.models import load_checkpoint
    from lvlmva_core.outputs import SUBJECT
    from lvlmva_core.samples import read_samples
    from lvlmva_core.splits import read_sample_rows

    checkpoints = sorted((known["models"] / SUBJECT).glob("seed=*.safetensors"))
    if not checkpoints:
        raise InputError(f"{known['models'] / SUBJECT}: no aligned model yet; run `dvc repro align@{SUBJECT}`")
    loaded = load_params(known["params"])
    device = set_up_compute(loaded.compute.device, loaded.compute.threads)
    before, table = read_attrs(known["attributions"]), read_samples(known["samples"])
    if before["method"] != loaded.attribute.method:
        raise InputError(f"{known['attributions']}: by {before['method']}; run `dvc repro attribute`")
    shown = read_sample_rows(known["images"], table, samples, device)
    baselines = read_sample_rows(known["images"], table, list(before["baseline_ids"]), device)
    model, _ = load_checkpoint(checkpoints[0], device, loaded.train.model)
    typer.echo(f"study: {len(samples)} samples are explained by {checkpoints[0]}, once", err=True)
    found = loaded.attribute.explain(model, shown.images, baselines.images, shown.labels)
    return checkpoints[0], np.asarray(found.attributions.sum(1).cpu().numpy(), dtype=np.float32)
