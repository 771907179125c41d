"""The folder of many experiments: what lies where, which pieces of work there are, and how one of them is done.

    <folder>/images.zarr, samples.parquet, spurious_masks.zarr    prepared once, for all bases
    <folder>/base=0/params.yaml, data/, models/, metrics/         what the stages of dvc.yaml write, of each base
    <folder>/base=0/lambda=0.1/                                   the methods at one λ, where several are named
    <folder>/done/base=0-align-lvlm_va                            a piece that came to its end, and the seconds it took

What is done is never done again. Trainings keep their state (`lvlmva_core.resume`), so that a killed piece goes on
inside.
"""

import gc
import importlib
import inspect
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lvlmva.changes import content_bytes
from lvlmva.params import Params, load_params, params_of, prompts_folder
from lvlmva.pipeline import paths
from lvlmva_core.arrays import read_json
from lvlmva_core.errors import InputError
from lvlmva_core.lvlm.prompts import CRITIC_FILES, JUDGE_FILES, prompts_digest
from lvlmva_core.lvlm.settings import Endpoint
from lvlmva_core.methods import METHODS
from lvlmva_core.outputs import BASE
from lvlmva_core.store import replace_file
from lvlmva_core.train_settings import Checkpoint

SHARED = ("images", "samples", "spurious_masks")
OF_THE_PROJECT = ("own", "prompts", "overrides")
OF_A_LAMBDA = ("params", "settings", "models", "curves", "method_metrics", "evaluations")
# until somebody may be paid, and after; `exchange` only where a critic is spared by it
BEFORE_CRITICS = ("settings", "train", "rank", "attribute", "segment", "exchange")
CRITICS = ("critique", "judge")
DECIDE_NOTHING = ("explain", "compare", "report", "execution")  # sections that no piece of a study depends on
# of an endpoint, what is neither sent nor decides what an answer is
LIMITS = tuple(
    name
    for name in Endpoint.model_fields
    if name.startswith(("max_", "allow_")) or "usd_per" in name or name in ("concurrency", "timeout_s", "retries")
)
PIECE = re.compile(
    r"(?:base=(?P<base>\d+)-)?(?:lambda=(?P<rrr_lambda>[0-9.e+-]+?)-)?"
    r"(?P<stage>prepare|settings|train|rank|attribute|segment|exchange|critique|judge|mask|align|retrain|evaluate)"
    r"(?:-(?P<method>\w+))?"
)


@dataclass(frozen=True)
class Piece:
    """A stage of dvc.yaml, of one base (None: for all), λ ("": as params have it) and method ("": of none)."""

    stage: str
    base: int | None = None
    rrr_lambda: str = ""
    method: str = ""

    @property
    def name(self) -> str:
        """Of its mark, and for messages."""
        place = [] if self.base is None else [f"base={self.base}"]
        place += [f"lambda={self.rrr_lambda}"] if self.rrr_lambda else []
        return "-".join([*place, self.stage, *([self.method] if self.method else [])])

    @classmethod
    def named(cls, name: str) -> "Piece":
        """The piece of a name. Raises InputError where there is none."""
        found = PIECE.fullmatch(name)
        if found is None:
            raise InputError(f"'{name}' is no piece of a study; they are named like base=0-align-lvlm_va")
        base = None if found["base"] is None else int(found["base"])
        return cls(found["stage"], base, found["rrr_lambda"] or "", found["method"] or "")

    def folder(self, study: Path) -> Path:
        """Where it finds its params.yaml and writes."""
        if self.base is None:  # all bases have the same section `prepare`
            return min(study.glob("base=*"), key=base_of)
        here = study / f"base={self.base}"
        return here / f"lambda={self.rrr_lambda}" if self.rrr_lambda else here


def base_of(folder: Path) -> int:
    """The number of a base's folder."""
    return int(folder.name.partition("=")[2])


@dataclass(frozen=True)
class Job:
    """Pieces that follow each other in one process. after: pieces of others that must be done before."""

    pieces: tuple[Piece, ...]
    after: tuple[Piece, ...] = ()

    @property
    def name(self) -> str:
        """Its last piece's: what it is for."""
        return self.pieces[-1].name


