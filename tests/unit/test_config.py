import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from lvlmva.params import load_params, sections_lacking
from lvlmva_core.arrays import read_json
from lvlmva_core.datasets.decoy import DecoyDigits
from lvlmva_core.datasets.registry import DATASETS
from lvlmva_core.datasets.settings import PrepareSettings
from lvlmva_core.errors import InputError
from stages.settings import settings

ROOT = Path(__file__).parents[2]


def _params_with(tmp_path: Path, *changes: tuple[str, Any]) -> Path:
    yaml = YAML(typ="safe", pure=True)
    content = yaml.load((ROOT / "params.yaml").read_text())
    for key, value in changes:
        *path, last = key.split(".")
        section = content
        for part in path:
            section = section[part]
        if value is ...:
            del section[last]
        else:
            section[last] = value
    file = tmp_path / "params.yaml"
    with file.open("w") as out:
        yaml.dump(content, out)
    return file


def test_the_shipped_params_are_valid() -> None:
    assert load_params(ROOT / "params.yaml").align.alignment_batch == 8


def test_numbers_are_read_as_dvc_reads_them(tmp_path: Path) -> None:
    file = tmp_path / "params.yaml"
    text = (ROOT / "params.yaml").read_text()
    file.write_text(text.replace("completeness_tolerance: 1e-6", "completeness_tolerance: 2e-6"))
    assert load_params(file).attribute.completeness_tolerance == 2e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("align.rrr_lamda", 1.0), r"unknown key 'align\.rrr_lamda'; did you mean 'rrr_lambda'\?"),
        (("alignn", {}), r"unknown key 'alignn'; did you mean 'align'\?"),
        (("methods.rrr_gt.epoch", 1), r"unknown key 'methods\.rrr_gt\.epoch'; did you mean 'epochs'\?"),
        (("methods.random_mask", {}), r"unknown key 'methods\.random_mask'; did you mean 'random_masks'\?"),
        (("retrained.lvlm_va", {}), r"unknown key 'retrained\.lvlm_va'; known here: jtt, subg, dfr, "),
        (("methods.lvlm_va", ...), r"methods: 'lvlm_va', which all others are compared with, is missing"),
        (("align.seeds", [0, 0]), r"'align\.seeds' = \[0, 0\].*each seed must stand there once"),
        (("align.alignment_batch", 10000), r"alignment_batch = 10000 is larger than the alignment set"),
        (("critique.critic", "model"), r"'critique': critic 'model' needs critique\.endpoint"),
        (("align.epochs", ...), r"key 'align\.epochs' is missing"),
        (("align.epochs", "ten"), r"'align\.epochs' = 'ten'.*valid integer"),
        (("align.epochs", 1.5), r"'align\.epochs' = 1\.5.*valid integer"),
        (("align.seeds", []), r"'align\.seeds' = \[\].*at least 1"),
        (("align.rrr_lambda", -1), r"'align\.rrr_lambda' = -1.*greater than or equal to 0"),
        (("segment.n_regions", 13), r"'segment\.n_regions' = 13.*less than or equal to 12"),
        (("compute.device", "gpu"), r"'compute\.device' = 'gpu'"),
        (("prepare.dataset", "cats"), r"'prepare\.dataset' = 'cats': expected one of decoy_digits, decoy_mnist, "),
        (("prepare.dataset", ...), r"key 'prepare\.dataset' is missing"),
        (("prepare.knee", {}), r"unknown key 'prepare\.knee'; known keys: dataset, root, seed, shortcut"),
        (("prepare", {"dataset": "knee", "seed": 0, "image_size": 64}), r"key 'prepare\.knee' is missing"),
        (
            ("prepare", {"dataset": "knee", "seed": 0, "image_size": 9, "knee": {}}),
            r"'prepare\.image_size' = 9: input s",
        ),
        (("methods.lambda_zero", {"rrr_lambda": 1.0}), r"methods\.lambda_zero: rrr_lambda must be 0"),
    ],
)
def test_a_mistake_is_named_by_its_key_in_one_line(tmp_path: Path, change: tuple[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_params(_params_with(tmp_path, change))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_or_no_yaml(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        load_params(tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_text("align: [")
    with pytest.raises(InputError, match="not valid YAML"):
        load_params(tmp_path / "params.yaml")


def _train(**changes: Any) -> dict[str, Any]:
    return {"model": "mlp", "hidden": 4, "learning_rate": 1e-3, "batch_size": 8, "epochs": 1, "seed": 0, **changes}


CHECKPOINT = {
    "from": "checkpoint",
    "model": "torchvision:resnet18",
    "checkpoint": "own/w.pth",
    "classes": ["a", "b"],
    "normalisation": "imagenet",
}


@pytest.mark.parametrize(
    ("section", "start"),
    [
        (_train(), "scratch"),
        (_train(weights=None), "scratch"),
        (_train(weights="own/w.pth"), "weights"),
        (_train(**{"from": "scratch"}), "scratch"),
        (CHECKPOINT, "checkpoint"),
        ({key: value for key, value in CHECKPOINT.items() if key != "from"}, "checkpoint"),
    ],
)
def test_a_train_section_says_where_the_model_comes_from_or_is_read_as_before(
    tmp_path: Path, section: dict[str, Any], start: str
) -> None:
    assert load_params(_params_with(tmp_path, ("train", section))).train.start == start


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (_train(epoch=3), r"unknown key 'train\.epoch'; did you mean 'epochs'\?"),
        (_train(epochs=0), r"'train\.epochs' = 0.*greater than or equal to 1"),
        ({"from": "scratch", "model": "mlp"}, r"key 'train\.hidden' is missing"),
        (_train(**{"from": "weights"}), r"key 'train\.weights' is missing"),
        ({**CHECKPOINT, "from": "nowhere"}, r"'train\.from' = 'nowhere': expected one of scratch, weights, checkpoint"),
        ({**CHECKPOINT, "normalisation": "image-net"}, r"'train\.normalisation"),
        (
            {**CHECKPOINT, "normalisation": None},
            r"'train': normalisation is missing: say what the model was trained on",
        ),
        ({**CHECKPOINT, "classes": ["a"]}, r"'train\.classes' = \['a'\]"),
        ({**CHECKPOINT, "model": "../own:f"}, r"'train\.model' = '\.\./own:f'"),
    ],
)
def test_a_mistake_in_train_is_named_by_its_key(tmp_path: Path, section: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_params(_params_with(tmp_path, ("train", section)))
    assert "\n" not in str(caught.value)


def test_retrained_methods_need_a_training_to_inherit_from(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"key 'retrained\.subg\.learning_rate' is missing"):
        load_params(_params_with(tmp_path, ("train", CHECKPOINT), ("retrained", {"subg": {}})))


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "prompts" / "decoy_digits", tmp_path / "prompts" / "decoy_digits")
    return tmp_path / "prompts"


@pytest.fixture
def prepared(tmp_path: Path) -> tuple[Path, Path]:
    """The sample table and the true masks of the default."""
    samples, masks = tmp_path / "samples.parquet", tmp_path / "masks.zarr"
    DecoyDigits(seed=0).write(tmp_path / "images.zarr", samples, masks)
    return samples, masks


def test_each_prompt_reaches_its_own_stage_alone(tmp_path: Path, prompts: Path, prepared: tuple[Path, Path]) -> None:
    def written() -> list[dict[str, str]]:
        settings(ROOT / "params.yaml", *prepared, prompts, tmp_path / "settings")
        return [read_json(tmp_path / "settings" / f"{name}_prompts.json") for name in ("critique", "judge")]

    first = written()
    for name, critique_is_new, judge_is_new in (
        ("critic.j2", True, False),
        ("judge.j2", False, True),
        ("specification.yaml", True, False),
    ):
        file = prompts / "decoy_digits" / name
        text = file.read_text()
        file.write_text(text + "\n")
        assert [new != old for new, old in zip(written(), first, strict=True)] == [critique_is_new, judge_is_new]
        file.write_text(text)
    assert written() == first


def test_prompts_that_are_not_there_are_said_in_one_line(
    tmp_path: Path, prompts: Path, prepared: tuple[Path, Path]
) -> None:
    file = _params_with(tmp_path, ("judge.prompts", "mine"))
    with pytest.raises(InputError, match=r"judge\.prompts = 'mine': no folder .*prompts/mine \(there: decoy_digits\)"):
        settings(file, *prepared, prompts, tmp_path / "settings")
    (prompts / "decoy_digits" / "judge.j2").unlink()
    with pytest.raises(InputError, match=r"decoy_digits/judge\.j2: cannot be read .*; see prompts/generic"):
        settings(ROOT / "params.yaml", *prepared, prompts, tmp_path / "settings")


def test_a_mistake_deep_in_the_section_of_a_data_set_is_named_by_its_keys(tmp_path: Path) -> None:
    knee: dict[str, Any] = {"train_per_class": 1, "val_per_class": 1, "test_per_class": 1, "tag_share_healthy": 0.5}
    knee |= {"tag_share_arthritic": 0.5, "negatives": "keep"}
    prepare = {"dataset": "knee", "root": "x", "seed": 0, "image_size": 64, "knee": knee}
    with pytest.raises(InputError, match=r"'prepare\.knee\.negatives' = 'keep': input should be 'leave_out' or"):
        load_params(_params_with(tmp_path, ("prepare", prepare)))
    knee |= {"negatives": "invert", "test_per_clas": 1}
    with pytest.raises(InputError, match=r"'prepare\.knee\.test_per_clas'; did you mean 'test_per_class'\?"):
        load_params(_params_with(tmp_path, ("prepare", prepare)))


def test_reading_params_imports_nothing_that_decodes_or_trains() -> None:
    heavy = "{'PIL', 'torch', 'zarr', 'sklearn', 'pydicom'}"
    script = f"import sys, lvlmva.params; print(sorted({heavy} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_every_data_set_is_entered_under_its_own_name() -> None:
    assert list(DATASETS) == sorted(DATASETS)
    for name, section in DATASETS.items():
        assert issubclass(section, PrepareSettings)
        assert section.model_fields["dataset"].default == name


SHORT = {"critic": "rules", "prompts": "decoy_digits"}


def test_a_critic_is_exchanged_by_one_key_whatever_stands_there_for_others(tmp_path: Path) -> None:
    for critic in ("rules", "oracle"):
        assert load_params(_params_with(tmp_path, ("critique", {**SHORT, "critic": critic}))).critique.critic == critic
    flat = {**SHORT, "false_positive_rate": 0.2, "endpoint": None, "max_failed_share": 0.1, "seed": 0}
    assert load_params(_params_with(tmp_path, ("critique", flat))).critique.critic == "rules"
    oracle = load_params(_params_with(tmp_path, ("critique", {**flat, "critic": "oracle"}))).critique
    assert oracle.model_dump()["false_positive_rate"] == 0.2


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {**SHORT, "critic": "ruls"},
            r"'critique': no critic 'ruls'; known: rules, oracle, text, concept, model, replay",
        ),
        ({**SHORT, "overlapp": "any"}, r"unknown key 'critique\.overlapp'"),
        ({**SHORT, "critic": "oracle", "overlap": "most"}, r"'critique\.overlap' = 'most'"),
        (
            {**SHORT, "critic": "model", "endpoint": {"base_url": "https://a.example/v1", "model": "m"}},
            r"'critique\.endpoint': endpoint\.api_key_variable is missing: name the environment variable",
        ),
        (
            {**SHORT, "critic": "model", "endpoint": {"base_url": "https://me:hidden@a.example/v1", "model": "m"}},
            r"'critique\.endpoint\.base_url': string should match pattern",
        ),
        (
            {**SHORT, "critic": "model", "endpoint": {"base_url": "https://a.example/v1?key=hidden", "model": "m"}},
            r"'critique\.endpoint\.base_url': base_url: key looks like a credential",
        ),
        (
            {**SHORT, "critic": "model", "endpoint": {"base_url": "http://localhost/v1", "modell": "m"}},
            r"key 'critique\.endpoint\.model(l'; did you mean 'model'|' is missing)",
        ),
    ],
)
def test_a_mistake_in_a_critic_is_named_without_what_may_be_secret(
    tmp_path: Path, section: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match="(?i)" + message) as caught:
        load_params(_params_with(tmp_path, ("critique", section)))
    assert "hidden" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "groups", "masks", "message"),
    [
        (
            [],
            True,
            False,
            r"methods\.rrr_gt needs true masks .*and the data set has none; remove 'rrr_gt' from `methods`",
        ),
        (
            [("retrained", {"subg": {}})],
            False,
            True,
            r"retrained\.subg needs group labels .*remove 'subg' from `retrained`",
        ),
        (
            [("retrained", {"dfr": {"split": "val", "c": 1.0}})],
            False,
            True,
            r"retrained\.dfr needs group labels .*remove 'dfr'",
        ),
        (
            [("retrained", {"jtt": {"first_epochs": 1, "up": 5, "selection": {"rule": "worst_group"}}})],
            False,
            True,
            r"retrained\.jtt: the rule worst_group needs group labels .*set it to pseudo_group, which needs none",
        ),
        (
            [("align.selection", {"rule": "worst_group"})],
            False,
            True,
            r"methods\.lambda_zero: the rule worst_group needs group labels .*set it to pseudo_group, which needs none",
        ),
    ],
)
def test_what_needs_labels_that_a_data_set_lacks_is_refused(
    tmp_path: Path, changes: list[tuple[str, Any]], groups: bool, masks: bool, message: str
) -> None:
    params = load_params(_params_with(tmp_path, *changes))
    with pytest.raises(InputError, match=message) as caught:
        params.check_supervision(groups=groups, true_masks=masks)
    assert "\n" not in str(caught.value)
    params.check_supervision(groups=True, true_masks=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([("align.training_batch", 101)], "align.training_batch = 101, the split train has 100 pictures; lower it"),
        (
            [("methods", {"lvlm_va": {}, "random_masks": {"training_batch": 200}})],
            "methods.random_masks.training_batch = 200, the split train has 100",
        ),
    ],
)
def test_a_batch_that_the_split_cannot_fill_is_refused_before_anything_is_paid(
    tmp_path: Path, changes: list[tuple[str, Any]], message: str
) -> None:
    params = load_params(_params_with(tmp_path, *changes))
    with pytest.raises(InputError, match=re.escape(message)):
        params.check_batches(100)
    params.check_batches(200)


