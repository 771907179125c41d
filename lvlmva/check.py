"""`lvlmva check`: everything that can be wrong, looked at before hours or money are spent (an extension)."""

import asyncio
import contextlib
import io
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import typer

from lvlmva.ask import allowed_hosts, confirm_host, open_calls, save_elsewhere, short_inputs
from lvlmva.check_model import check_model
from lvlmva.params import Params, load_params, prompts_folder, sections_lacking
from lvlmva.pipeline import paths
from lvlmva.probe import AT_ONCE, Probed, megabytes_available, probe, sizes_of
from lvlmva.roots import with_local_root
from lvlmva.shared import share_calls
from lvlmva_core.errors import InputError
from lvlmva_core.lvlm import detectors
from lvlmva_core.lvlm.budget import Spent, estimate_input_tokens, price_is_known
from lvlmva_core.lvlm.calls import Call, answer_text
from lvlmva_core.lvlm.client import CallFailedError, Client, Question, check_endpoint, host_of, is_loopback
from lvlmva_core.lvlm.critic import critic_call, why_no_critique
from lvlmva_core.lvlm.judge import judge_call
from lvlmva_core.lvlm.prompts import load_critic_prompts, load_judge_prompts
from lvlmva_core.lvlm.settings import DetectorCritic, Endpoint, ModelCritic, ModelJudge
from lvlmva_core.regions import regions_present
from lvlmva_core.render import COLOUR_NAMES
from lvlmva_core.scaling import Calls, Forecast, Sizes, costs_of, forecast, measured_constants

FEW = 20  # test pictures of a class, below which an accuracy means little
LONG = 3600  # seconds from which less is suggested
MARGIN = 1.5  # by which memory and disk must exceed an estimate
SHOWN = {"ok": "ok  ", "warn": "warn", "fail": "FAIL"}


@dataclass(frozen=True)
class Row:
    """One thing that was looked at. message: what was found; of a warning or failure what is wrong and the remedy."""

    name: str
    status: Literal["ok", "warn", "fail"]
    message: str