@dataclass(frozen=True)
class Study:
    """What is asked for.

    methods: without the base itself, which is always there. lambdas: as they stand in names; (): λ is as params say.
    spares: whether a critic is spared by what exchange finds. paid: whether a critic or judge is a model.
    """

    folder: Path
    bases: tuple[int, ...]
    methods: tuple[str, ...]
    lambdas: tuple[str, ...] = ()
    spares: bool = False
    paid: bool = False

    def before_critics(self, base: int) -> list[Piece]:
        """What can be done before anybody is asked."""
        return [Piece(stage, base) for stage in BEFORE_CRITICS if stage != "exchange" or self.spares]

    def jobs(self) -> list[Job]:
        """All that is to be done, base after base."""
        found = [Job((Piece("prepare"),))]
        for base in self.bases:
            start = self.before_critics(base)
            critics = [Piece(stage, base) for stage in CRITICS]
            rest = [Piece("mask", base), Piece("evaluate", base, method=BASE)]
            if self.paid:  # critics are asked by `lvlmva.experiments_paid`, all bases under one budget
                found.append(Job(tuple(start), (Piece("prepare"),)))
                found.append(Job(tuple(rest), (start[-1], *critics)))
            else:
                found.append(Job((*start, *critics, *rest), (Piece("prepare"),)))
            found += [Job(tuple(each), (rest[-1],)) for each in self.of_methods(base)]
        return found

    def of_methods(self, base: int) -> Iterator[list[Piece]]:
        """The pieces of each method on a base, at each λ where it has one."""
        for method in self.methods:
            stage = "align" if METHODS[method].kind == "penalty" else "retrain"
            for rrr_lambda in self.lambdas if self.lambdas and has_lambda(method) else ("",):
                own = [Piece("settings", base, rrr_lambda)] if rrr_lambda else []
                yield [*own, Piece(stage, base, rrr_lambda, method), Piece("evaluate", base, rrr_lambda, method)]


def has_lambda(method: str) -> bool:
    """Whether a method has a penalty whose weight can be chosen."""
    known = METHODS[method]
    return known.kind == "penalty" and known.correction != "counterexamples" and "rrr_lambda" not in known.fixed


# ------------------------------------------------------------------------------------------------------------- params


def set_up(study: Study, content: Mapping[str, Any]) -> None:
    """Write the params.yaml of each base and λ. content: valid params, with methods and seeds as asked for.

    More methods and more seeds than before may be asked for: then what depends on the seeds is done anew, with all of
    them.

    Raises:
        InputError: params are wrong, or differ from those that what is there was made with.
    """
    made = {}
    for base in study.bases:
        here = study.folder / f"base={base}"
        for rrr_lambda in ("", *study.lambdas):
            place = here / f"lambda={rrr_lambda}" if rrr_lambda else here
            made[place] = _params_of(content, base, rrr_lambda)
    known = {place: params_of(each, place / "params.yaml") for place, each in made.items()}
    before = {place: load_params(place / "params.yaml") for place in made if (place / "params.yaml").exists()}
    for place, params in before.items():  # nothing is changed before all is known to fit
        _check_same(params, known[place], place)
    for place in set(study.folder.glob("base=*")) - made.keys():  # bases that are not named now are pooled all the same
        params, wanted = load_params(place / "params.yaml"), params_of(_params_of(content, base_of(place), ""), place)
        _check_same(params, wanted, place)
        if params.align.seeds != wanted.align.seeds:
            raise InputError(f"{place}: has other seeds; name this base too, or take another --folder")
    study.folder.mkdir(parents=True, exist_ok=True)
    replace_file(study.folder / ".gitignore", b"*\n")  # large, and made again by the command
    for place, each in made.items():
        if place in before:
            _forget(study.folder, place, before[place], known[place])
        place.mkdir(parents=True, exist_ok=True)
        replace_file(place / "params.yaml", content_bytes(each))


def _params_of(content: Mapping[str, Any], base: int, rrr_lambda: str) -> dict[str, Any]:
    """Params of one base: its seed of the training, and λ where one is named."""
    made = {**content}
    if "checkpoint" not in made["train"]:  # which there is no seed for
        made["train"] = {**made["train"], "seed": base}
    if rrr_lambda:
        made["methods"] = {
            name: {**own, "rrr_lambda": float(rrr_lambda)} if has_lambda(name) else own
            for name, own in made["methods"].items()
        }
    return made


def _check_same(before: Params, wanted: Params, place: Path) -> None:
    """Raise InputError where what was made with `before` is not what `wanted`, or today's prompts, would make."""
    file = place / "params.yaml"
    for name in Params.model_fields:
        if name in ("methods", "retrained", *DECIDE_NOTHING):
            continue
        mine, theirs = (_deciding(getattr(params, name), name) for params in (before, wanted))
        if mine != theirs:
            raise InputError(f"{file}: of another study ('{name}' differs); take another --folder, or undo the change")
    ours, others = before.chosen_methods(), wanted.chosen_methods()
    for name in sorted(ours.keys() & others.keys()):
        if _deciding(ours[name], "align") != _deciding(others[name], "align"):
            raise InputError(
                f"{file}: of another study (the settings of '{name}' differ); take another --folder, or undo the change"
            )
    for section, files in (("critique", CRITIC_FILES), ("judge", JUDGE_FILES)):
        kept = place / paths()["settings"] / f"{section}_prompts.json"
        name = getattr(wanted, section).prompts
        prompts = prompts_folder(Path(paths()["prompts"]), f"{section}.prompts", name)
        if kept.exists() and read_json(kept)["sha256"] != prompts_digest(prompts, *files):
            raise InputError(f"{place}: was made with other prompts than {prompts} holds now; take another --folder")
    missing = sorted(set(before.align.seeds) - set(wanted.align.seeds))
    if missing:
        raise InputError(
            f"{file}: has seeds {_listed(before.align.seeds)}; name them all, and more if you like, or take another "
            "--folder"
        )


