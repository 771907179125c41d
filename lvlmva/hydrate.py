"""Where the store lies, and what of it is committed: earlier outputs, from DVC's cache or its remote.

The core takes records and knows no DVC; this module is the bridge. Whatever was committed anywhere in the history
(branches, remotes' branches, tags, experiments, the other side of a merge) was paid for or computed by someone.
"""

import contextlib
import json
import logging
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lvlmva_core.errors import InputError
from lvlmva_core.store import HYDRATED, Store

log = logging.getLogger(__name__)

_OTHER_HEADS = ("HEAD", "MERGE_HEAD", "CHERRY_PICK_HEAD", "REBASE_HEAD", "ORIG_HEAD")


class UnhydratedError(InputError):
    """A committed output could not be fetched, so that what it holds might be bought or computed again."""


def open_store() -> Store:
    """The store of this project: `LVLMVA_STORE` if set, else `lvlmva-store` beside DVC's cache folder.

    DVC's cache folder is the main repository's even in the temporary workspace of an experiment.

    Raises:
        InputError: the variable is not set and the current folder belongs to no DVC project, or it is no folder.
    """
    chosen = os.environ.get("LVLMVA_STORE")
    if chosen and "://" in chosen:
        raise InputError(
            "LVLMVA_STORE is a folder on this machine; the store that several machines share, behind the folder, is "
            "named by LVLMVA_SHARED_STORE=s3://bucket/prefix"
        )
    if chosen:
        return Store(Path(chosen).expanduser().resolve())
    root = _dvc_root()
    if root is None:
        raise InputError(f"{Path.cwd()}: not in a DVC project; set LVLMVA_STORE to a folder, or run `dvc init`")
    return Store(_cache_folder(root).parent / "lvlmva-store")


def committed_versions(out: str, store: Store, *, required: bool = False) -> Iterator[Path]:
    """Yield a local copy of each distinct committed version of a DVC output that `store` has not taken in yet.

    A copy lives until the next one is asked for; by then its version counts as taken in, and is not yielded again.
    Yields nothing, at no cost, outside a git repository or where no dvc.lock was ever committed.

    Args:
        out: the output as dvc.yaml names it, a file or a folder, e.g. "data/critiques.jsonl".
        store: where the caller puts what it reads.
        required: whether a version that cannot be fetched is an error (something would be paid for) or a warning.

    Raises:
        UnhydratedError: only if `required`: the default remote cannot be reached, or lacks the version at HEAD.
    """
    root = _dvc_root()
    if root is None:
        return
    project, name, cache = _main_project(root), _relative(out, root), None
    for version, commit, at_head in _versions(project, root, name):
        mark = store.root / HYDRATED / version
        if mark.exists():
            continue
        cache = cache or _cache_folder(root)
        with tempfile.TemporaryDirectory(prefix="lvlmva-") as folder:
            copy = Path(folder) / Path(out).name
            try:
                if not _from_cache(cache, version, copy):
                    _from_remote(project, name, commit, copy)
            except FileNotFoundError:
                message = f"{out} of commit {commit[:9] or '(none)'} is in neither DVC's cache nor the remote"
                if required and at_head:
                    raise UnhydratedError(f"{message}; ask whoever made it for a `dvc push`, {_OPT_OUT}") from None
                log.warning(f"warning: {message}; what it holds may be computed again")
                continue
            except UnhydratedError as error:
                if required:
                    raise
                log.warning(f"warning: {error}")
                return
            yield copy
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()


@contextlib.contextmanager
def version_at_head(out: str) -> Iterator[Path | None]:
    """A local copy of an output as it is committed at HEAD, or None where there is none or it cannot be fetched."""
    root = _dvc_root()
    if root is None:
        yield None
        return
    project, name = _main_project(root), _relative(out, root)
    version, commit, at_head = next(_versions(project, root, name), ("", "", False))
    with tempfile.TemporaryDirectory(prefix="lvlmva-") as folder:
        copy = Path(folder) / Path(out).name
        with contextlib.suppress(FileNotFoundError, UnhydratedError):  # said by committed_versions, should it matter
            if at_head and not _from_cache(_cache_folder(root), version, copy):
                _from_remote(project, name, commit, copy)
        yield copy if copy.exists() else None


_OPT_OUT = "or set allow_unhydrated: true to pay again for what it may hold"


def _dvc_root() -> Path | None:
    for folder in (Path.cwd(), *Path.cwd().parents):
        if (folder / ".dvc").is_dir():
            return folder
    return None


def _main_project(root: Path) -> Path:
    """The project itself, where `root` is an experiment's temporary workspace `<project>/.dvc/tmp/exps/...`."""
    for folder in root.parents:
        if folder.name == ".dvc":
            return folder.parent
    return root


def _cache_folder(root: Path) -> Path:
    from dvc.config import Config

    chosen = Config(str(root / ".dvc"))["cache"]  # `Repo` knows it too, but takes ten times as long to open
    if "local" in chosen:  # an old form: the name of a remote in the place of a folder
        from dvc.repo import Repo

        with Repo(str(root)) as repo:
            return Path(repo.cache.local_cache_dir).resolve()
    return Path(chosen.get("dir", root / ".dvc" / "cache")).resolve()


