"""Pictures on an object store: what `prepare.root` names there, as a local copy that is downloaded once."""

import errno
import hashlib
import os
import secrets
import shutil
import sys
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from lvlmva.hydrate import open_store
from lvlmva_core.errors import InputError
from lvlmva_core.progress import track

if TYPE_CHECKING:
    from lvlmva_core.datasets.settings import PrepareSettings

Prepare = TypeVar("Prepare", bound="PrepareSettings")

EXTRAS = {"s3": "s3", "gs": "gs", "az": "azure", "abfs": "azure"}  # scheme -> of this package
TAGS = ("ETag", "etag", "md5Hash", "LastModified", "last_modified", "updated")  # what tells versions of an object apart
AT_ONCE = 64  # files of one download


def with_local_root(prepare: Prepare) -> Prepare:
    """The settings of a data set with a local copy in the place of a `root` on an object store.

    Raises:
        InputError: as for `local_copy`.
    """
    if prepare.root is None or "://" not in prepare.root:
        return prepare
    return prepare.model_copy(update={"root": str(local_copy(prepare.root))})


def local_copy(address: str) -> Path:
    """The folder or file at s3://, gs:// or az://, as it is there now.

    Objects are downloaded once, by their ETag, into `pictures` in the store's folder; a download that was broken off
    goes on. A changed or new object is the only one that is fetched again.

    Raises:
        InputError: nothing is there, it cannot be read, or the library of its scheme is not installed.
    """
    parts = urlsplit(address)
    extra = EXTRAS.get(parts.scheme)
    if extra is None:
        raise InputError(
            f"prepare.root: expected a folder, an archive, or {', '.join(EXTRAS)}://, not {parts.scheme}://"
        )
    if "@" in parts.netloc or ":" in parts.netloc or parts.query:
        raise InputError("prepare.root: an address holds no user and no key; docs/data.md says where they go")
    name = f"{parts.scheme}://{parts.netloc}{parts.path}".rstrip("/")
    try:
        import fsspec

        files, path = fsspec.url_to_fs(address, skip_instance_cache=True, use_listings_cache=False)
        found = files.find(path, detail=True)
    except ImportError as error:
        raise InputError(f"prepare.root: {name}: needs more packages: pip install 'lvlmva[{extra}]'") from error
    except Exception as error:  # noqa: BLE001 - each store's library has errors of its own, with words that may hold a key
        raise _unreadable(name, error) from None
    listed = {_below(path, each): about for each, about in found.items() if about["type"] == "file"}
    listed = {below: about for below, about in listed.items() if not below.endswith("/")}  # of a folder itself
    if not listed:
        raise InputError(f"prepare.root: {name}: nothing is there; expected a folder with pictures, or an archive")
    folder = open_store().root / "pictures"
    wanted = {below: _version(name, below, about) for below, about in sorted(listed.items())}
    whole = hashlib.sha256("\n".join(f"{version} {below}" for below, version in wanted.items()).encode()).hexdigest()
    tree = folder / whole[:16]
    if not tree.is_dir():
        absent = [below for below, version in wanted.items() if not _object(folder, version).exists()]
        sys.stderr.write(f"{name}: {len(wanted)} files, {len(absent)} to download into {folder}\n")
        for first in track(range(0, len(absent), AT_ONCE), "download"):
            group = absent[first : first + AT_ONCE]
            sizes = [int(listed[below]["size"]) for below in group]
            sources = [f"{path.rstrip('/')}/{below}" if below else path for below in group]
            try:
                _download(files, sources, sizes, [_object(folder, wanted[below]) for below in group])
            except InputError:
                raise
            except Exception as error:  # see above
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise
                raise _unreadable(name, error) from None
        _lay_out(folder, wanted, tree, PurePosixPath(path).name)
    only = tree / PurePosixPath(path).name
    return only if set(wanted) == {""} else tree


def _below(path: str, file: str) -> str:
    """The name of a file below a path, "" for the path itself. Raises InputError where it leads elsewhere."""
    folder = path.rstrip("/")
    below = PurePosixPath(file.removeprefix(folder).lstrip("/"))
    if (file != path and not file.startswith(f"{folder}/")) or ".." in below.parts or "\\" in str(below):
        raise InputError(f"{path}: holds an object '{file}', whose name leads elsewhere; rename it")
    return "" if not below.parts else str(below) + ("/" if file.endswith("/") else "")


def _version(name: str, below: str, about: dict[str, Any]) -> str:
    tag = next((str(about[tag]) for tag in TAGS if about.get(tag)), "")
    return hashlib.sha256(f"{name}\n{below}\n{tag}\n{about['size']}".encode()).hexdigest()


def _object(folder: Path, version: str) -> Path:
    return folder / "objects" / version[:2] / version


def _download(files: Any, sources: list[str], sizes: list[int], targets: list[Path]) -> None:
    """Fetch files; each has its name only when it is whole."""
    building = [target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp") for target in targets]
    try:
        for target in targets:
            target.parent.mkdir(parents=True, exist_ok=True)
        files.get(sources, [str(each) for each in building])
        for source, size, temporary, target in zip(sources, sizes, building, targets, strict=True):
            if temporary.stat().st_size != size:
                raise InputError(f"{source}: changed or broke off while it was downloaded; repeat the command")
            temporary.replace(target)
    finally:
        for temporary in building:
            temporary.unlink(missing_ok=True)


def _lay_out(folder: Path, wanted: dict[str, str], tree: Path, name: str) -> None:
    """A folder with the files under their names, whole at any moment: hard links to the objects."""
    building = tree.with_name(f".{tree.name}.{secrets.token_hex(4)}")
    try:
        for below, version in wanted.items():
            target = building / (below or name)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(_object(folder, version), target)
        if not tree.is_dir():
            building.rename(tree)
    except OSError as error:
        raise InputError(f"{tree}: cannot be written ({error.strerror}); set LVLMVA_STORE to another folder") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _unreadable(name: str, error: Exception) -> InputError:
    known: dict[type[Exception], str] = {
        FileNotFoundError: "no such bucket, or nothing there",
        PermissionError: "not with these credentials",
    }
    reason = known.get(type(error), type(error).__name__)
    return InputError(f"prepare.root: {name}: cannot be read ({reason}); see docs/data.md, 'On an object store'")
