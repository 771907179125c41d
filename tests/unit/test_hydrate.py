"""Where the store lies, and that looking for committed outputs costs nothing where there are none."""

import subprocess
from pathlib import Path

import pytest

from lvlmva.hydrate import UnhydratedError, _from_cache, committed_versions, open_store, version_at_head
from lvlmva_core.errors import InputError
from lvlmva_core.store import Store


def test_the_variable_says_where_the_store_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LVLMVA_STORE", "here")
    assert open_store().root == tmp_path / "here"


def test_outside_a_project_and_without_the_variable_the_remedy_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LVLMVA_STORE", raising=False)
    with pytest.raises(InputError, match=r"not in a DVC project; set LVLMVA_STORE"):
        open_store()


@pytest.mark.parametrize("history", ["nothing", "dvc", "git", "commit"])
def test_without_a_dvc_lock_in_history_nothing_is_yielded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, history: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if history != "nothing":
        (tmp_path / ".dvc").mkdir()
    if history in ("git", "commit"):
        subprocess.run(["git", "init", "--quiet"], check=True)
    if history == "commit":
        identity = ["-c", "user.name=t", "-c", "user.email=t@localhost"]
        subprocess.run(["git", *identity, "commit", "--quiet", "--allow-empty", "-m", "empty"], check=True)
    store = Store(tmp_path / "store")
    assert list(committed_versions("data/critiques.jsonl", store, required=True)) == []
    with version_at_head("data/critiques.jsonl") as copy:
        assert copy is None
    assert not store.root.exists()


def test_a_folder_in_the_cache_is_put_together_and_cannot_reach_outside(tmp_path: Path) -> None:
    def put(version: str, content: str) -> None:
        path = tmp_path / "files" / "md5" / version[:2] / version[2:]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)

    put("aa" + "1" * 30, "one")
    put("bb" + "1" * 30 + ".dir", '[{"md5": "' + "aa" + "1" * 30 + '", "relpath": "c/0"}]')
    put("cc" + "1" * 30 + ".dir", '[{"md5": "' + "aa" + "1" * 30 + '", "relpath": "../../evil"}]')
    put("dd" + "1" * 30 + ".dir", '[{"md5": "' + "ee" + "1" * 30 + '", "relpath": "c/0"}]')
    assert _from_cache(tmp_path, "bb" + "1" * 30 + ".dir", tmp_path / "copy")
    assert (tmp_path / "copy" / "c" / "0").read_text() == "one"
    assert not _from_cache(tmp_path, "dd" + "1" * 30 + ".dir", tmp_path / "other")
    assert not _from_cache(tmp_path, "ff" + "1" * 30, tmp_path / "other")
    with pytest.raises(InputError, match="names a path outside its folder"):
        _from_cache(tmp_path, "cc" + "1" * 30 + ".dir", tmp_path / "third")


def test_not_hydrated_is_a_users_mistake() -> None:
    assert issubclass(UnhydratedError, InputError)
