"""What is wrong with folders and tables in practice: each a line that names the file or row, and the remedy."""

import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from pydantic import ValidationError

from lvlmva_core.datasets.folder import Folder
from lvlmva_core.errors import InputError


class Case:
    """A folder of 24 pictures in two classes and three splits, and its table, to be spoilt."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.settings: dict[str, Any] = {"root": str(folder), "table": "t.csv", "image_size": 16, "seed": 0}
        self.rows: list[list[str]] = []
        rng = np.random.default_rng(0)
        for place in range(24):
            name = f"p{place:02d}.png"
            Image.fromarray(rng.integers(0, 255, (20, 18)).astype(np.uint8)).save(folder / name)
            split = "val" if place % 6 < 2 else "test" if place % 6 < 4 else "train"
            self.rows.append([name, "ab"[place % 2], split])
        self.header = ["path", "label", "split"]

    def add(self, column: str, values: Callable[[int], str]) -> None:
        """A column more."""
        self.header.append(column)
        for place, row in enumerate(self.rows):
            row.append(values(place))

    def cell(self, row: int, column: str, value: str) -> None:
        """Another value; rows as an editor counts them."""
        self.rows[row - 2][self.header.index(column)] = value

    def save(self) -> None:
        """Write the table."""
        lines = [self.header, *self.rows]
        (self.folder / "t.csv").write_text("".join(",".join(line) + "\n" for line in lines), encoding="utf-8")

    def prepare(self) -> None:
        """Read it all."""
        Folder(**self.settings).prepare()


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


def _png(width: int, height: int) -> bytes:
    """Header and no pixels: what a decoder believes before it decodes."""
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(b"\0" * 10)), (b"IEND", b"")]
    packed = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def _bytes(name: str, content: bytes) -> Callable[[Case], None]:
    return lambda case: (case.folder / name).write_bytes(content) and None  # type: ignore[func-returns-value]


def _no_file(case: Case) -> None:
    (case.folder / "p03.png").unlink()


def _other_case(case: Case) -> None:
    (case.folder / "p03.png").rename(case.folder / "P03.PNG")


def _is_folder(case: Case) -> None:
    (case.folder / "p03.png").unlink()
    (case.folder / "p03.png").mkdir()


def _truncated(case: Case) -> None:
    content = (case.folder / "p03.png").read_bytes()
    (case.folder / "p03.png").write_bytes(content[: len(content) // 2])


def _frames(case: Case) -> None:
    frames = [Image.fromarray(np.full((20, 20), value, np.uint8)) for value in (1, 99, 200)]
    frames[0].save(case.folder / "p03.tif", save_all=True, append_images=frames[1:])
    case.cell(5, "path", "p03.tif")


def _float_tiff(case: Case) -> None:
    Image.fromarray(np.linspace(-1, 1, 400, dtype=np.float32).reshape(20, 20)).save(case.folder / "p03.tif")
    case.cell(5, "path", "p03.tif")


def _not_finite(case: Case) -> None:
    Image.fromarray(np.full((20, 20), np.nan, np.float32)).save(case.folder / "p03.tif")
    case.cell(5, "path", "p03.tif")
    case.settings["sixteen_bit"] = "per_picture"


def _mask_of_another_size(case: Case) -> None:
    Image.new("L", (5, 5)).save(case.folder / "m.png")
    case.add("mask_path", lambda place: "m.png" if place == 3 else "")


def _no_mask(case: Case) -> None:
    case.add("mask_path", lambda place: "m.png" if place == 3 else "")


def _not_dicom(case: Case) -> None:
    (case.folder / "p03.dcm").write_bytes(b"no dicom" * 40)
    case.cell(5, "path", "p03.dcm")


FILES: list[tuple[str, Callable[[Case], None], str]] = [
    ("missing", _no_file, r"p03\.png: no such file; put it there"),
    ("in other letters", _other_case, r"p03\.png: no such file \(there is 'P03\.PNG'\); mend its name"),
    ("a folder", _is_folder, r"p03\.png: is a folder, not a picture"),
    ("zero bytes", _bytes("p03.png", b""), r"p03\.png: empty file \(0 bytes\); copy it again"),
    ("text", _bytes("p03.png", b"hello"), r"p03\.png: not a picture .*; remove or convert it"),
    ("a web page", _bytes("p03.png", b"<!doctype html><html>404</html>"), r"p03\.png: not a picture"),
    ("cut off", _truncated, r"p03\.png: not a readable picture .*; copy or export it again"),
    ("0x0", _bytes("p03.png", _png(0, 0)), r"p03\.png: not a picture .*; remove or convert it"),
    (
        "too wide",
        _bytes("p03.png", _png(40_000, 20)),
        r"p03\.png: 40000x20 pixels, more than 30000 a side.*make it small",
    ),
    ("too large", _bytes("p03.png", _png(20_000, 20_000)), r"p03\.png: more than 100 million pixels; make it smaller"),
    ("a bomb", _bytes("p03.png", _png(29_999, 29_999)), r"p03\.png: more than 100 million pixels; make it smaller"),
    ("several pages", _frames, r"p03\.tif: holds 3 pictures \(frames, pages\); save the one that is meant"),
    ("floating point", _float_tiff, r"p03\.tif: values -1 to 1 .*set prepare\.sixteen_bit to \[low, high\]"),
    ("not finite", _not_finite, r"p03\.tif: holds values that are not finite"),
    ("mask of another size", _mask_of_another_size, r"p03\.png: 18x20 pixels, but its mask 'm\.png' has 5x5"),
    ("mask missing", _no_mask, r"p03\.png: its mask 'm\.png': no such file"),
    ("DICOM by name alone", _not_dicom, r"p03\.dcm: not a DICOM file, though it is named as one"),
]


@pytest.mark.filterwarnings("ignore:Image size:PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("spoil", "message"), [each[1:] for each in FILES], ids=[each[0] for each in FILES])
def test_a_file_that_cannot_be_used(case: Case, spoil: Callable[[Case], None], message: str) -> None:
    spoil(case)
    case.save()
    with pytest.raises(InputError, match=message) as caught:
        case.prepare()
    assert "\n" not in str(caught.value)
    assert "1 of 24 files cannot be used (or set prepare.on_bad_file: leave_out" in str(caught.value)
    case.settings["on_bad_file"] = "leave_out"
    assert len(Folder(**case.settings).prepare().samples) == 23


def _set(row: int, column: str, value: str) -> Callable[[Case], None]:
    return lambda case: case.cell(row, column, value)


def _all(column: str, value: str) -> Callable[[Case], None]:
    def spoil(case: Case) -> None:
        for row in range(2, 26):
            case.cell(row, column, value)

    return spoil


def _settings(**settings: Any) -> Callable[[Case], None]:
    return lambda case: case.settings.update(settings)


def _head(*names: str) -> Callable[[Case], None]:
    return lambda case: case.header.__setitem__(slice(None), names)


def _with(column: str, values: Callable[[int], str], **settings: Any) -> Callable[[Case], None]:
    def spoil(case: Case) -> None:
        case.add(column, values)
        case.settings.update(settings)

    return spoil


def _raw(content: bytes) -> Callable[[Case], None]:
    def spoil(case: Case) -> None:
        case.settings["table"] = "raw.csv"
        (case.folder / "raw.csv").write_bytes(content)

    return spoil


def _copied(case: Case) -> None:
    (case.folder / "p02.png").write_bytes((case.folder / "p00.png").read_bytes())  # test and val


def _doubled_with_another_label(case: Case) -> None:
    case.rows.append(["p03.png", "a", "test"])


def _unlabelled_split(case: Case) -> None:
    for row in case.rows:
        if row[2] == "val" and row[1] == "a":
            row[2] = "train"


def _few(case: Case) -> None:
    case.rows = [row for row in case.rows if row[1] == "a"] + [["p01.png", "b", ""], ["p05.png", "b", ""]]
    case.settings["columns"] = {"split": False}


def _bad_parquet(case: Case) -> None:
    (case.folder / "t.parquet").write_bytes(b"PAR1 no")
    case.settings["table"] = "t.parquet"


def _numbers(case: Case) -> None:
    for place, row in enumerate(case.rows):
        row[1] = f"{place / 7:.4f}"


TABLES: list[tuple[str, Callable[[Case], None], str]] = [
    ("no table", _settings(table="x.csv"), r"x\.csv: no such table; set prepare\.table"),
    ("a spreadsheet", _settings(table="x.xlsx"), r"x\.xlsx: a spreadsheet; save it as CSV"),
    ("damaged parquet", _bad_parquet, r"t\.parquet: not a readable parquet table"),
    ("an empty table", _raw(b""), r"raw\.csv: empty file; save the table again"),
    ("header alone", _raw(b"path,label\n"), r"raw\.csv: no rows below the header"),
    ("binary", _raw(b"path,label\n\0\1\2"), r"raw\.csv: not text \(it holds zero bytes\)"),
    ("cut UTF-16", _raw("\ufeffpath;label".encode("utf-16-le") + b"\xd8"), r"raw\.csv: damaged utf-16 text"),
    ("open quote", _raw(b'path,label\n"a.png,x\nb.png,y\n'), r"raw\.csv, row \d: not valid CSV .*mend its quotes"),
    ("ragged", _raw(b"path,label\na.png,x\nb.png,y,z\n"), r"raw\.csv, row 3: 3 values for 2 columns"),
    ("two columns of a name", _head("path", "label", "label"), r"t\.csv: two columns are named 'label'; rename one"),
    ("no column of files", _head("picture", "label", "split"), r"t\.csv: no column for the file .*there are: picture"),
    (
        "no column of labels",
        _head("path", "grade", "split"),
        r"t\.csv: no column for the label .*prepare\.columns\.label",
    ),
    ("two candidates", _head("path", "label", "y"), r"columns 'label' and 'y' could each be the label"),
    (
        "a column that is not there",
        _settings(columns={"split": "fold"}),
        r"columns\.split: no column 'fold'; there are",
    ),
    ("one column twice", _settings(columns={"split": "label"}), r"the column 'label' stands for two things"),
    ("no path", _set(4, "path", ""), r"t\.csv: no value for 'path' in row 4; fill it in"),
    ("no label", _set(7, "label", " "), r"t\.csv: no value for 'label' in row 7"),
    ("no split", _set(7, "split", ""), r"t\.csv: no value for 'split' in row 7"),
    (
        "dots out of the folder",
        _set(5, "path", "../p03.png"),
        r"row 5: '\.\./p03\.png' leaves the folder .*without '\.\.'",
    ),
    ("an absolute path", _set(5, "path", "/etc/passwd"), r"row 5: '/etc/passwd' leaves the folder"),
    ("another drive", _set(5, "path", "C:\\pictures\\p03.png"), r"row 5: 'C:\\pictures\\p03\.png' leaves the folder"),
    ("a row twice", _set(6, "path", "p03.png"), r"row 5 and row 6: both name 'p03\.png', with the labels 'a' and 'b'"),
    ("a file with two labels", _doubled_with_another_label, r"row 5 and row 26: both name 'p03\.png', with the labels"),
    ("one class", _all("label", "a"), r"all pictures have the label 'a'; two classes are needed"),
    ("labels that differ in case", _set(2, "label", "A"), r"the labels 'A' and 'a' differ in case alone; write them"),
    ("numbers as labels", _numbers, r"24 different labels in 24 rows .*is it the label"),
    ("a label that is not wanted", _settings(classes=["a", "c"]), r"row 3: the label 'b' is none of prepare\.classes"),
    (
        "a wanted class without pictures",
        _settings(classes=["a", "b", "c"]),
        r"no picture has the label 'c' .*remove it",
    ),
    ("an odd split", _set(3, "split", "holdout"), r"row 3: 'holdout' is no split; expected train, val, test"),
    ("no test split", _all("split", "train"), r"the split 'test' has no picture .*prepare\.columns\.split: false"),
    ("a split without a class", _unlabelled_split, r"class 'a' has no picture in the split 'val'; add some"),
    ("too few to draw", _few, r"class 'b' has no picture in the split 'train'; it has 2 pictures"),
    (
        "the same pixels in two splits",
        _copied,
        r"1 pictures have the same pixels .*'p00\.png' \(val\) and 'p02\.png' \(test",
    ),
    (
        "a patient in two splits",
        _with("patient", lambda place: f"P{place // 4}"),
        r"row 2: patient 'P0' is in 'val' and, in row 4, in 'test' \(6 such patients\); leave each",
    ),
    (
        "groups of many values",
        _with("group", lambda place: str(place % 4)),
        r"row 4: '2' does not say whether the spurious feature is in the picture \(values: 0, 1, 2, 3\); write 1 or 0",
    ),
    (
        "a value of groups that does not occur",
        _with("a", lambda place: "land", spurious_value="water"),
        r"spurious_value = 'water' stands in no row; values: land",
    ),
    ("no folder", _settings(root="/nowhere"), r"/nowhere: no such folder or archive; set prepare\.root"),
    ("no root", _settings(root=None), r"prepare\.root is null"),
]


@pytest.mark.parametrize(("spoil", "message"), [each[1:] for each in TABLES], ids=[each[0] for each in TABLES])
def test_a_table_that_cannot_be_meant(case: Case, spoil: Callable[[Case], None], message: str) -> None:
    spoil(case)
    case.save()
    with pytest.raises(InputError, match=message) as caught:
        case.prepare()
    assert "\n" not in str(caught.value)


def test_a_further_test_split_may_show_what_test_shows(case: Case) -> None:
    case.add("patient", lambda place: f"P{place}")
    (case.folder / "p03.png").write_bytes((case.folder / "p02.png").read_bytes())
    (case.folder / "again.png").write_bytes((case.folder / "p02.png").read_bytes())
    case.rows = [row for row in case.rows if row[0] != "p03.png"] + [["again.png", "a", "test_again", "P2"]]
    case.save()
    found = Folder(**case.settings).prepare().samples
    assert found.set_index("id").loc[["again.png", "p02.png"], "sha256"].nunique() == 1


def test_all_bad_files_are_named_in_one_go(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    for place in range(24):
        (case.folder / f"p{place:02d}.png").write_bytes(b"")
    case.save()
    with pytest.raises(InputError, match=r"24 of 24 files cannot be used \(all 24 are bad\).*and 4 more, listed above"):
        case.prepare()
    said = capsys.readouterr().err
    assert all(f"p{place:02d}.png: empty file" in said for place in range(24))


def test_nothing_is_lost_by_a_mistake(case: Case, tmp_path: Path) -> None:
    case.save()
    outputs = tmp_path / "out" / "images.zarr", tmp_path / "out" / "samples.parquet", tmp_path / "out" / "masks.zarr"
    Folder(**case.settings).write(*outputs)
    before = {file: file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()}
    (case.folder / "p00.png").write_bytes(b"")
    with pytest.raises(InputError, match="1 of 24 files"):
        Folder(**case.settings).write(*outputs)
    assert {file: file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()} == before


TREES: list[tuple[str, list[str], list[str], str]] = [
    ("no class folders", ["a.png"], [], r"no class folders in it but pictures; expected <class>/<picture>"),
    ("nothing at all", [], [], r"no class folders in it; expected <class>/<picture>"),
    ("an empty class", ["a/1.png"], ["b"], r"b: the folder of this class holds no picture; add some or remove it"),
    ("an empty split", ["train/a/1.png", "train/b/2.png"], ["test"], r"test: no class folders in it"),
    ("loose pictures", ["a/1.png", "b/2.png", "3.png"], [], r"3\.png: lies beside the class folders; move it"),
    ("splits beside classes", ["train/a/1.png", "dog/2.png"], [], r"folders of splits and others \('dog'\)"),
    ("two names of a split", ["val/a/1.png", "valid/a/2.png"], [], r"two folders stand for one split \(val, valid\)"),
]


@pytest.mark.parametrize(("files", "empty", "message"), [each[1:] for each in TREES], ids=[each[0] for each in TREES])
def test_a_tree_that_cannot_be_meant(tmp_path: Path, files: list[str], empty: list[str], message: str) -> None:
    for folder in empty:
        (tmp_path / folder).mkdir(parents=True)
    for place, file in enumerate(files):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), place).save(tmp_path / file)
    with pytest.raises(InputError, match=message):
        Folder(root=str(tmp_path), image_size=16, seed=0).prepare()


def _npz(path: Path, **changes: Any) -> None:
    content: dict[str, Any] = {}
    for split in ("train", "val", "test"):
        content[f"{split}_images"] = np.zeros((4, 28, 28), np.uint8)
        content[f"{split}_labels"] = np.array([[0], [1], [0], [1]])
    content |= changes
    np.savez(path, **{name: value for name, value in content.items() if value is not None})


NPZ: list[tuple[str, dict[str, Any], str]] = [
    ("a part is missing", {"val_labels": None}, r"no 'val_labels' in it \(there are: .*; expected MedMNIST's layout"),
    (
        "volumes",
        {"train_images": np.zeros((4, 28, 28, 28), np.uint8)},
        r"'train_images' has the shape \(4, 28, 28, 28\)",
    ),
    ("floats", {"train_images": np.zeros((4, 28, 28))}, r"'train_images' is of float64; expected uint8"),
    ("several labels", {"test_labels": np.zeros((4, 14), int)}, r"14 labels a picture; sets with one label"),
    ("fewer labels", {"test_labels": np.zeros((3, 1), int)}, r"4 pictures but 3 labels in 'test'"),
    ("objects", {"train_labels": np.array([object()] * 4)}, r"'train_labels' cannot be read .*only plain numbers are"),
    ("words", {"train_labels": np.array(["a"] * 4)}, r"'train_labels' is of <U1; expected whole numbers"),
]


@pytest.mark.parametrize(("changes", "message"), [each[1:] for each in NPZ], ids=[each[0] for each in NPZ])
def test_an_npz_that_is_none_of_medmnist(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    _npz(tmp_path / "x.npz", **changes)
    with pytest.raises(InputError, match=message):
        Folder(root=str(tmp_path / "x.npz"), image_size=28, seed=0).prepare()
    (tmp_path / "x.npz").write_bytes(b"no zip")
    with pytest.raises(InputError, match=r"not a readable npz file"):
        Folder(root=str(tmp_path / "x.npz"), image_size=28, seed=0).prepare()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"shares": {"train": 0.9, "val": 0.1, "test": 0.1}},
            "train, val and test must each be above 0 and add up to 1",
        ),
        ({"sixteen_bit": [5.0, 5.0]}, "the first of the two values must be the smaller"),
        ({"classes": ["a", "a"]}, "each name must stand there once"),
        ({"file_pattern": "images/x.jpg"}, "should match pattern"),
        ({"image_size": 8}, "greater than or equal to 16"),
    ],
)
def test_settings_that_cannot_be_meant(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Folder(**{"root": "x", "image_size": 32, "seed": 0, **settings})


def test_a_table_of_excel_and_one_of_pandas_say_the_same(case: Case, tmp_path: Path) -> None:
    for row in case.rows:
        row[1] = {"a": "gut artig", "b": "böse, sehr"}[row[1]]
    table = pd.DataFrame(case.rows, columns=case.header)
    table.to_parquet(tmp_path / "t.parquet")
    found = {}
    for name, separator, encoding, end in (
        ("utf8", ",", "utf-8", "\n"),
        ("excel", ";", "utf-8-sig", "\r\n"),
        ("tabs", "\t", "utf-16", "\r\n"),
        ("latin", ";", "latin-1", "\r\n"),
    ):
        table.to_csv(tmp_path / f"{name}.csv", sep=separator, encoding=encoding, index=False, lineterminator=end)
        found[name] = Folder(**{**case.settings, "table": f"{name}.csv"}).prepare()
    expected = Folder(**{**case.settings, "table": "t.parquet"}).prepare()
    assert expected.class_names == ["böse, sehr", "gut artig"]
    for each in found.values():
        assert each.class_names == expected.class_names
        pd.testing.assert_frame_equal(each.samples, expected.samples)