class Checklist:
    """Rows in the order in which things were looked at, and what the stages will take."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.calls: dict[str, Calls] = {}
        self.estimates: list[Forecast] = []

    def add(self, name: str, status: Literal["ok", "warn", "fail"], message: str) -> None:
        """Note a finding in one line."""
        self.rows.append(Row(name, status, " ".join(message.split())))

    def attempt(self, name: str, look: Callable[[], str | None]) -> bool:
        """Note what `look` found (None: nothing to say), or its InputError as a failure; says whether it passed."""
        try:
            said = look()
        except InputError as error:
            self.add(name, "fail", str(error))
            return False
        if said:
            self.add(name, "ok", said)
        return True

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return all(row.status != "fail" for row in self.rows)


def check(
    ask: Annotated[bool, typer.Option("--ask", help="put one question to the critic's endpoint: it may cost")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="for scripts")] = False,
    params: Annotated[Path, typer.Option(help="the project's settings")] = Path("params.yaml"),
) -> None:
    """Look at pictures, splits, model, prompts, critic, disk, memory, device and remote before the first `dvc repro`.

    Writes nothing into the project. Prints what passed, what to mend, and what each stage will take, as estimated from
    small probes. Exit code 1 where something fails; warnings let it pass.
    """
    done = run_checks(params, ask=ask)
    if as_json:
        rows, estimates = [asdict(row) for row in done.rows], [asdict(each) for each in done.estimates]
        facts = {"passed": done.passed, "checks": rows, "estimates": estimates}
        typer.echo(json.dumps(facts, indent=2, ensure_ascii=False))
    else:
        for row in done.rows:
            typer.echo(f"{SHOWN[row.status]}  {row.name:12}{row.message}")
        if done.estimates:
            typer.echo("\nestimates, from small probes on this machine as busy as it is now:")
            typer.echo(f"{'stage':12}{'time':>10}{'memory':>11}{'on disk':>11}{'cost':>12}  what it rests on")
            for each in done.estimates:
                cost = "-" if each.cost_usd is None else f"${each.cost_usd:.2f}"
                memory = "-" if each.megabytes is None else f"{each.megabytes:.0f} MB"
                stored = f"{each.stored_megabytes:.0f} MB"
                typer.echo(f"{each.stage:12}{_time(each.seconds):>10}{memory:>11}{stored:>11}{cost:>12}  {each.how}")
        failed = sum(row.status == "fail" for row in done.rows)
        warned = sum(row.status == "warn" for row in done.rows)
        verdict = "ready: `dvc repro`" if done.passed else f"{failed} to mend before `dvc repro`"
        more = f", {warned} warning{'s' if warned > 1 else ''}" if warned else ""
        typer.echo(f"\n{verdict}{more}")
    if not done.passed:
        raise typer.Exit(1)


def run_checks(params: Path, *, ask: bool) -> Checklist:
    """Look at everything that `params` names; what depends on a failure is left out."""
    done, known = Checklist(), {name: Path(value) for name, value in paths().items()}
    loaded: Params | None = None
    try:
        loaded = load_params(params)
    except InputError as error:
        done.add("params", "fail", str(error))
        return done
    done.add("params", "ok", f"{params}: every key is known and in its range")
    for section in sections_lacking(params):
        done.add("params", "fail", f"{params}: DVC follows the section '{section}'; add the line `{section}: {{}}`")
    classes: list[str] | None = None
    probed: Probed | None = None
    sizes: Sizes | None = None
    with tempfile.TemporaryDirectory(prefix="lvlmva-check-") as folder:
        images, samples, masks = (Path(folder) / name for name in ("images.zarr", "samples.parquet", "masks.zarr"))
        _say("preparing the pictures into a temporary folder")
        started = time.monotonic()
        if _pictures(done, loaded, images, samples, masks):
            prepared = time.monotonic() - started
            from lvlmva_core.samples import read_class_names

            classes = read_class_names(images)
            _splits(done, loaded, samples, masks)
            probed, sizes = _model(done, loaded, params, images, samples, masks)
        size = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
    _say("prompts and critic")
    _critic(done, loaded, known, classes, probed, ask=ask)
    if probed is not None and sizes is not None:
        _forecast(done, loaded, probed, replace(sizes, calls=done.calls), prepared)
    _machine(done, loaded, size, classes is not None)
    return done


def _say(what: str) -> None:
    """What is being done, for whoever waits; the findings come at the end."""
    typer.echo(f"check: {what} ...", err=True)


def _pictures(done: Checklist, loaded: Params, images: Path, samples: Path, masks: Path) -> bool:
    said = io.StringIO()

    def look() -> str:
        with contextlib.redirect_stderr(said):  # notes, and every bad file in a line of its own
            with_local_root(loaded.prepare).write(images, samples, masks)
        return f"all can be read, as prepare.dataset '{getattr(loaded.prepare, 'dataset', '')}'"

    passed = done.attempt("pictures", look)
    for line in said.getvalue().splitlines():
        if line.startswith("prepare: ") and passed and line[-5:] != " left":
            done.add("pictures", "ok", line.removeprefix("prepare: "))
    if not passed:
        sys.stderr.write(said.getvalue())
    return passed


def _splits(done: Checklist, loaded: Params, samples: Path, masks: Path) -> None:
    from lvlmva_core.samples import groups_known, read_samples, read_spurious_masks, rows_of_split

    table = read_samples(samples)
    counts = table.groupby(["split", "group"]).size()
    said = "; ".join(
        f"{split}: " + ", ".join(f"{group} {count}" for group, count in counts[split].items())
        for split in table["split"].unique()
    )
    done.add("splits", "ok", said)
    smallest = table[table["split"] == "test"].groupby("group").size()
    if smallest.min() < FEW:
        done.add(
            "splits", "warn", f"only {smallest.min()} test pictures of {smallest.idxmin()}: its accuracy means little"
        )
    train = table[table["split"] == "train"]
    wanted, least = loaded.rank.n_samples, int(train["label"].value_counts().min())
    if wanted > len(train):
        done.add("splits", "fail", f"rank.n_samples = {wanted}, the split train has {len(train)}; lower it")
    elif loaded.rank.stratify and wanted / train["label"].nunique() > least + 1:
        done.add(
            "splits", "fail", f"rank.stratify: the smallest class has {least} of {wanted} rank.n_samples; lower it"
        )
    done.attempt("splits", lambda: loaded.check_batches(len(train)))
    known = bool(read_spurious_masks(masks, rows_of_split(table, "train"))[1].any())
    groups = groups_known(table)
    lacking = [what for what, there in (("groups", groups), ("true masks", known)) if not there]
    done.attempt("methods", lambda: loaded.check_supervision(groups=groups, true_masks=known))
    if lacking:
        done.add("methods", "ok", f"no {' and no '.join(lacking)}: what needs them is left out, and said")


def _model(
    done: Checklist, loaded: Params, params: Path, images: Path, samples: Path, masks: Path
) -> tuple[Probed | None, Sizes | None]:
    from lvlmva.torchrun import check_processes
    from lvlmva_core.compute import set_up_compute
    from lvlmva_core.foreign import initial_spec, load_foreign
    from lvlmva_core.models import build_model
    from lvlmva_core.samples import read_class_names, read_images, read_samples, read_spurious_masks, rows_of_split
    from lvlmva_core.splits import read_split
    from lvlmva_core.train_settings import Checkpoint

    if not done.attempt("device", lambda: f"{set_up_compute(loaded.compute.device, loaded.compute.threads)}"):
        return None, None
    if not done.attempt("processes", lambda: check_processes(loaded.compute)):
        return None, None
    threads, cores = loaded.compute.threads, os.cpu_count() or 1
    if loaded.compute.device == "cpu" and threads < cores:
        done.add("device", "ok", f"compute.threads = {threads} of {cores} cores; more change the last bits of results")
    broken = False
    _say("trying the model on the pictures")
    for finding in check_model(params, images, samples):
        done.add(finding.name, "ok" if finding.passed else "fail", finding.message)
        broken |= not finding.passed and finding.name in ("model", "layers")
    if broken:
        return None, None
    device = set_up_compute(loaded.compute.device, loaded.compute.threads)
    table, classes = read_samples(samples), read_class_names(images)
    splits = {split: read_split(images, table, split, device) for split in table["split"].unique()}
    shape = splits["train"].images.shape[1:]
    if isinstance(loaded.train, Checkpoint):
        model = load_foreign(loaded.train, splits["train"].images[:64].cpu(), classes).model
    else:
        spec = initial_spec(loaded.train.model, shape, len(classes), loaded.train.hidden)
        model = build_model(spec, loaded.train.seed, loaded.train.model)
    pictures = read_images(images, rows_of_split(table, "train")[:AT_ONCE])
    known = bool(read_spurious_masks(masks, rows_of_split(table, "test"))[1].any())
    _say("a step of each kind, to estimate times")
    try:
        found = probe(loaded, model.to(device).eval(), splits["train"], pictures)
    except InputError as error:
        done.add("probe", "fail", str(error))
        return None, None
    if found.completeness is not None:
        limit = loaded.attribute.completeness_tolerance
        whole = found.completeness <= limit
        done.add(
            "attribution",
            "ok" if whole else "fail",
            f"one picture explained: it misses the difference of outputs by {found.completeness:.1e} of its size "
            + (f"(at most {limit:g})" if whole else f"(more than attribute.completeness_tolerance = {limit:g})"),
        )
    return found, sizes_of(loaded, model, splits, known)


def _forecast(done: Checklist, loaded: Params, probed: Probed, sizes: Sizes, prepared: float) -> None:
    """What each stage will take: by probes of this model, and by constants measured elsewhere for what none looks at.

    prepared: seconds that preparing took just now.
    """
    constants = measured_constants()
    costs = replace(probed.laid_over(costs_of(constants, sizes)), picture=prepared / sizes.pictures)
    found = {each.stage: each for each in forecast(sizes, costs, constants)}
    if isinstance(loaded.critique, DetectorCritic):
        found["critique"] = replace(found["critique"], seconds=None, how="a detector, which no probe runs")
    done.estimates = list(found.values())
    total = sum(each.seconds or 0.0 for each in done.estimates)
    if total > LONG:
        most = max(done.estimates, key=lambda each: each.seconds or 0.0)
        done.add(
            "time",
            "warn",
            f"about {total / 3600:.1f} hours in all, {_time(most.seconds)} of it {most.stage}; for a first look: fewer "
            "seeds (align.seeds: [0]), values of λ (align.selection), methods or samples (rank.n_samples)",
        )


def _critic(
    done: Checklist,
    loaded: Params,
    known: dict[str, Path],
    classes: list[str] | None,
    probed: Probed | None,
    *,
    ask: bool,
) -> None:
    """Prompts, endpoint and cost of critique and judge."""
    critic, judge = loaded.critique, loaded.judge
    folder = known["prompts"]
    call: Call | None = None
    segments = probed.segments if probed is not None else np.zeros((64, 64), dtype=np.uint8)
    colours = [COLOUR_NAMES[region] for region in regions_present(segments)] or [COLOUR_NAMES[0]]

    def critic_prompts() -> str:
        prompts = load_critic_prompts(prompts_folder(folder, "critique.prompts", critic.prompts), classes or [])
        assert prompts.specification is not None
        text = prompts.render(
            picture=prompts.specification.picture,
            class_name=classes[0] if classes else "",
            description=next(iter(prompts.specification.classes.values()), ""),
            regions=colours,
            spurious_features=list(prompts.specification.spurious_features),
        )
        return f"every class is described; {prompts.file} makes {len(text)} characters"

    def judge_prompts() -> str:
        prompts = load_judge_prompts(prompts_folder(folder, "judge.prompts", judge.prompts))
        prompts.render(critique="", regions=colours, fence="")
        return f"{prompts.file} can be filled"

    described = done.attempt("prompts", critic_prompts)
    described &= done.attempt("prompts", judge_prompts)
    if isinstance(critic, ModelCritic):
        sendable = _endpoint(done, "critique", critic.endpoint, pictures=True)
        if described and probed is not None and classes:
            prompts = load_critic_prompts(folder / critic.prompts, classes)
            named = critic.name_spurious_feature
            shown = (critic.endpoint, prompts, classes[probed.label], probed.picture, segments)
            call = critic_call(*shown, name_spurious_feature=named)
            seconds = _one_call(done, critic, call, colours, known) if ask and sendable else None
            done.calls["critique"] = _calls(critic.endpoint, call, loaded.rank.n_samples, seconds)
    elif isinstance(critic, DetectorCritic):
        done.attempt("critic", lambda: detectors.ready(critic))
    else:
        what = "knows the true masks" if critic.critic == "oracle" else "knows digits alone"
        done.add(
            "critic",
            "ok" if critic.critic == "oracle" or getattr(loaded.prepare, "dataset", "").startswith("decoy") else "warn",
            f"'{critic.critic}' is a stand-in, which {what}: no vision-language model is asked; choose one with "
            "`lvlmva preset critics/...`",
        )
    if isinstance(judge, ModelJudge):
        _endpoint(done, "judge", judge.endpoint, pictures=False)
        if described:
            text = "a word " * (critic.endpoint.token_limit // 2 if isinstance(critic, ModelCritic) else 100)
            prompts = load_judge_prompts(folder / judge.prompts)
            one = judge_call(judge.endpoint, prompts, text, colours, answer_format=judge.answer_format, earlier=[])
            done.calls["judge"] = _calls(judge.endpoint, one, loaded.rank.n_samples, None)


def _endpoint(done: Checklist, section: str, endpoint: Endpoint, *, pictures: bool) -> bool:
    """Whether something could be sent there; nothing is."""
    key = endpoint.api_key_variable
    host = host_of(endpoint)

    def look() -> str:
        check_endpoint(endpoint, os.environ, pictures=pictures)
        return f"{section}: {endpoint.model} at {host}, {f'key in {key}' if key else 'no API key'}"

    if not done.attempt("endpoint", look):
        return False
    allowed = os.environ.get("LVLMVA_ALLOW_HOSTS", "").split()
    if not is_loopback(endpoint) and host not in allowed and f"{host} {key}" not in allowed_hosts():
        done.add(
            "endpoint",
            "warn",
            f"{host} was never used on this machine; agree with `lvlmva calls allow {host} --variable {key}`",
        )
    if not price_is_known(endpoint):
        done.add("endpoint", "warn", f"{section}.endpoint: prices are not set, so that max_cost_usd cannot hold")
    return True


def _one_call(
    done: Checklist, critic: ModelCritic, call: Call, colours: list[str], known: dict[str, Path]
) -> float | None:
    """Buy one answer, which the store keeps; seconds that it took, None where there is none."""

    def prepare() -> str:
        key = check_endpoint(critic.endpoint, os.environ, pictures=True)
        confirm_host(critic.endpoint)
        return key

    async def buy() -> tuple[str, Spent]:
        calls = open_calls(known["critiques"])
        shared = share_calls(calls)
        client = Client(critic.endpoint, "critique.endpoint", calls, prepare, False, save_elsewhere, shared=shared)
        async with client:
            question = Question(call.keys(), lambda: call, "a probe", lambda text: why_no_critique(text, colours))
            record = await client.ask(question)
        return answer_text(record), client.spent

    started = time.monotonic()
    try:
        text, spent = asyncio.run(buy())
    except (InputError, CallFailedError) as error:
        done.add("asked", "fail", f"one question got no usable answer: {error}")
        return None
    if not spent.calls:
        done.add("asked", "ok", f"the store holds an answer of {len(text)} characters already: nothing was sent")
        return None
    seconds = time.monotonic() - started
    done.add("asked", "ok", f"an answer of {len(text)} characters in {seconds:.1f} s for {spent.cost_usd:.4f} USD")
    if spent.short:
        done.add("asked", "warn", short_inputs(spent))
    return seconds


def _calls(endpoint: Endpoint, call: Call, count: int, seconds: float | None) -> Calls:
    return Calls(endpoint, count, estimate_input_tokens(call), endpoint.token_limit, seconds)


def _machine(done: Checklist, loaded: Params, prepared: int, complete: bool) -> None:
    """Disk, memory, and where what was paid for is shared."""
    free = shutil.disk_usage(Path.cwd()).free
    stored = 2**20 * sum(each.stored_megabytes for each in done.estimates)
    wanted = 2 * max(stored, prepared) + 2**30  # outputs stand in the workspace and in DVC's cache
    if complete:
        enough = free > wanted
        remedy = "" if enough else "; make room"
        message = f"{free / 2**30:.1f} GB free, {wanted / 2**30:.1f} GB are plenty{remedy}"
        done.add("disk", "ok" if enough else "fail", message)
    most = max((each.megabytes or 0.0 for each in done.estimates), default=0.0)
    available = megabytes_available()
    if most and available is not None:
        enough = available > MARGIN * most
        remedy = "" if enough else "; lower attribute.batch_size or prepare.image_size, or close other programs"
        message = f"{available:.0f} MB free, the largest stage takes about {most:.0f} MB{remedy}"
        done.add("memory", "ok" if enough else "fail", message)
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo(str(Path.cwd())) as repo:
            name = repo.config["core"].get("remote")
    except DvcException as error:
        done.add("remote", "fail", f"not a DVC project ({error}); run this in a clone of the repository")
        return
    if name:
        done.add("remote", "ok", f"`dvc push` shares outputs and paid answers with '{name}'")
    else:
        done.add(
            "remote", "warn", "no DVC remote: paid answers are on this disk alone; `dvc remote add -d NAME URL` "
            "(docs/sharing.md)"
        )  # fmt: skip


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "not known"
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
