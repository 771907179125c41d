"""dvc.yaml: the names of its paths, and the code that each stage depends on.

DVC does not follow imports. What a stage imports, directly or not, is written into its `deps` by `lvlmva deps`.
"""

import ast
import io
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from lvlmva_core.errors import InputError

PIPELINE = Path("dvc.yaml")
FLOORS = ("stages", "lvlmva", "lvlmva_core")
# What decides nothing about the bytes of an output, or reaches DVC as params. All of `lvlmva` is left out too: it says
# where things are and how people are told, never what comes out.
NOT_TRACKED = re.compile(
    r"lvlmva/.*|lvlmva_core/(__init__|errors|progress|(.+/)?(\w+_)?settings)\.py|stages/__init__\.py"
)


def paths(pipeline: Path = PIPELINE) -> dict[str, str]:
    """Name -> path, from `vars` of dvc.yaml, the only place that names paths; empty where there is no dvc.yaml."""
    return {
        name: path
        for entry in _vars(pipeline)
        if isinstance(entry, dict)
        for name, path in entry.get("paths", {}).items()
    }


def command_of(stage: str) -> list[str]:
    """The words of a stage's command, as DVC would run it: python, -m, its module, and what dvc.yaml gives it.

    Raises:
        InputError: the current folder is not in a DVC project, or its dvc.yaml has no such stage.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo() as repo:
            return shlex.split(str(repo.stage.load_one(name=stage).cmd))
    except DvcException as error:
        raise InputError(f"{Path.cwd()}: {error}") from error


def code_of(module: str, root: Path) -> list[str]:
    """Files that a module imports, directly or not, and that decide what comes out; relative to `root`, sorted.

    Imports for types alone do not count, nor what NOT_TRACKED modules import.

    Args:
        module: e.g. "stages.train". root: the folder that holds the packages.
    """
    seen: set[Path] = set()
    todo = list(_files_of(module, root))
    while todo:
        current = todo.pop()
        if current not in seen and not NOT_TRACKED.fullmatch(current.relative_to(root).as_posix()):
            seen.add(current)
            todo += _imports(current, root)
    return sorted(file.relative_to(root).as_posix() for file in seen)


def code_files(module: str) -> list[Path]:
    """The files of `code_of` in the installed project: what names the work of a training that may go on later."""
    root = Path(__file__).resolve().parents[1]
    return [root / name for name in code_of(module, root)]


def deps(
    check: Annotated[bool, typer.Option("--check", help="write nothing; fail where dvc.yaml is stale")] = False,
    pipeline: Annotated[Path, typer.Option(help="the file to change")] = PIPELINE,
) -> None:
    """Write the code that each stage imports into dvc.yaml, since DVC does not follow imports."""
    before = pipeline.read_text(encoding="utf-8")
    after = with_code(before, pipeline.resolve().parent)
    if after == before:
        typer.echo(f"{pipeline}: every stage names the code that it imports")
    elif check:
        raise InputError(f"{pipeline}: stages import other modules than it names; write them with `lvlmva deps`")
    else:
        pipeline.write_text(after, encoding="utf-8")
        typer.echo(f"{pipeline}: dependencies on code written anew")


def with_code(text: str, root: Path) -> str:
    """dvc.yaml with each stage's dependencies on code replaced by its import closure; comments and data stay.

    A retrained method is a module of its own, which that method's stage depends on besides; what any of them imports
    all of them depend on.
    """
    yaml = _round_trip()
    content = yaml.load(text)
    for stage in content["stages"].values():
        if "cmd" not in stage:  # inherits all from another by an anchor
            continue
        module = str(stage["cmd"]).split()[2]
        listed = stage["deps"]
        data = [dep for dep in listed if not str(dep).endswith(".py")]
        own = [dep for dep in listed if str(dep).endswith(".py") and "${" in str(dep)]
        shared = {each for dep in own for each in _shared_by(Path(str(dep)).parent, root)}
        listed[:] = [*data, *sorted({*code_of(module, root), *shared}), *own]
    written = io.StringIO()
    yaml.dump(content, written)
    return written.getvalue()


def _shared_by(folder: Path, root: Path) -> set[str]:
    """What the modules of a folder import, relative to `root`: each is loaded by its name, so that none is followed."""
    modules = {file.relative_to(root).as_posix() for file in (root / folder).glob("*.py")}
    imported: set[str] = set()
    for each in modules:
        imported |= set(code_of(each.removesuffix(".py").replace("/", "."), root)) - {each}
    return imported


def _round_trip() -> Any:
    from ruamel.yaml import YAML

    yaml = YAML(pure=True)  # keeps comments
    yaml.width = 1000  # and lines
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.preserve_quotes = True
    return yaml


def _vars(pipeline: Path) -> list[Any]:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        text = pipeline.read_text(encoding="utf-8")
        head = text.partition("\nstages:")[0]  # a tenth of the file, which every stage reads
        loaded = YAML(typ="safe", pure=True).load(head if re.search(r"^vars:", head, re.MULTILINE) else text)
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError, YAMLError) as error:
        raise InputError(f"{pipeline}: cannot be read ({error}); restore it with `git checkout {pipeline}`") from error
    found = loaded.get("vars") if isinstance(loaded, dict) else None
    return found if isinstance(found, list) else []


def _files_of(module: str, root: Path) -> Iterator[Path]:
    """The file of a module and those of the packages that importing it runs."""
    parts = module.split(".")
    for n in range(1, len(parts) + 1):
        path = root.joinpath(*parts[:n])
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.is_file():
                yield file


def _imports(file: Path, root: Path) -> Iterator[Path]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in _running(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            if name.split(".")[0] in FLOORS:
                yield from _files_of(name, root)


def _running(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those under `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING":
            continue
        yield child
        yield from _running(child)
