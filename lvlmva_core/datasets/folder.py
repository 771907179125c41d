"""Your own pictures: a folder with a table, a tree of class folders, or a MedMNIST file (an extension)."""

import hashlib
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import numpy as np
from pydantic import AfterValidator, Field, model_validator

from lvlmva_core.arrays import SHARD_ROWS, ArrayWriter, write_table
from lvlmva_core.datasets import Dataset, attrs_of, sample_table
from lvlmva_core.datasets.decode import DICOM_SUFFIXES, BadFileError, Decoding, Fit, Picture, has_colour, read_any
from lvlmva_core.datasets.draw import draw_splits, joined_units
from lvlmva_core.datasets.pictures import opened
from lvlmva_core.datasets.settings import PrepareSettings
from lvlmva_core.datasets.tables import (
    ENOUGH,
    Listed,
    classes_of,
    files_below,
    listed_tree,
    masks_below,
    read_listed,
    splits_of,
    spurious_of,
)
from lvlmva_core.errors import InputError
from lvlmva_core.progress import track
from lvlmva_core.settings import Settings, Share

if TYPE_CHECKING:
    import pandas as pd


T = TypeVar("T")
R = TypeVar("R")
NEEDED = ("train", "val", "test")


def _rising(ends: list[float]) -> list[float]:
    if not ends[0] < ends[1]:
        raise ValueError("the first of the two values must be the smaller")
    return ends


Window = Annotated[
    list[Annotated[float, Field(allow_inf_nan=False)]], Field(min_length=2, max_length=2), AfterValidator(_rising)
]
ColumnName = Annotated[str, Field(min_length=1)] | Literal[False] | None


class Columns(Settings):
    """Names of the table's columns: null looks for the usual ones, false says that there is none."""

    file: ColumnName = None
    label: ColumnName = None
    split: ColumnName = None
    spurious: ColumnName = None
    mask: ColumnName = None
    patient: ColumnName = None


class Shares(Settings):
    """Of each class, where no column says the split."""

    train: Share = 0.7
    val: Share = 0.1
    test: Share = 0.2

    @model_validator(mode="after")
    def _add_up(self) -> "Shares":
        if abs(self.train + self.val + self.test - 1) > 1e-6 or min(self.train, self.val, self.test) <= 0:
            raise ValueError("train, val and test must each be above 0 and add up to 1")
        return self


