"""Both corrections on verdicts of the oracle, over several base models: what two benchmarks in this folder share.

A folder holds for each base what the stages of dvc.yaml write up to the segmentation. What comes of some verdicts is
a file of logits, which is there or not: the same command goes on after a kill.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.study import preset_content
from lvlmva.changes import content_bytes
from lvlmva.experiments_folder import run
from lvlmva.params import load_params, params_of
from lvlmva.pipeline import paths
from lvlmva_core.align_settings import AlignSettings
from lvlmva_core.alignment import align_ensemble
from lvlmva_core.arrays import read_array, read_attrs
from lvlmva_core.compute import set_up_compute
from lvlmva_core.errors import InputError
from lvlmva_core.lvlm.cases import read_cases
from lvlmva_core.lvlm.critic import criticise
from lvlmva_core.lvlm.offline import judge_by_rules
from lvlmva_core.lvlm.settings import OracleCritic
from lvlmva_core.masks import assemble_masks
from lvlmva_core.metrics import verdict_quality
from lvlmva_core.models import load_checkpoint, predict_logits
from lvlmva_core.outputs import BASE, Outputs, read_outputs, write_outputs
from lvlmva_core.regions import overlaps
from lvlmva_core.samples import read_samples
from lvlmva_core.splits import read_masked, read_sample_rows, read_split
from lvlmva_core.study import drawn_differences, measures_of

CORRECTIONS = ("lvlm_va", "lvlm_va_counterexamples")
LAMBDA_ZERO = "lambda_zero"
CHAIN = ("prepare", "train", "rank", "attribute", "segment")
CHANGES = (
    "critique.critic=oracle",
    f"methods={{{', '.join(f'{name}: {{}}' for name in (*CORRECTIONS, LAMBDA_ZERO))}}}",
)


class Trial:
    """One base model with its alignment set and regions, and what verdicts make of it.

    Args:
        here: its folder. experiment: a preset. changes: section.key=value, laid over it.
    """

    def __init__(self, here: Path, experiment: str, changes: Sequence[str]) -> None:
        os.environ["LVLMVA_STORE"] = str(here / "store")
        _set_up(here, experiment, [*CHANGES, *changes])
        for stage in CHAIN:
            if not (mark := here / "done" / stage).exists():
                run(here, here, stage, {})
                mark.parent.mkdir(exist_ok=True)
                mark.touch()
        self.here = here
        self.params = load_params(here / "params.yaml")
        self.device = set_up_compute(self.params.compute.device, self.params.compute.threads)
        self.samples = read_samples(self.path("samples"))
        self.base, _ = load_checkpoint(self.path("base"), self.device, self.params.train.model)
        self.training, self.validation = (
            read_split(self.path("images"), self.samples, split, self.device) for split in ("train", "val")
        )
        tested = self.samples["id"][self.samples["split"].str.startswith("test")].tolist()
        self.test = read_sample_rows(self.path("images"), self.samples, tested, self.device)
        names = ("images", "samples", "segments", "attributions", "spurious_masks")
        self.cases, _ = read_cases(*(self.path(name) for name in names), with_truth=True)

    def path(self, name: str) -> Path:
        """Where `run` has the stages put what dvc.yaml calls so."""
        shared = name in ("images", "samples", "spurious_masks")
        return self.here / (Path(paths()[name]).name if shared else paths()[name])

    def verdicts(self, critic: Mapping[str, Any]) -> tuple[list[str], np.ndarray, dict[str, Any]]:
        """Sample ids, masks bool (n, H, W), and the verdicts' quality by the oracle's own overlap rule.

        Args:
            critic: settings of the oracle that differ from params.
        """
        config = OracleCritic.model_validate({**self.params.critique.all_critics()[0].model_dump(), **critic})
        given, failures, judged, truth = {}, {}, [], []
        for case, row in zip(self.cases, criticise(config, self.cases), strict=True):
            if row.critique is None or case.spurious_mask is None or case.attribution is None:
                failures[case.sample] = row.failure or "no true mask"
                continue
            given[case.sample] = judge_by_rules(row.critique, list(case.regions()))
            spurious = overlaps(case.segments, case.spurious_mask, case.attribution, config.overlap)
            judged += [verdict == "no" for verdict in given[case.sample].values()]
            truth += [spurious[region] for region in given[case.sample]]
        ids = [str(sample) for sample in read_attrs(self.path("segments"))["ids"]]
        made = assemble_masks(ids, read_array(self.path("segments"), "segments"), given, failures, [])
        return made.ids, made.masks, {**verdict_quality(judged, truth), "masked_area": float(made.masks.mean())}

    def outputs(self, seed: str) -> Outputs:
        """What `base`, as it is now, says of all test splits."""
        logits = predict_logits(self.base.eval(), self.test.images).cpu().numpy().astype(np.float32)[:, None]
        ids, no_maps, no_rows = self.test.table["id"].tolist(), np.zeros((0, 1, 1, 1), np.float32), np.zeros((0, 1, 3))
        return Outputs([seed], ids, logits, [], no_maps, {}, no_rows[:, 0], [], no_rows)

    def file(self, name: str) -> Path:
        """Where outputs are kept."""
        return self.here / "outputs" / f"{name}.safetensors"

    def train(self, method: str, seed: int, critics: Mapping[str, Mapping[str, Any]]) -> None:
        """Correct the base by each set of the oracle's verdicts, where that is not there, and keep the outputs.

        Args:
            critics: name -> settings of the oracle that differ from params. All are trained in one call, of which a
                ReLU MLP's penalty makes one stack.
        """
        absent = [name for name in critics if not self.file(name).exists()]
        if not absent:
            return
        made = [self.verdicts(critics[name])[:2] for name in absent]
        settings = self.params.chosen_methods()[method]
        assert isinstance(settings, AlignSettings)
        masks = np.stack([each for _, each in made])
        read = read_masked(self.path("images"), self.samples, made[0][0], masks, self.device)
        runs = [(settings.rrr_lambda, seed)] * len(absent)
        found = align_ensemble(self.base, self.training, *read, self.validation, settings, runs=runs)
        before = {key: tensor.clone() for key, tensor in self.base.state_dict().items()}
        for name, one in zip(absent, found, strict=True):
            self.base.load_state_dict(one.weights)
            self._keep(name, self.outputs(str(seed)))
        self.base.load_state_dict(before)

    def kept(self, name: str) -> Outputs:
        """Outputs that `train` left; of the base itself under its own name."""
        if name == BASE and not self.file(name).exists():
            self._keep(name, self.outputs(""))
        return read_outputs(self.file(name))

    def _keep(self, name: str, found: Outputs) -> None:
        part = self.file(name).with_suffix(".part")
        write_outputs(part, found)
        part.rename(self.file(name))


def _set_up(here: Path, experiment: str, changes: Sequence[str]) -> None:
    """Write params.yaml of a trial. Raises InputError where another lies there."""
    here.mkdir(parents=True, exist_ok=True)
    params = here / "params.yaml"
    content = preset_content(experiment, changes)
    if params.exists() and load_params(params) != params_of(content, params):
        raise InputError(f"{params}: of another trial; take another folder")
    params.write_bytes(content_bytes(content))


def values_of(trial: Trial, outputs: Outputs) -> dict[str, float]:
    """One model's reliance, WGA and accuracy."""
    return {
        name: statistic(taken(outputs, 0)[None, None])
        for name, (taken, statistic) in measures_of(trial.samples).items()
    }


