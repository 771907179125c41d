"""Own pictures against other readers of the same files: torchvision, tifffile, pydicom, pandas, numpy."""

import hashlib
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from lvlmva_core.arrays import read_array, read_attrs
from lvlmva_core.datasets import write_dataset
from lvlmva_core.datasets.decode import BadFileError, Decoding, read_any, to_eight_bits
from lvlmva_core.datasets.draw import draw_splits, joined_units
from lvlmva_core.datasets.folder import Folder
from lvlmva_core.datasets.pictures import read_picture
from lvlmva_core.samples import groups_known, read_samples
from tests.pictures import CLASSES, WRITERS, scene, write_excel_csv, write_folder


def _bytes(folder: Path) -> dict[str, str]:
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.mark.parametrize("place", range(len(WRITERS)))
def test_every_format_and_mode_is_the_scene_that_was_saved(tmp_path: Path, place: int) -> None:
    suffix, write = WRITERS[place]
    file = tmp_path / f"a{suffix}"
    original = scene(1, 3)
    write(original.copy(), file)
    side = min(original.size)
    left, top = (original.width - side) // 2, (original.height - side) // 2
    square = original.crop((left, top, left + side, top + side))
    grey = read_any(file, Decoding(side)).pixels
    assert grey.shape == (1, side, side)
    assert np.abs(grey[0].astype(int) - np.asarray(square.convert("L")).astype(int)).mean() < 4
    if write.__name__ != "_sixteen_bit" and place not in (1, 3):  # those that kept the colours
        colour = read_any(file, Decoding(side, colour=True)).pixels
        assert np.abs(colour.astype(int) - np.asarray(square).transpose(2, 0, 1).astype(int)).mean() < 10


@pytest.mark.parametrize(
    ("name", "lossless"), [("a.png", True), ("a.jpg", False), ("a.webp", True), ("turned.jpg", False)]
)
@pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")
def test_pixels_are_those_that_torchvision_reads(tmp_path: Path, name: str, lossless: bool) -> None:
    from torchvision.io import ImageReadMode, decode_image

    image = scene(0, 7).crop((0, 0, 36, 36))
    if name == "turned.jpg":
        WRITERS[10][1](image, tmp_path / name)
    else:
        image.save(tmp_path / name, **({"lossless": True} if name.endswith("webp") else {}))
    expected = decode_image(str(tmp_path / name), ImageReadMode.RGB, apply_exif_orientation=True).numpy()
    found = read_any(tmp_path / name, Decoding(36, colour=True)).pixels
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= (0 if lossless else 3)


def test_a_picture_is_read_as_the_other_data_sets_read_it(tmp_path: Path) -> None:
    scene(0, 1).save(tmp_path / "a.png")
    for colour in (False, True):
        expected = read_picture(tmp_path / "a.png", 24, colour=colour)
        np.testing.assert_array_equal(read_any(tmp_path / "a.png", Decoding(24, colour=colour)).pixels, expected)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bits_become_eight_as_the_setting_says(tmp_path: Path, suffix: str) -> None:
    import tifffile

    values = np.random.default_rng(0).integers(100, 4096, (20, 20)).astype(np.uint16)
    file = tmp_path / f"a{suffix}"
    if suffix == ".tif":
        tifffile.imwrite(file, values)
    else:
        Image.fromarray(values).save(file)
    exact = values.astype(np.float64)
    for how, expected in (
        ("full_range", exact / 257),
        ("per_picture", (exact - exact.min()) / (exact.max() - exact.min()) * 255),
        ((0.0, 4095.0), exact / 4095 * 255),
        ((1000.0, 2000.0), np.clip((exact - 1000) / 1000, 0, 1) * 255),
    ):
        found = read_any(file, Decoding(20, sixteen_bit=how))  # type: ignore[arg-type]
        assert found.largest == values.max()
        assert np.abs(found.pixels[0] - expected).max() <= 0.5 + 1e-4


def test_colour_of_sixteen_bits_is_its_upper_eight(tmp_path: Path) -> None:
    import tifffile

    values = np.random.default_rng(0).integers(0, 65535, (16, 16, 3)).astype(np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="rgb")
    found = read_any(tmp_path / "a.tif", Decoding(16, colour=True)).pixels
    np.testing.assert_array_equal(found, (values >> 8).transpose(2, 0, 1))
    with pytest.raises(BadFileError, match=r"colour of 16 bits .*full_range alone; save it with 8 bits"):
        read_any(tmp_path / "a.tif", Decoding(16, colour=True, sixteen_bit="per_picture"))


