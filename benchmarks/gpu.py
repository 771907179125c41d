"""Everything that waits for a GPU, in order of worth: each part a process of its own with a limit.

    python -m benchmarks.gpu --out build/gpu [--steps attribution mlp] [--again] [--limit 540] [--total 580]

What fails, hangs or lacks something costs no other: how each part ended stands in the results, gpu.json and gpu.md,
which are written anew after each. A part that is done is passed over when the command is repeated on the same folder.
This module needs Python alone; what the parts measure is in `benchmarks.gpu_parts`, what each is for in docs/gpu.md.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.machine import cpu_model

Record = dict[str, Any]

ENOUGH = 15.0  # seconds: with less left, a part is not begun
GRACE = 5.0  # seconds between asking a process to end and ending it
TAIL = 25  # lines of what a part said that are kept
LONGEST = 400  # characters of such a line
# as Python, this project and pandas say it
MISSING = re.compile(r"\w*Error: (?:No module named '|lvlmva needs |`Import |Missing optional dependency ')([\w.]+)")
DISTRIBUTIONS = ("torch", "torchvision", "numpy", "scipy", "captum", "pytest")


class Part(NamedTuple):
    """A process. command: "{json}" in it stands for the file that it leaves; needs: what, and a file or None."""

    name: str
    command: tuple[str, ...]
    needs: tuple[tuple[str, Path | None], ...] = ()


class Step(NamedTuple):
    """Parts that answer one question, and share one limit.

    compare: (column, the start of a way's name): rows get a last column, how many times less they take than that way.
    """

    name: str
    title: str
    measures: str
    aim: str
    parts: Sequence[Part]
    compare: tuple[str, str] | None = None


def steps_of(options: argparse.Namespace) -> list[Step]:
    """Every step in order of worth."""

    def part(name: str, *more: str, needs: tuple[tuple[str, Path | None], ...] = ()) -> Part:
        command = [sys.executable, "-m", "benchmarks.gpu_parts", name, "--json", "{json}", "--device", options.device]
        return Part(name, (*command, *(["--tiny"] if options.tiny else []), *more), needs)

    def study(name: str, root: Path | None, weights: bool) -> Part:
        more = ["--work", str(options.work / name), "--results", str(options.out)]
        needs: tuple[tuple[str, Path | None], ...] = ()
        if not options.tiny:
            more += ["--root", str(root or "TAR")]
            needs = ((f"the archive of {name.partition('.')[0]} (--data)", root),)
        if weights:
            more += ["--weights", str(options.weights or "FILE")]
            needs += (("ResNet50's weights (--weights)", options.weights),)
        return part(name, *more, needs=needs)

    knee, skin = (_archive(options.data, name) for name in ("knee", "skin"))
    return [
        Step(
            "tests",
            "Tests marked gpu",
            "Attribution, alignment with CUDA graphs, counterexamples, the convolutions' double backward, regions and "
            "evaluation on the device against the CPU or against eager steps.",
            "all pass",
            [part("tests")],
        ),
        Step(
            "attribution",
            "DeepLiftSHAP of ResNet50 at 224x224",
            "Milliseconds a pair of image and baseline, all forward passes included: the limit (plain input-gradient "
            "backward), ours in float32 with TF32 off, with TF32 and in bfloat16 with what they cost in completeness "
            "and in rank correlation with the float32 maps, ours as a replayed CUDA graph, and captum.",
            "at most 1.15 of the limit with its forward in float32; at least 5 times as fast as captum",
            [part(f"attribution.{name}") for name in ("limit", "float32", "tf32", "bfloat16", "graph", "captum")],
            ("ms a pair", "captum"),
        ),
        Step(
            "segmentation",
            "PPEPS-WGM of 224x224 maps, J = 7, 32 starts",
            "Milliseconds a map on the device and on the machine's processor, the mean log-likelihood, and the share "
            "of pixels in the same region.",
            "none was set for a GPU; on a processor 40 ms a map",
            [part("segmentation")],
            ("ms a map", "cpu"),
        ),
        Step(
            "mlp",
            "RRR training of the MLP 784-256-10, 7 seeds x 6 λ",
            "Milliseconds a step and model: the plain loop, ours one run at a time, ours in one call with CUDA graphs.",
            "20 times the plain loop",
            [part("mlp")],
        ),
        Step(
            "resnet50",
            "RRR training of ResNet50 at 224x224, BatchNorm frozen",
            "Milliseconds a step: the plain loop and ours with CUDA graphs, in float32 (TF32 where PyTorch takes it by "
            "itself, in both) and in bfloat16 (torch.autocast in both).",
            "1.5 times the plain loop",
            [part("resnet50.float32"), part("resnet50.bfloat16")],
        ),
        Step(
            "knee",
            "Knee radiographs at 224x224 with ResNet50",
            "benchmarks.study on one base: base, λ = 0, LVLM-VA and true masks; it goes on from its work folder. With "
            "ImageNet weights where a file is given, else from scratch, which is another experiment.",
            "the paper's: WGA 0.03 before, 0.19 after, with weights and a Critic that are not these",
            [study("knee.pretrained", knee, True), study("knee.scratch", knee, False)],
        ),
        Step(
            "skin",
            "Skin lesions at 224x224 with ResNet50",
            "As knee.",
            "the paper's: WGA 0.23 before, 0.45 after, with weights and a Critic that are not these",
            [study("skin.pretrained", skin, True), study("skin.scratch", skin, False)],
        ),
    ]


def _archive(data: Path | None, name: str) -> Path | None:
    if data is None:
        return None
    found = sorted(data.glob(f"{name}*.tar")) if data.is_dir() else []
    return found[0] if found else data / f"{name}*.tar"  # which an error names


# ------------------------------------------------------------------------------------------------------------ running


def run(
    steps: Sequence[Step], out: Path, *, again: bool, limit: float, total: float | None, known: Sequence[Step] = ()
) -> list[Record]:
    """Run what is not done; write the results after each part, and return them.

    Args:
        steps: that are run. known: all that the page names, those that are run if empty.
        again: run what is done as well. limit: seconds for a step; total: for all, None = no limit.
    """
    out.mkdir(parents=True, exist_ok=True)
    known = known or steps
    records = read_records(out)
    machine = describe_machine()
    write(out, known, records)
    ends = time.monotonic() + total if total is not None else float("inf")
    for step in steps:
        step_ends = time.monotonic() + limit
        for part in step.parts:
            key = (step.name, part.name)
            said = _readable(part.command)
            earlier = records.get(key)
            if earlier and not again and earlier["end"] == "done" and earlier["command"] == said:
                sys.stdout.write(f"{part.name}: done before\n")
                continue
            record = {"step": step.name, "part": part.name, "command": said, "machine": machine}
            record |= _run_part(part, step_ends - time.monotonic(), ends - time.monotonic())
            if not (record["end"] == "not run" and earlier and earlier["command"] == said and earlier["result"]):
                records[key] = record
            sys.stdout.write(f"{part.name}: {record['end']}{_because(record)}, {record['seconds']:.0f} s\n")
            sys.stdout.flush()
            write(out, known, records)
    return list(records.values())


def _run_part(part: Part, of_step: float, of_all: float) -> Record:
    """How it ended: end, why, seconds, date, log, result."""
    record: Record = {"end": "not run", "why": "", "seconds": 0.0, "log": [], "result": None}
    record["date"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    absent = [f"{what}: {path or 'not given'}" for what, path in part.needs if path is None or not path.exists()]
    if absent:
        return record | {"why": f"missing: {'; '.join(absent)}"}
    left = min(of_step, of_all)
    if left < ENOUGH:
        whose = "the step's limit (--limit)" if of_step <= of_all else "the limit of all (--total)"
        return record | {"why": f"no time left of {whose}; repeat the command"}
    with tempfile.TemporaryDirectory() as folder:
        answer, log = Path(folder) / "answer.json", Path(folder) / "log"
        command = [word.replace("{json}", str(answer)) for word in part.command]
        started = time.monotonic()
        code = _run_command(command, log, left)
        record["seconds"] = round(time.monotonic() - started, 1)
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        record["log"] = [line[:LONGEST] for line in lines if line.strip()][-TAIL:]
        record["result"] = _answer(answer)
    if code is None:
        return record | {"end": "cut", "why": f"at its limit of {left:.0f} s"}
    if code == 0:
        if record["result"] is None:
            return record | {"end": "failed", "why": "it ended well and left no result"}
        return record | {"end": "done"}
    last = record["log"][-1] if record["log"] else "it said nothing"
    if found := MISSING.search(last):
        return record | {"why": f"missing: module {found[1]}"}
    return record | {"end": "failed", "why": f"exit code {code}: {last}"}


def _run_command(command: Sequence[str], log: Path, limit: float) -> int | None:
    """The exit code, or None where it was ended at its limit, with all that it had started."""
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT, process_group=0
        )
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:  # also when this process is told to end
            _end_group(process)


def _end_group(process: "subprocess.Popen[bytes]") -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            continue


def _answer(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):  # it was ended before, or while, it wrote
        return None


def _readable(command: Sequence[str]) -> str:
    return " ".join("python" if word == sys.executable else word for word in command)


def describe_machine() -> dict[str, str]:
    """GPU, driver, memory, processor and versions."""
    facts = {"gpu": "none (nvidia-smi is not there)"}
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        try:
            asked = subprocess.run(query, capture_output=True, text=True, check=False, timeout=60)
        except subprocess.TimeoutExpired:
            facts["gpu"] = "nvidia-smi does not answer"
        else:
            facts["gpu"] = (asked.stdout or asked.stderr).strip().replace("\n", "; ")
    facts |= {"processor": f"{os.cpu_count()} cores, {cpu_model()}", "python": platform.python_version()}
    for name in DISTRIBUTIONS:
        try:
            facts[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            facts[name] = "not installed"
    return facts


# ------------------------------------------------------------------------------------------------------------ results


def read_records(out: Path) -> dict[tuple[str, str], Record]:
    """What earlier calls left, by step and part."""
    file = out / "gpu.json"
    if not file.exists():
        return {}
    kept = json.loads(file.read_text(encoding="utf-8"))
    return {(record["step"], record["part"]): record for record in kept["parts"]}


def write(out: Path, steps: Sequence[Step], records: dict[tuple[str, str], Record]) -> None:
    """Write gpu.json and gpu.md, each at once or not at all."""
    order = [(step.name, part.name) for step in steps for part in step.parts]
    listed = [records[key] for key in order if key in records]
    listed += [record for key, record in records.items() if key not in order]
    for name, text in (
        ("gpu.json", json.dumps({"parts": listed}, indent=1, ensure_ascii=False)),
        ("gpu.md", page(steps, records)),
    ):
        fresh = out / f".{name}"
        fresh.write_text(text + "\n", encoding="utf-8")
        fresh.replace(out / name)


def page(steps: Sequence[Step], records: dict[tuple[str, str], Record]) -> str:
    """The results as Markdown."""
    machines = list({json.dumps(record["machine"]): record["machine"] for record in records.values()}.values())
    lines = ["# On a GPU", "", "Written by `python -m benchmarks.gpu`; what each step is for: docs/gpu.md.", ""]
    if any("--tiny" in record["command"].split() for record in records.values()):
        lines += [
            "**Parts run with `--tiny` show that they run. Their figures measure nothing.**",
            "",
        ]
    for number, machine in enumerate(machines, 1):
        lines.append(f"- Machine {number}: {', '.join(f'{name} {value}' for name, value in machine.items())}.")
    lines += ["", "| step | part | end | seconds | machine | date |", "|---|---|---|---|---|---|"]
    for step in steps:
        for part in step.parts:
            record = records.get((step.name, part.name))
            if record is None:
                lines.append(f"| {step.name} | {part.name} | not run yet | | | |")
                continue
            end = _cell(record["end"] + _because(record))
            place = machines.index(record["machine"]) + 1
            lines.append(
                f"| {step.name} | {part.name} | {end} | {record['seconds']:.0f} | {place} | {record['date'][:10]} |"
            )
    for step in steps:
        lines += ["", *_section(step, [records.get((step.name, part.name)) for part in step.parts])]
    return "\n".join(lines)


def _section(step: Step, found: Sequence[Record | None]) -> list[str]:
    lines = [f"## {step.title}", "", step.measures, "", f"Aim: {step.aim}."]
    there = [record for record in found if record is not None]
    rows = [row for record in there if record["result"] for row in record["result"]["rows"]]
    if rows:
        lines += ["", *table(with_ratios(rows, step.compare))]
    else:
        lines += ["", "Not measured yet."]
    for record in there:
        notes = record["result"].get("notes", []) if record["result"] else []
        lines += [line for note in notes for line in ("", note)]
        if record["end"] in ("failed", "cut"):
            lines += ["", f"The last that {record['part']} said:", "", "```", *_plain(record["log"]), "```"]
    lines += [line for record in there for line in ("", f"`{record['command']}`")]
    return lines


def with_ratios(rows: Sequence[Record], compare: tuple[str, str] | None) -> list[Record]:
    """The rows with how many times less each takes than the way that they are compared with, where it was measured."""
    if compare is None:
        return list(rows)
    column, start = compare
    peer = next((row[column] for row in rows if row["way"].startswith(start) and row.get(column)), None)
    if peer is None:
        return list(rows)
    return [{**row, f"x {start}": peer / row[column]} if row.get(column) else row for row in rows]


def table(rows: Sequence[Record]) -> Iterator[str]:
    """Lines of a Markdown table of flat rows: every column that one of them has, in the order of their appearance."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    yield f"| {' | '.join(columns)} |"
    yield f"|{'---|' * len(columns)}"
    for row in rows:
        yield f"| {' | '.join(_cell(row.get(name)) for name in columns)} |"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def _because(record: Record) -> str:
    return f" ({record['why']})" if record["why"] else ""


def _plain(log: Sequence[str]) -> list[str]:
    return [line.replace("```", "'''") for line in log]


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/gpu"), help="folder of the results")
    parser.add_argument("--steps", nargs="+", help="names of steps; all by default")
    parser.add_argument("--again", action="store_true", help="run what is done as well")
    parser.add_argument("--limit", type=float, default=540, help="seconds a step")
    parser.add_argument("--total", type=float, help="seconds for all that this call runs")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="smallest sizes: whether all of it runs, no measurement")
    data = os.environ.get("LVLMVA_DATA")
    parser.add_argument(
        "--data", type=Path, default=Path(data) if data else None, help="folder of knee*.tar, skin*.tar"
    )
    parser.add_argument("--weights", type=Path, help="torchvision's ResNet50 weights, a file")
    parser.add_argument("--work", type=Path, default=Path("build/gpu-work"), help="folder that the studies go on from")
    options = parser.parse_args()
    known = steps_of(options)
    names = [step.name for step in known]
    if unknown := [name for name in options.steps or [] if name not in names]:
        parser.error(f"no step {', '.join(unknown)}; expected some of {', '.join(names)}")
    chosen = [step for step in known if not options.steps or step.name in options.steps]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))
    records = run(chosen, options.out, again=options.again, limit=options.limit, total=options.total, known=known)
    ran = [record for record in records if record["step"] in [step.name for step in chosen]]
    sys.exit(any(record["end"] == "failed" for record in ran))


if __name__ == "__main__":
    main()