def _relative(out: str, root: Path) -> str:
    """`out` relative to the project, as dvc.lock has it."""
    path = (Path.cwd() / out).resolve()
    return path.relative_to(root.resolve()).as_posix() if path.is_relative_to(root.resolve()) else out


def _versions(project: Path, root: Path, out: str) -> Iterator[tuple[str, str, bool]]:
    """Distinct (digest, newest commit that has it or "", whether HEAD has it) of an output in all dvc.lock files.

    The working tree's file counts as well: what it names is in the cache even before it is committed.
    """
    seen: set[str] = set()
    head = _git(root, "rev-parse", "--verify", "--quiet", "HEAD").strip()
    for commit, text in _lock_files(project, root):
        version = _digest_in(text, out)
        if version is not None and version not in seen:
            seen.add(version)
            yield version, commit, commit != "" and commit == head


def _lock_files(project: Path, root: Path) -> Iterator[tuple[str, str]]:
    head = _git(root, "rev-parse", "--verify", "--quiet", "HEAD").strip()
    if head:
        others = [name for name in _OTHER_HEADS if _git(project, "rev-parse", "--verify", "--quiet", name)]
        # a merge that took one side drops the other from a simplified history, and with it what that side paid for
        commits = _git(project, "rev-list", "--all", "--full-history", *others, "--", "dvc.lock").split()
        for commit in dict.fromkeys([head, *commits]):
            text = _git(root if commit == head else project, "show", f"{commit}:./dvc.lock")
            if text:
                yield commit, text
    for folder in dict.fromkeys((root, project)):  # last: a version that is committed as well can be fetched
        file = folder / "dvc.lock"
        if file.is_file():
            yield "", file.read_text(encoding="utf-8", errors="replace")


def _digest_in(lock_file: str, out: str) -> str | None:
    """The digest of an output in the text of a dvc.lock; None where it is not there or its stage is in conflict."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    # one stage at a time: there is a lock for every commit of the history, and few stages name the output
    for text in re.split(r"^(?=  \S)", lock_file, flags=re.MULTILINE):
        if out not in text:
            continue
        try:
            (stage,) = YAML(typ="safe", pure=True).load(text).values()
            outs = stage.get("outs", [])
        except (YAMLError, ValueError, AttributeError):
            continue  # conflict markers: both sides are commits of their own
        for entry in outs:
            if entry.get("path") == out and isinstance(entry.get("md5"), str):
                return str(entry["md5"])
    return None


def _from_cache(cache: Path, version: str, copy: Path) -> bool:
    """Link a version out of DVC's cache to `copy`; False where the cache lacks any of it."""
    source = _object(cache, version)
    if not source.is_file():
        return False
    if not version.endswith(".dir"):
        copy.symlink_to(source)
        return True
    entries = json.loads(source.read_text(encoding="utf-8"))
    if not all(_object(cache, entry["md5"]).is_file() for entry in entries):
        return False
    for entry in entries:
        target = (copy / entry["relpath"]).resolve()
        if not target.is_relative_to(copy.resolve()):
            raise InputError(f"{source}: names a path outside its folder ({entry['relpath']})")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(_object(cache, entry["md5"]))
    return True


def _object(cache: Path, version: str) -> Path:
    return cache / "files" / "md5" / version[:2] / version[2:]


def _from_remote(project: Path, out: str, commit: str, copy: Path) -> None:
    """Fetch an output of a commit from the project's default remote.

    Raises:
        FileNotFoundError: there is no default remote, or it lacks the output.
        UnhydratedError: the remote cannot be reached.
    """
    from dvc.api import DVCFileSystem
    from dvc.repo import Repo

    with Repo(str(project)) as repo:
        name = repo.config["core"].get("remote")
        remote: dict[str, Any] = dict(repo.config["remote"].get(name, {})) if name else {}
    if not name or not commit:
        raise FileNotFoundError(out)
    url = str(remote.get("url", ""))
    if "://" not in url and not Path(url).is_dir():
        raise UnhydratedError(f"DVC remote '{name}' cannot be reached (no folder {url}); mend it, {_OPT_OUT}")
    try:
        # today's remote, whatever remote the project had at that commit
        files = DVCFileSystem(str(project), rev=commit, config={"core": {"remote": name}, "remote": {name: remote}})
        files.get(out, str(copy), recursive=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # each kind of remote raises errors of its own library
        reason = " ".join(str(error).split())[:200]
        raise UnhydratedError(f"DVC remote '{name}' cannot be reached ({reason}); mend it, {_OPT_OUT}") from error
    if not copy.exists():
        raise FileNotFoundError(out)


def _git(project: Path, *arguments: str) -> str:
    """Output of a git command, or "" where it fails (no repository, no such name, no git)."""
    try:
        done = subprocess.run(["git", "-C", str(project), *arguments], capture_output=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.decode("utf-8", "replace") if done.returncode == 0 else ""