class Folder(PrepareSettings):
    """Pictures of yours.

    root: a folder, a tar archive, or a MedMNIST npz. table: CSV or parquet, its paths below root; null = class folders.
    columns: its columns. file_pattern: what stands around a value of the file's column, e.g. "images/{}.jpg".

    classes: names in the order of the logits; null = sorted. spurious_value: the value that means that the spurious
    feature is in the picture; null = 1, true or yes. spurious_feature: what it is, in words, for reports.

    image_size, fit, sixteen_bit, background: `lvlmva_core.datasets.decode.Decoding`. channels: "auto" is grey where
    every picture is.

    shares: of drawn splits. on_bad_file: "leave_out" goes on without files that cannot be used, and counts them.
    workers: files decoded at once, null = one a CPU; it changes no byte.
    """

    dataset: Literal["folder"] = "folder"
    name: Annotated[str, Field(min_length=1)] = "folder"
    table: str | None = None
    columns: Columns = Field(default_factory=Columns)
    file_pattern: Annotated[str, Field(pattern=r"\{\}")] | None = None
    classes: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=2)] | None = None
    spurious_value: str | None = None
    spurious_feature: Annotated[str, Field(min_length=1)] = "not named"
    image_size: Annotated[int, Field(ge=16, le=1024)]
    fit: Fit = "crop"
    channels: Literal["auto", "grey", "colour"] = "auto"
    sixteen_bit: Literal["full_range", "per_picture"] | Window = "full_range"
    background: Annotated[int, Field(ge=0, le=255)] = 0
    shares: Shares = Field(default_factory=Shares)
    on_bad_file: Literal["stop", "leave_out"] = "stop"
    workers: Annotated[int, Field(ge=1, le=256)] | None = None

    @model_validator(mode="after")
    def _a_class_is_named_once(self) -> "Folder":
        if self.classes is not None and len(set(self.classes)) < len(self.classes):
            raise ValueError("classes: each name must stand there once")
        return self

    def prepare(self) -> Dataset:
        """The data set in memory; `write` needs no more than a few pictures of it."""
        blocks: list[Block] = []
        source = self._read(blocks.append)
        pixels, masks, known = (np.concatenate(parts) for parts in zip(*(b.arrays() for b in blocks), strict=True))
        return Dataset(self.name, source.class_names, self.spurious_feature, pixels, source.samples, masks, known)

    def write(self, images: Path, samples: Path, spurious_masks: Path) -> None:
        """Write block by block: memory does not grow with the number of pictures."""
        with ArrayWriter(images) as pixels, ArrayWriter(spurious_masks) as masks:

            def keep(block: Block) -> None:
                pixels.append({"images": block.pixels})
                masks.append({"spurious_masks": block.masks, "known": block.known})

            source = self._read(keep)
            attrs: dict[str, Any] = attrs_of(self.name, source.class_names, self.spurious_feature)
            if source.left_out:
                attrs["left_out"] = source.left_out
            pixels.attrs = masks.attrs = attrs
        write_table(samples, source.samples)

    def _read(self, keep: "Callable[[Block], None]") -> "_Finished":
        """Check the table, then pass the pictures on in blocks, then make the table of those that could be used."""
        root = self.folder()
        if root.suffix.lower() == ".npz":
            from lvlmva_core.datasets.medmnist import listed_npz, pictures_of

            if self.table is not None:
                raise InputError(f"prepare.table = '{self.table}': {root} holds its own labels; set it to null")
            found = listed_npz(root)
            plan = self._plan(found.listed, found.ids, [None] * len(found.ids))
            how = self._how(found.colour if self.channels == "auto" else self.channels == "colour")
            return self._finished(plan, *self._kept(plan, pictures_of(root, how), keep))
        # `opened` would enter a single folder, which may be the only class or split
        with nullcontext(root) if root.is_dir() else opened(root) as folder:
            plan = self._listed(folder)
            workers = self.workers or min(os.cpu_count() or 1, 16)
            with ThreadPoolExecutor(workers) as pool:
                return self._finished(plan, *self._kept(plan, self._decoded(folder, plan, pool, workers), keep))

    def _listed(self, folder: Path) -> "_Plan":
        if self.table is None:
            listed = listed_tree(folder)
        else:
            path = Path(self.table).expanduser()
            inside = folder / self.table
            listed = read_listed(inside if inside.is_file() and not path.is_file() else path, self.columns.model_dump())
        files, masks = files_below(folder, listed, self.file_pattern), masks_below(folder, listed)
        order = np.argsort(files.to_numpy(dtype=str), kind="stable")
        by_id = replace(
            listed,
            table=listed.table.iloc[order].reset_index(drop=True),
            where=[listed.where[row] for row in order],
        )
        return self._plan(by_id, [files[row] for row in order], [masks[row] for row in order])

    def _plan(self, listed: Listed, ids: list[str], masks: list[str | None]) -> "_Plan":
        """All that can be said, and refused, before a picture is opened."""
        names, labels = classes_of(listed, self.classes)
        splits, notes = splits_of(listed)
        patients: list[str | None] = [None] * len(ids)
        if listed.has("patient"):
            patients = [value or None for value in listed.table["patient"]]
        if splits is not None:
            _never_in_two_splits(splits, patients, listed)
        spurious = spurious_of(listed, self.spurious_value)
        nothing = np.zeros(len(ids), dtype=bool)
        if listed.has("mask") and spurious is not None:
            nothing = ~spurious
        return _Plan(ids, masks, names, labels, splits, spurious, nothing, patients, [*listed.notes, *notes])

    def _how(self, colour: bool) -> Decoding:
        window = self.sixteen_bit if isinstance(self.sixteen_bit, str) else (self.sixteen_bit[0], self.sixteen_bit[1])
        return Decoding(self.image_size, self.fit, colour, window, self.background)

    def _decoded(
        self, folder: Path, plan: "_Plan", pool: ThreadPoolExecutor, workers: int
    ) -> "Iterator[Picture | BadFileError]":
        paths = [folder / file for file in plan.ids]
        if any(path.suffix.lower() in DICOM_SUFFIXES for path in paths):
            from lvlmva_core.datasets.dicom import need_pydicom

            need_pydicom()
        colour = self.channels == "colour"
        if self.channels == "auto":
            found = [kind for kind in _ahead(pool, has_colour, paths, workers) if kind is not None]
            colour = any(found)
            plan.notes.append(
                f"pictures are read as {'colour' if colour else 'grey'}: {sum(found)} of {len(found)} hold colour "
                "(prepare.channels changes it)"
            )
        masks = [None if mask is None else folder / mask for mask in plan.masks]
        return _ahead(pool, partial(_one, self._how(colour)), list(zip(paths, masks, strict=True)), workers)

    def _kept(
        self, plan: "_Plan", pictures: "Iterable[Picture | BadFileError]", keep: "Callable[[Block], None]"
    ) -> tuple[list[int], list[str], dict[str, str], float]:
        """Rows that could be used, digests of their pixels, the bad files, and the largest value of 16 bits."""
        kept: list[int] = []
        digests: list[str] = []
        bad: dict[str, str] = {}
        largest = 0.0
        block = Block()
        for row, picture in enumerate(track(pictures, "prepare", total=len(plan.ids))):
            if isinstance(picture, BadFileError):
                bad[plan.ids[row]] = str(picture)
                continue
            if bad and self.on_bad_file == "stop":
                continue  # nothing will be written; the others are only looked at
            block.add(picture, known=picture.mask is not None or bool(plan.nothing[row]))
            kept.append(row)
            digests.append(hashlib.sha256(picture.pixels.tobytes()).hexdigest())
            largest = max(largest, picture.largest)
            if len(block) == SHARD_ROWS:
                keep(block)
                block = Block()
        if bad and (self.on_bad_file == "stop" or not kept):
            _refuse(bad, len(plan.ids), str(self.root))
        if len(block):
            keep(block)
        return kept, digests, bad, largest

    def _finished(
        self, plan: "_Plan", kept: list[int], digests: list[str], bad: dict[str, str], largest: float
    ) -> "_Finished":
        """Splits are drawn last, since only then it is known which pictures have the same pixels."""
        ids, label = [plan.ids[row] for row in kept], plan.labels[kept]
        _every_class_is_left(label, plan.class_names, bad)
        units = joined_units(digests, [plan.patients[row] for row in kept])
        split, drawn = self._splits(None if plan.splits is None else plan.splits[kept], label, units)
        _no_picture_in_two_splits(split, digests, ids)
        _every_class_in_every_split(split, label, plan.class_names, drawn)
        notes = [*plan.notes, *_notes(split, drawn, digests, label, bad, largest, self.sixteen_bit)]
        sys.stderr.write("".join(f"prepare: {note}\n" for note in notes))
        spurious = None if plan.spurious is None else plan.spurious[kept]
        return _Finished(
            plan.class_names, sample_table(plan.class_names, ids, split, label, spurious, ids, digests), bad
        )

    def _splits(self, given: np.ndarray | None, label: np.ndarray, units: np.ndarray) -> tuple[np.ndarray, list[str]]:
        """Split of each sample, and the splits that were drawn."""
        shares = self.shares.model_dump()
        if given is None:
            return draw_splits(label, units, shares, self.seed), list(NEEDED)
        if "train" not in given or "test" not in given:
            lacking = "train" if "train" not in given else "test"
            raise InputError(
                f"the split '{lacking}' has no picture (there are: {', '.join(sorted(set(given)))}); add it, or set "
                "prepare.columns.split: false so that splits are drawn"
            )
        if "val" in given:
            return given, []
        split, rows = given.astype("<U64"), np.flatnonzero(given == "train")
        part = shares["val"] / (shares["train"] + shares["val"])
        split[rows] = draw_splits(label[rows], units[rows], {"train": 1 - part, "val": part}, self.seed)
        return split, ["val"]