def differences(
    trial: Trial, subject: Sequence[Outputs], other: Sequence[Outputs], draws: int = 1000
) -> dict[str, tuple[float, float, float]]:
    """Measure -> difference of the means over bases, and its 95 % interval over bases and test pictures.

    Args:
        trial: any of them; all have the same test pictures. subject, other: a model of each base, in one order.
    """
    found = {}
    for name, (taken, statistic) in measures_of(trial.samples).items():
        ours, theirs = (np.stack([taken(one, 0) for one in of])[:, None] for of in (subject, other))
        low, high = np.quantile(drawn_differences(ours, theirs, statistic, draws, 0), [0.025, 0.975])
        found[name] = (statistic(ours) - statistic(theirs), float(low), float(high))
    return found


def write_table(file: Path, made: Sequence[Mapping[str, object]], by: Sequence[str], order: Sequence[object]) -> None:
    """Write rows as CSV, sorted by their columns `by` in a given order; rows of the file about other things stay.

    They may have been made elsewhere: a work folder need not hold everything that is committed.
    """
    table = pd.DataFrame(made)
    keys = [tuple(row) for row in table[list(by)].itertuples(index=False)]
    if file.exists():
        there = pd.read_csv(file)
        there[list(by)] = there[list(by)].fillna("")
        others = [tuple(row) not in set(keys) for row in there[list(by)].itertuples(index=False)]
        table = pd.concat([table, there[others]])
        keys += [tuple(row) for row in there.loc[others, list(by)].itertuples(index=False)]
    places = [order.index(key if len(by) > 1 else key[0]) for key in keys]
    file.parent.mkdir(exist_ok=True)
    table.iloc[np.argsort(places, kind="stable")].to_csv(file, index=False, float_format="%.6f")