def test_values_that_are_not_of_sixteen_bits_are_refused_rather_than_cut() -> None:
    with pytest.raises(BadFileError, match=r"values 0 to 70000 are not a 16-bit picture's"):
        to_eight_bits(np.array([[0, 70000]]), "full_range")
    assert to_eight_bits(np.array([[5, 5]]), "per_picture").tolist() == [[0.0, 0.0]]


def test_crop_pad_and_stretch_against_numpy(tmp_path: Path) -> None:
    pixels = np.full((20, 40), 200, np.uint8)
    pixels[:, :10], pixels[:, 30:] = 50, 90
    Image.fromarray(pixels).save(tmp_path / "a.png")
    crop = read_any(tmp_path / "a.png", Decoding(20, "crop")).pixels[0]
    np.testing.assert_array_equal(crop, pixels[:, 10:30])
    padded = read_any(tmp_path / "a.png", Decoding(40, "pad", background=7)).pixels[0]
    np.testing.assert_array_equal(padded, np.pad(pixels, ((10, 10), (0, 0)), constant_values=7))
    plain = np.full((20, 40), 200, np.uint8)
    Image.fromarray(plain).save(tmp_path / "b.png")
    np.testing.assert_array_equal(
        read_any(tmp_path / "b.png", Decoding(16, "stretch")).pixels[0], np.full((16, 16), 200)
    )
    half = read_any(tmp_path / "b.png", Decoding(16, "pad", background=9)).pixels[0]
    np.testing.assert_array_equal(half, np.pad(np.full((8, 16), 200), ((4, 4), (0, 0)), constant_values=9))


def test_what_is_transparent_shows_the_background(tmp_path: Path) -> None:
    pixels = np.full((16, 16, 4), 100, np.uint8)
    pixels[..., 3] = 0
    pixels[4:12, 4:12, 3] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    expected = np.full((16, 16), 255)
    expected[4:12, 4:12] = 100
    np.testing.assert_array_equal(read_any(tmp_path / "a.png", Decoding(16, background=255)).pixels[0], expected)


@pytest.mark.parametrize("top", [1, 255])
def test_a_mask_goes_the_way_of_its_picture(tmp_path: Path, top: int) -> None:
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (32, 64)).astype(np.uint8)).save(tmp_path / "a.png")
    mask = rng.random((32, 64)) < 0.5
    Image.fromarray(np.where(mask, top, 0).astype(np.uint8)).save(tmp_path / "m.png")
    found = read_any(tmp_path / "a.png", Decoding(16), tmp_path / "m.png").mask
    blocks = mask[:, 16:48].reshape(16, 2, 16, 2).mean(axis=(1, 3))
    np.testing.assert_array_equal(found, blocks >= 0.5)


def _dicom(file: Path, values: np.ndarray, **elements: Any) -> None:
    import pydicom
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = FileDataset(str(file), {}, file_meta=meta, preamble=b"\0" * 128)
    signed = values.dtype.kind == "i"
    data.Rows, data.Columns = values.shape[-2:] if values.ndim < 4 else values.shape[1:3]
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 12, 11, int(signed)
    data.PixelData = values.astype("<i2" if signed else "<u2").tobytes()
    for name, value in elements.items():
        setattr(data, name, value)
    data.save_as(file, enforce_file_format=True)
    assert isinstance(pydicom.dcmread(file), pydicom.Dataset)


def test_dicom_modality_then_window_then_monochrome1_last(tmp_path: Path) -> None:
    stored = np.random.default_rng(0).integers(0, 4096, (24, 24)).astype(np.uint16)
    _dicom(tmp_path / "a.dcm", stored, RescaleSlope=2, RescaleIntercept=-1024, WindowCenter=40.0, WindowWidth=400.0)
    units = stored * 2.0 - 1024
    # PS3.3 C.11.2.1.2.1, written down
    expected = np.clip((units - (40 - 0.5)) / (400 - 1) + 0.5, 0, 1) * 255
    found = read_any(tmp_path / "a.dcm", Decoding(24)).pixels[0]
    assert np.abs(found - expected).max() <= 0.5 + 1e-3
    _dicom(
        tmp_path / "b.dcm",
        stored,
        PhotometricInterpretation="MONOCHROME1",
        RescaleSlope=2,
        RescaleIntercept=-1024,
        WindowCenter=40.0,
        WindowWidth=400.0,
    )
    turned = read_any(tmp_path / "b.dcm", Decoding(24)).pixels[0]
    assert np.abs(turned - (255 - expected)).max() <= 0.5 + 1e-3