def _deciding(section: Any, name: str) -> Any:
    """A section without what decides nothing of a result."""
    if name == "align":
        return section.model_copy(update={"seeds": []})
    if name not in CRITICS:
        return section
    changes: dict[str, Any] = {"asked_again": 0} if hasattr(section, "asked_again") else {}
    if hasattr(section, "endpoint"):
        fields = Endpoint.model_fields
        changes["endpoint"] = section.endpoint.model_copy(update={each: fields[each].default for each in LIMITS})
    if getattr(section, "critics", None):
        changes["critics"] = [_deciding(each, name) for each in section.critics]
    return section.model_copy(update=changes)


def _forget(study: Path, place: Path, before: Params, wanted: Params) -> None:
    """Take the marks of what has to be done anew: the methods' settings, and with other seeds the methods."""
    prefix = "-".join(place.relative_to(study).parts)
    stale = ["settings"] if before.chosen_methods() != wanted.chosen_methods() else []
    if before.align.seeds != wanted.align.seeds:
        stale += ["align-*", "retrain-*", *(f"evaluate-{name}" for name in METHODS if name != BASE)]
    for pattern in stale:
        for mark in (study / "done").glob(f"{prefix}-{pattern}"):
            mark.unlink()


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def of_one_base(params: Params) -> bool:
    """Whether the base model was brought along, so that there is only one."""
    return isinstance(params.train, Checkpoint)


# -------------------------------------------------------------------------------------------------------------- pieces


def mark_of(study: Path, piece: Piece) -> Path:
    """The file that says that a piece is done."""
    return study / "done" / piece.name


def is_done(study: Path, piece: Piece) -> bool:
    """Whether a piece came to its end. Earlier, `prepare` was marked as the first base's."""
    return mark_of(study, piece).exists() or (piece.stage == "prepare" and any(study.glob("done/base=*-prepare")))


def seconds_of(study: Path) -> dict[str, list[float]]:
    """Stage -> how long each piece of it took here."""
    took: dict[str, list[float]] = {}
    for mark in sorted(study.glob("done/*")):
        if (said := mark.read_text(encoding="ascii").strip()) and PIECE.fullmatch(mark.name):
            took.setdefault(Piece.named(mark.name).stage, []).append(float(said))
    return took


def do(study: Path, piece: Piece, **options: Any) -> None:
    """Do a piece, unless it is done. Who finds another at it (a killed study leaves a stage running) waits.

    Args:
        options: of the stage, beside paths and method.

    Raises:
        InputError: what the stage says.
    """
    from filelock import FileLock, Timeout

    if is_done(study, piece):
        return
    (study / "locks").mkdir(parents=True, exist_ok=True)
    lock = FileLock(study / "locks" / piece.name, fallback_to_soft=False)  # a soft lock would outlive a killed holder
    try:
        held = lock.acquire(blocking=False)
    except Timeout:
        sys.stderr.write(f"{piece.name}: waits for another process that does it\n")
        held = lock.acquire()
    with held:
        if is_done(study, piece):
            return
        started = time.monotonic()
        run(study, piece.folder(study), piece.stage, {**({"method": piece.method} if piece.method else {}), **options})
        mark = mark_of(study, piece)
        mark.parent.mkdir(exist_ok=True)
        replace_file(mark, f"{time.monotonic() - started:.3f}\n".encode("ascii"))


def run(study: Path, here: Path, stage: str, options: Mapping[str, Any]) -> None:
    """Run a stage in this process, on the paths of dvc.yaml below `here`; what all bases share lies in `study`."""
    function = getattr(importlib.import_module(f"stages.{stage}"), stage)
    gc.enable()  # importing stages has turned it off
    known = paths_of(study, here)
    function(**{name: known[name] for name in inspect.signature(function).parameters if name in known}, **options)


def paths_of(study: Path, here: Path) -> dict[str, Path]:
    """Name of dvc.yaml -> where it lies, for a base or one of its λ."""
    every = {name: Path(path) for name, path in paths().items()}
    of_base = here.parent if here.name.startswith("lambda=") else here
    known = {name: (here if name in OF_A_LAMBDA else of_base) / path for name, path in every.items()}
    known |= {name: study / every[name].name for name in SHARED}
    return known | {name: every[name] for name in OF_THE_PROJECT}