@dataclass(frozen=True)
class _Plan:
    """Pictures that are to be read, by rising id (their paths below the folder).

    masks: paths below the folder. labels: int64 (N,). splits: (N,), None where they are to be drawn. spurious: bool
    (N,), None where nobody knows. nothing: bool (N,), True where the feature is known to be nowhere. notes: for the
    user.
    """

    ids: list[str]
    masks: list[str | None]
    class_names: list[str]
    labels: np.ndarray
    splits: np.ndarray | None
    spurious: np.ndarray | None
    nothing: np.ndarray
    patients: list[str | None]
    notes: list[str]


@dataclass(frozen=True)
class _Finished:
    class_names: list[str]
    samples: "pd.DataFrame"
    left_out: Mapping[str, str]


@dataclass
class Block:
    """Some samples, up to a shard of them."""

    pictures: list[Picture] = field(default_factory=list)
    is_known: list[bool] = field(default_factory=list)

    def add(self, picture: Picture, known: bool) -> None:
        """Add a sample."""
        self.pictures.append(picture)
        self.is_known.append(known)

    def __len__(self) -> int:
        return len(self.pictures)

    @property
    def pixels(self) -> np.ndarray:
        """uint8 (n, C, H, W)."""
        return np.stack([picture.pixels for picture in self.pictures])

    @property
    def masks(self) -> np.ndarray:
        """bool (n, H, W), nowhere True where no mask is known."""
        shape = self.pictures[0].pixels.shape[1:]
        return np.stack([np.zeros(shape, dtype=bool) if p.mask is None else p.mask for p in self.pictures])

    @property
    def known(self) -> np.ndarray:
        """bool (n,)."""
        return np.array(self.is_known, dtype=bool)

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """pixels, masks, known."""
        return self.pixels, self.masks, self.known