def test_dicom_without_a_window_uses_its_own_range_or_the_setting(tmp_path: Path) -> None:
    stored = np.random.default_rng(1).integers(-1000, 2000, (24, 24)).astype(np.int16)
    _dicom(tmp_path / "a", stored)  # without an ending, as scanners write them
    found = read_any(tmp_path / "a", Decoding(24)).pixels[0]
    exact = stored.astype(np.float64)
    assert np.abs(found - (exact - exact.min()) / np.ptp(exact) * 255).max() <= 0.5 + 1e-3
    found = read_any(tmp_path / "a", Decoding(24, sixteen_bit=(0.0, 1000.0))).pixels[0]
    assert np.abs(found - np.clip(exact / 1000, 0, 1) * 255).max() <= 0.5 + 1e-3


def test_dicom_with_a_table_and_with_frames(tmp_path: Path) -> None:
    from pydicom.dataset import Dataset as DicomDataset
    from pydicom.sequence import Sequence

    stored = np.arange(256, dtype=np.uint16).reshape(16, 16)
    item = DicomDataset()
    item.LUTDescriptor = [256, 0, 12]
    table = (np.sqrt(np.arange(256) / 255) * 4095).astype(int)
    item.add_new(0x00283006, "US", table.tolist())
    _dicom(tmp_path / "a.dcm", stored, VOILUTSequence=Sequence([item]))
    found = read_any(tmp_path / "a.dcm", Decoding(16)).pixels[0]
    assert np.abs(found - table.reshape(16, 16) / 4095 * 255).max() <= 0.5 + 1e-3
    _dicom(tmp_path / "f.dcm", np.zeros((3, 16, 16), np.uint16), NumberOfFrames=3)
    with pytest.raises(BadFileError, match=r"DICOM with 3 frames \(multi-frame\); export the frame"):
        read_any(tmp_path / "f.dcm", Decoding(16))
    content = (tmp_path / "a.dcm").read_bytes()
    (tmp_path / "a.dcm").write_bytes(content[:-300])
    with pytest.raises(BadFileError, match=r"DICOM whose picture cannot be decoded .*; export it uncompressed"):
        read_any(tmp_path / "a.dcm", Decoding(16))


def test_class_folders_are_those_of_torchvision(tmp_path: Path) -> None:
    from torchvision.datasets import ImageFolder

    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("valid", 4), ("test", 6)):
        for place in range(count):
            file = tmp_path / split / str(2 + 8 * (place % 2)) / f"{place}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (20, 20, 3)).astype(np.uint8)).save(file)
    found = Folder(root=str(tmp_path), image_size=20, seed=0).prepare()
    for split, name in (("train", "train"), ("valid", "val"), ("test", "test")):
        official = ImageFolder(str(tmp_path / split))
        rows = np.flatnonzero(found.samples["split"] == name)
        assert found.class_names == official.classes == ["10", "2"]
        of_path = {str(Path(path).relative_to(tmp_path)): (path, label) for path, label in official.samples}
        assert set(found.samples["id"].iloc[rows]) == set(of_path)
        for row in rows:
            path, label = of_path[found.samples["id"].iloc[row]]
            assert found.samples["label"].iloc[row] == label
            np.testing.assert_array_equal(found.images[row].transpose(1, 2, 0), official.loader(path))


def test_a_tree_without_splits_and_one_class_folder_alone(tmp_path: Path) -> None:
    for name in ("a", "b"):
        for place in range(10):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.new("L", (16, 16), place * 10 + len(name) + ord(name[0])).save(tmp_path / name / f"{place}.png")
    found = Folder(root=str(tmp_path), image_size=16, seed=0).prepare()
    assert found.samples.groupby(["split", "label"]).size().unstack().to_numpy().tolist() == [[2, 2], [7, 7], [1, 1]]


