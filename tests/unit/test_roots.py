"""prepare.root on an object store: what comes is what is there, once, whole or not at all."""

import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lvlmva.roots import local_copy, with_local_root
from lvlmva_core.datasets.folder import Folder
from lvlmva_core.errors import InputError
from tests.s3 import BUCKET, S3, SECRET, Proxy

pytest.importorskip("s3fs", reason="the extra s3 is not installed")
pytest.importorskip("moto", reason="the S3 server of these tests is not installed")


@pytest.fixture
def address(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder of the bucket that is this test's own."""
    for name, value in s3.variables().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LVLMVA_STORE", str(tmp_path / "store"))
    return f"s3://{BUCKET}/{tmp_path.name}"


def _put(s3: S3, folder: str, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        s3.client().put_object(Bucket=BUCKET, Key=f"{folder}/{name}", Body=content)


def _content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_comes_as_it_is_and_only_what_changes_is_fetched_again(
    s3: S3, address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"train/0/a.png": b"a" * 1000, "train/1/b c.png": b"b", "table.csv": b"file,label\n"}
    _put(s3, tmp_path.name, {**files, "empty/": b""})
    assert _content(local_copy(address)) == files
    assert "3 files, 3 to download" in capsys.readouterr().err
    assert local_copy(address + "/") == local_copy(address)
    assert capsys.readouterr().err == ""
    _put(s3, tmp_path.name, {"train/1/b c.png": b"B", "new.png": b"n"})
    s3.client().delete_object(Bucket=BUCKET, Key=f"{tmp_path.name}/table.csv")
    changed = {"train/0/a.png": b"a" * 1000, "train/1/b c.png": b"B", "new.png": b"n"}
    assert _content(local_copy(address)) == changed
    assert "3 files, 2 to download" in capsys.readouterr().err


def test_a_download_that_breaks_off_leaves_nothing_half_and_goes_on(
    s3: S3, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {f"{n:02d}.png": bytes([n]) * 30_000 for n in range(6)}
    _put(s3, tmp_path.name, files)
    monkeypatch.setattr("lvlmva.roots.AT_ONCE", 2)
    proxy = Proxy(s3.port)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr("s3fs.S3FileSystem.retries", 1)
    proxy.fail("answer", after=20_000)  # a listing is shorter
    with pytest.raises(InputError, match=r"cannot be read \(\w+\)"):
        local_copy(address)
    assert [path for path in (tmp_path / "store").rglob("*") if path.is_file()] == []
    proxy.fail("")
    assert _content(local_copy(address)) == files
    assert proxy.lost > 0


def test_an_archive_and_a_folder_give_the_same_data_set(s3: S3, address: str, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    here = tmp_path / "here"
    for split, count in (("train", 4), ("val", 2), ("test", 2)):
        for label in ("cat", "dog"):
            for n in range(count):
                path = here / split / label / f"{n}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(generator.integers(0, 256, (20, 20), dtype=np.uint8)).save(path)
    with tarfile.open(tmp_path / "here.tar", "w") as archive:
        archive.add(here, arcname=".")
    _put(s3, tmp_path.name, {f"here/{name}": content for name, content in _content(here).items()})
    _put(s3, tmp_path.name, {"here.tar": (tmp_path / "here.tar").read_bytes()})
    expected = Folder(root=str(here), image_size=16, seed=0).prepare()
    for root in (f"{address}/here", f"{address}/here.tar"):
        found = with_local_root(Folder(root=root, image_size=16, seed=0)).prepare()
        assert np.array_equal(found.images, expected.images)
        assert found.samples.equals(expected.samples)


def test_mistakes_are_named_without_a_secret(
    s3: S3, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("gcsfs", "adlfs"):
        monkeypatch.setitem(sys.modules, package, None)  # as where they are not installed
    for root, told in (
        (f"{address}/absent", "nothing is there; expected a folder with pictures"),
        ("s3://no-such-bucket/x", "no such bucket, or nothing there"),
        ("http://127.0.0.1/x.tar", "expected a folder, an archive, or s3, gs"),
        (f"s3://user:{SECRET}@{BUCKET}/x", "an address holds no user and no key"),
        ("gs://bucket/x", r"pip install 'lvlmva\[gs\]'"),
        ("az://bucket/x", r"pip install 'lvlmva\[azure\]'"),
    ):
        with pytest.raises(InputError, match=told) as caught:
            local_copy(root)
        assert SECRET not in str(caught.value)
    _put(s3, tmp_path.name, {"../../evil.png": b"x"})
    with pytest.raises(InputError, match="whose name leads elsewhere"):
        local_copy(address)
    assert not list(tmp_path.rglob("evil.png"))