def _one(how: Decoding, paths: tuple[Path, Path | None]) -> Picture | BadFileError:
    try:
        return read_any(paths[0], how, paths[1])
    except BadFileError as error:
        return error


def _ahead(pool: ThreadPoolExecutor, function: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """`map` in threads and in order, with a bounded number of results waiting (decoders release the interpreter)."""
    waiting: deque[Any] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > 4 * workers:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _refuse(bad: Mapping[str, str], total: int, root: str) -> None:
    """Name all bad files: each on a line of its own, and the first of them in the one line of the error."""
    sys.stderr.write("".join(f"prepare: {name}: {reason}\n" for name, reason in bad.items()))
    named = "; ".join(f"{name}: {reason}" for name, reason in list(bad.items())[:ENOUGH])
    more = f"; and {len(bad) - ENOUGH} more, listed above" if len(bad) > ENOUGH else ""
    way = f"all {total} are bad" if len(bad) == total else "or set prepare.on_bad_file: leave_out to go on without them"
    raise InputError(f"{root}: {len(bad)} of {total} files cannot be used ({way}): {named}{more}")


def _never_in_two_splits(split: np.ndarray, patients: list[str | None], listed: Listed) -> None:
    import pandas as pd

    split = _with_tests_as_one(split)
    frame = pd.DataFrame({"patient": patients, "split": split}).dropna()
    several = frame.groupby("patient")["split"].nunique()
    several = several[several > 1]
    if len(several):
        first = several.index[0]
        rows = [row for row, patient in enumerate(patients) if patient == first]
        other = next(row for row in rows if split[row] != split[rows[0]])
        raise InputError(
            f"{listed.where[rows[0]]}: patient '{first}' is in '{split[rows[0]]}' and, in "
            f"{listed.where[other].rsplit(', ', 1)[-1]}, in '{split[other]}' ({len(several)} such patients); leave "
            "each patient's pictures in one split, or set prepare.columns.split: false so that splits are drawn"
        )


def _every_class_is_left(label: np.ndarray, names: list[str], bad: Mapping[str, str]) -> None:
    gone = [name for k, name in enumerate(names) if not (label == k).any()]
    if gone:
        raise InputError(f"class '{gone[0]}': all of its pictures are among the {len(bad)} left out; mend them")


def _with_tests_as_one(split: np.ndarray) -> np.ndarray:
    """Further test splits may show what `test` shows: nothing is learned from any of them."""
    return np.where(np.char.startswith(split, "test_"), "test", split)


def _no_picture_in_two_splits(split: np.ndarray, digests: list[str], ids: list[str]) -> None:
    split = _with_tests_as_one(split)
    first: dict[str, int] = {}
    found = []
    for row, digest in enumerate(digests):
        other = first.setdefault(digest, row)
        if split[other] != split[row]:
            found.append(f"'{ids[other]}' ({split[other]}) and '{ids[row]}' ({split[row]})")
    if found:
        more = f" and {len(found) - ENOUGH} more" if len(found) > ENOUGH else ""
        raise InputError(
            f"{len(found)} pictures have the same pixels as one of another split: {', '.join(found[:ENOUGH])}{more}; "
            "leave one of each out, or set prepare.columns.split: false so that splits are drawn"
        )


def _every_class_in_every_split(split: np.ndarray, label: np.ndarray, names: list[str], drawn: list[str]) -> None:
    for wanted in NEEDED:
        for k, name in enumerate(names):
            if not ((split == wanted) & (label == k)).any():
                total = int((label == k).sum())
                remedy = (
                    f"it has {total} pictures, of too few patients for three splits; add some, or leave the class out"
                    if drawn
                    else "add some, or set prepare.columns.split: false so that splits are drawn"
                )
                raise InputError(f"class '{name}' has no picture in the split '{wanted}'; {remedy}")


def _notes(
    split: np.ndarray,
    drawn: list[str],
    digests: list[str],
    label: np.ndarray,
    bad: Mapping[str, str],
    largest: float,
    sixteen_bit: Any,
) -> list[str]:
    import pandas as pd

    counts = ", ".join(f"{name} {int((split == name).sum())}" for name in dict.fromkeys([*NEEDED, *sorted(set(split))]))
    notes = [f"{len(split)} pictures: {counts}{' (drawn: ' + ', '.join(drawn) + ')' if drawn else ''}"]
    if bad:
        notes += [f"left out: {name}: {reason}" for name, reason in bad.items()]
        notes.append(f"left out: {len(bad)} files that cannot be used")
    frame = pd.DataFrame({"digest": digests, "label": label})
    again = int(frame["digest"].duplicated().sum())
    if again:
        contradictory = int((frame.groupby("digest")["label"].nunique() > 1).sum())
        notes.append(
            f"{again} pictures have the same pixels as another of their split"
            + (f", and {contradictory} of these carry different labels" if contradictory else "")
        )
    if 0 < largest < 2**14 and sixteen_bit == "full_range":
        notes.append(
            f"the largest value of the 16-bit pictures is {largest:g}: read as 0..65535 they are dark; "
            f"prepare.sixteen_bit: [0, {2 ** int(largest).bit_length() - 1}] uses what they have"
        )
    return notes