def test_the_stage_settings_refuses_it_too(tmp_path: Path) -> None:
    from tests.pipeline.calls import write_data

    write_data(tmp_path, 6)
    changed = ("methods", {"lvlm_va": {}, "lambda_zero": {"rrr_lambda": 0.0, "training_batch": 7}})
    params, data = _params_with(tmp_path, changed, ("align.training_batch", 6)), tmp_path / "data"
    with pytest.raises(InputError, match=r"methods.lambda_zero.training_batch = 7, the split train has 6 pictures"):
        settings(params, data / "samples.parquet", data / "spurious_masks.zarr", ROOT / "prompts", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_section_that_has_defaults_and_is_not_there_is_named(tmp_path: Path) -> None:
    """DVC follows every section, and refuses a params.yaml of an earlier version in words of its own."""
    older = _params_with(tmp_path, ("exchange", ...))
    assert load_params(older).exchange.n_donors == load_params(ROOT / "params.yaml").exchange.n_donors
    assert sections_lacking(older) == ["exchange"]
    assert sections_lacking(ROOT / "params.yaml") == []


NO = {"disagreement": False}
MODEL = {"critic": "model", "samples": 3, "endpoint": {"base_url": "http://localhost:1/v1", "model": "m"}}


@pytest.mark.parametrize(
    ("critique", "judge", "message"),
    [
        ({}, {}, "needs several answers"),
        ({**MODEL, "samples": 1}, {}, "needs several answers"),
        (MODEL, {"votes": "unanimous"}, r"judge\.votes 'unanimous' has all votes"),
        ({**MODEL, "critics": [{"critic": "rules"}], "cascade": {}}, {}, "in this cascade no vote is split"),
        (MODEL, {}, None),
        ({"critics": [{"critic": "oracle"}]}, {}, None),
        ({**MODEL, "critics": [{**MODEL}], "cascade": {}}, {}, None),
        (
            {**MODEL, "critics": [{"critic": "rules"}], "cascade": {"disagreement": False, "reliance_above": 0.5}},
            {},
            None,
        ),
    ],
)
def test_votes_weigh_masks_only_where_they_can_be_split(
    tmp_path: Path, critique: dict[str, Any], judge: dict[str, Any], message: str | None
) -> None:
    changes = [(f"critique.{key}", value) for key, value in critique.items()]
    changes += [(f"judge.{key}", value) for key, value in judge.items()]
    file = _params_with(tmp_path, ("mask.weights", "votes"), *changes)
    if message is None:
        assert load_params(file).mask.weights == "votes"
        return
    with pytest.raises(InputError, match=rf"mask\.weights = 'votes'.*{message}"):
        load_params(file)