def test_medmnist_is_what_numpy_loads(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    content = {}
    for split, count in (("train", 70), ("val", 14), ("test", 13)):
        content[f"{split}_images"] = rng.integers(0, 255, (count, 28, 28, 3)).astype(np.uint8)
        content[f"{split}_labels"] = (np.arange(count) % 12)[:, None]
    np.savez_compressed(tmp_path / "x.npz", **content)
    found = Folder(root=str(tmp_path / "x.npz"), image_size=28, seed=0).prepare()
    assert found.class_names == [str(k) for k in range(12)]  # 10 after 9, not after 1
    for split in ("train", "val", "test"):
        rows = np.flatnonzero(found.samples["split"] == split)
        np.testing.assert_array_equal(found.images[rows].transpose(0, 2, 3, 1), content[f"{split}_images"])
        np.testing.assert_array_equal(found.samples["label"].iloc[rows], content[f"{split}_labels"].ravel())


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixed")
    rows = write_folder(folder, 36)
    write_excel_csv(folder / "t.csv", rows, ["filename", "label", "spurious", "patient"])
    return folder


def test_written_in_parts_it_is_what_is_in_memory_whatever_the_workers(mixed: Path, tmp_path: Path) -> None:
    chosen: dict[str, Any] = {"root": str(mixed), "table": "t.csv", "image_size": 32, "seed": 3}
    for name, workers in (("one", 1), ("many", 9)):
        out = tmp_path / name
        Folder(**chosen, workers=workers).write(out / "images.zarr", out / "samples.parquet", out / "masks.zarr")
    whole = Folder(**chosen).prepare()
    out = tmp_path / "whole"
    write_dataset(whole, out / "images.zarr", out / "samples.parquet", out / "masks.zarr")
    assert _bytes(tmp_path / "one") == _bytes(tmp_path / "many") == _bytes(out)
    table = read_samples(tmp_path / "one" / "samples.parquet")
    assert table["id"].tolist() == sorted(table["id"])
    assert [hashlib.sha256(image.tobytes()).hexdigest() for image in whole.images] == table["sha256"].tolist()
    assert whole.class_names == sorted(CLASSES)
    source = pd.read_csv(mixed / "t.csv", sep=";").set_index("filename").loc[table["source"]]
    assert [whole.class_names[k] for k in table["label"]] == source["label"].tolist()
    assert table["spurious"].tolist() == (source["spurious"] == 1).tolist()
    assert (
        source.groupby("patient").apply(lambda rows: table.set_index("id").loc[rows.index, "split"].nunique()) == 1
    ).all()
    assert groups_known(table)


def test_files_that_are_left_out_are_counted_and_named(
    mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = pd.read_csv(mixed / "t.csv", sep=";")
    table.loc[5, "filename"] = "nirgends.png"
    table.drop(columns=["spurious"]).to_csv(tmp_path / "t.csv", index=False)
    chosen = Folder(root=str(mixed), table=str(tmp_path / "t.csv"), image_size=32, seed=0, on_bad_file="leave_out")
    chosen.write(tmp_path / "images.zarr", tmp_path / "samples.parquet", tmp_path / "masks.zarr")
    assert read_attrs(tmp_path / "images.zarr")["left_out"] == {"nirgends.png": "no such file; put it there"}
    assert "left out: 1 files that cannot be used" in capsys.readouterr().err
    samples = read_samples(tmp_path / "samples.parquet")
    assert len(samples) == len(table) - 1 == len(read_array(tmp_path / "images.zarr", "images"))
    assert not groups_known(samples)
    assert samples["spurious"].isna().all()


def test_masks_are_known_where_they_are_given_or_nothing_is_there(mixed: Path, tmp_path: Path) -> None:
    table = pd.read_csv(mixed / "t.csv", sep=";", dtype=str)
    (tmp_path / "pictures").mkdir()
    mask = np.zeros((48, 48), np.uint8)
    mask[:12, :12] = 255
    rng = np.random.default_rng(0)
    for place in range(len(table)):
        file = f"{place:02d}.png"
        Image.fromarray(rng.integers(0, 255, (48, 48)).astype(np.uint8)).save(tmp_path / "pictures" / file)
        table.loc[place, "filename"] = file
    Image.fromarray(mask).save(tmp_path / "pictures" / "corner.png")
    table["mask_path"] = [
        "corner.png" if value == "1" and place % 3 else "" for place, value in enumerate(table["spurious"])
    ]
    table.to_csv(tmp_path / "t.csv", index=False)
    found = Folder(root=str(tmp_path / "pictures"), table=str(tmp_path / "t.csv"), image_size=16, seed=0).prepare()
    given = (table["mask_path"] != "").to_numpy()
    np.testing.assert_array_equal(found.known, given | (table["spurious"] == "0").to_numpy())
    expected = np.zeros((16, 16), bool)
    expected[:4, :4] = True
    for row in range(len(table)):
        np.testing.assert_array_equal(found.spurious_masks[row], expected & given[row])


def test_pictures_with_the_same_pixels_are_drawn_into_one_split(mixed: Path, tmp_path: Path) -> None:
    table = pd.read_csv(mixed / "t.csv", sep=";")[["filename", "label"]]
    copies = table.iloc[:30].assign(filename=[f"kopie {name}" for name in table["filename"].iloc[:30]])
    for name in table["filename"]:
        (tmp_path / name).write_bytes((mixed / name).read_bytes())
    for copy, name in zip(copies["filename"], table["filename"], strict=False):
        (tmp_path / copy).write_bytes((mixed / name).read_bytes())
    pd.concat([table, copies]).to_csv(tmp_path / "t.csv", index=False)
    samples = Folder(root=str(tmp_path), table="t.csv", image_size=32, seed=0).prepare().samples
    assert samples["sha256"].duplicated().sum() == 30
    assert (samples.groupby("sha256")["split"].nunique() == 1).all()


def test_a_name_composed_in_the_table_and_decomposed_on_the_disk(tmp_path: Path) -> None:
    import unicodedata

    Image.new("L", (16, 16)).save(tmp_path / unicodedata.normalize("NFD", "Käse.png"))
    assert read_any(tmp_path / unicodedata.normalize("NFC", "Käse.png"), Decoding(16)).pixels.shape == (1, 16, 16)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 30)), min_size=30, max_size=120), st.integers(0, 9))
def test_units_are_never_parted_and_every_sample_gets_a_split(rows: list[tuple[int, int]], seed: int) -> None:
    labels, units = (np.array(column) for column in zip(*rows, strict=True))
    split = draw_splits(labels, units, {"train": 0.7, "val": 0.1, "test": 0.2}, seed)
    assert pd.DataFrame({"unit": units, "split": split}).groupby("unit")["split"].nunique().eq(1).all()
    assert set(split) <= {"train", "val", "test"}
    np.testing.assert_array_equal(split, draw_splits(labels, units, {"train": 0.7, "val": 0.1, "test": 0.2}, seed))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(20, 200), min_size=2, max_size=5), st.integers(0, 99))
def test_without_patients_each_class_has_its_shares_to_within_a_picture(sizes: list[int], seed: int) -> None:
    labels = np.repeat(np.arange(len(sizes)), sizes)
    shares = {"train": 0.6, "val": 0.15, "test": 0.25}
    split = draw_splits(labels, np.arange(len(labels)), shares, seed)
    for name, share in shares.items():
        for k, size in enumerate(sizes):
            assert abs(((split == name) & (labels == k)).sum() - share * size) <= 1


@pytest.mark.parametrize("seed", range(8))
def test_a_drawn_split_is_as_even_as_the_best_of_all(seed: int) -> None:
    rng = np.random.default_rng(seed)
    units = np.repeat(np.arange(8), rng.integers(1, 6, 8))
    labels = rng.integers(0, 2, 8)[units]
    shares = {"train": 0.5, "val": 0.25, "test": 0.25}
    sizes = np.array([[((units == unit) & (labels == k)).sum() for k in (0, 1)] for unit in range(8)])
    wanted = np.outer(list(shares.values()), sizes.sum(axis=0))

    def unevenness(choice: Any) -> float:
        got = np.array([sizes[np.array(choice) == place].sum(axis=0) for place in range(3)])
        return float(np.abs(got - wanted).max())

    best = min(unevenness(choice) for choice in itertools.product(range(3), repeat=8))
    split = draw_splits(labels, units, shares, seed)
    first = [list(shares).index(split[np.flatnonzero(units == unit)[0]]) for unit in range(8)]
    assert unevenness(first) <= best + sizes.max()


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.one_of(st.none(), st.integers(0, 6)), st.integers(0, 9)), min_size=1, max_size=25))
def test_units_are_the_connected_components(rows: list[tuple[int | None, int]]) -> None:
    patients, pixels = zip(*rows, strict=True)
    edges = [
        (i, j)
        for i, j in itertools.combinations(range(len(rows)), 2)
        if pixels[i] == pixels[j] or (patients[i] is not None and patients[i] == patients[j])
    ]
    graph = coo_matrix(
        ([1] * len(edges), tuple(zip(*edges, strict=True)) if edges else ([], [])), (len(rows), len(rows))
    )
    expected = connected_components(graph, directed=False)[1]
    found = joined_units(patients, pixels)
    np.testing.assert_array_equal(found[:, None] == found, expected[:, None] == expected)
