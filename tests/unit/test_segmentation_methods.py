"""The segmenters beside PPEPS-WGM, the choice of the number of regions, and the stage that runs them."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.ndimage import gaussian_filter
from scipy.ndimage import label as connected
from scipy.stats import multivariate_normal
from torch.nn import functional

from lvlmva_core.arrays import read_array, read_attrs, read_json, write_arrays, write_table
from lvlmva_core.errors import InputError
from lvlmva_core.segmentation import fit_chosen_gmm, fit_weighted_gmm, log_likelihood, sam
from lvlmva_core.segmentation.sam import load_sam, sam_regions
from lvlmva_core.segmentation.superpixels import grid_regions, merge_regions, number_by_share, slic_regions
from lvlmva_core.segmentations import records_in
from lvlmva_core.segmenters import Segmenter
from lvlmva_core.segmenters.ppeps_wgm import PpepsWgm
from lvlmva_core.store import Store
from stages.segment import segment

CPU = torch.device("cpu")


def config(**changes: Any) -> Segmenter:
    defaults = {
        "method": "ppeps_wgm",
        "n_regions": 4,
        "choose": "fixed",
        "n_starts": 4,
        "n_superpixels": 30,
        "sam_checkpoint": None,
        "seed": 0,
    }
    return Segmenter.model_validate({**defaults, **changes})


def attributions(n: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, height, width)).astype(np.float32)


def pictures(n: int, height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Quarters of different brightness, with a little noise."""
    noise = np.random.default_rng(seed).integers(0, 9, (n, channels, height, width))
    noise[:, :, : height // 2] += 80
    noise[:, :, :, : width // 2] += 150
    return noise.astype(np.uint8)


@pytest.mark.parametrize("n_regions", range(1, 13))
@pytest.mark.parametrize("shape", [(28, 28), (30, 50), (224, 224)])
def test_grid_tiles_are_rectangles_of_nearly_equal_area(shape: tuple[int, int], n_regions: int) -> None:
    labels = grid_regions(shape, n_regions)
    areas = np.bincount(labels.ravel())
    assert len(areas) == n_regions
    assert areas.max() <= 1.35 * areas.min()
    for n in range(n_regions):
        rows, columns = np.nonzero(labels == n)
        assert (np.ptp(rows) + 1) * (np.ptp(columns) + 1) == areas[n]


@pytest.mark.parametrize("channels", [1, 3])
def test_slic_regions_are_connected_and_follow_edges(channels: int) -> None:
    labels = slic_regions(pictures(1, 48, 64, channels)[0], 40)
    assert 20 <= labels.max() + 1 <= 60
    for n in range(labels.max() + 1):
        assert connected(labels == n)[1] == 1
    quarter = (np.arange(48)[:, None] < 24) * 2 + (np.arange(64)[None] < 32)
    purity = [np.bincount(quarter[labels == n]).max() / (labels == n).sum() for n in range(labels.max() + 1)]
    assert np.mean(purity) > 0.97


def by_loops(labels: np.ndarray, attribution: np.ndarray, n_regions: int) -> np.ndarray:
    """The rule of `merge_regions`, every quantity computed from the pixels anew."""
    labels, effect = labels.copy(), np.maximum(attribution, 0).astype(np.float64)
    while len(np.unique(labels)) > n_regions:
        least = min(np.unique(labels), key=lambda n: (effect[labels == n].sum(), n))
        touching = set()
        for i, k in zip(*np.nonzero(labels == least), strict=True):
            for di, dk in ((0, 1), (1, 0), (0, -1), (-1, 0)):
                if 0 <= i + di < labels.shape[0] and 0 <= k + dk < labels.shape[1]:
                    touching.add(int(labels[i + di, k + dk]))
        own = effect[labels == least].mean()
        host = min(touching - {least}, key=lambda n: (abs(effect[labels == n].mean() - own), n))
        labels[labels == least] = host
    return labels


@pytest.mark.parametrize("n_regions", [1, 3, 7])
def test_merging_follows_its_rule(n_regions: int) -> None:
    attribution = attributions(1, 24, 30)[0]
    labels = slic_regions(pictures(1, 24, 30)[0], 25)
    merged, expected = merge_regions(labels, attribution, n_regions), by_loops(labels, attribution, n_regions)
    assert len(np.unique(merged)) == n_regions
    pairs = np.unique(np.stack([merged.ravel(), expected.ravel()]), axis=1)
    assert pairs.shape[1] == n_regions == len(np.unique(expected))


def test_regions_are_numbered_by_falling_share() -> None:
    labels, attribution = grid_regions((12, 12), 4), attributions(1, 12, 12)[0]
    segments, shares, status = number_by_share(labels, attribution, 4)
    positive = np.maximum(attribution, 0).astype(np.float64)
    expected = [positive[segments == n].sum() / positive.sum() for n in range(4)]
    np.testing.assert_allclose(shares, expected, rtol=1e-6)
    assert list(shares) == sorted(shares, reverse=True)
    assert status == "ok"
    assert number_by_share(labels, -np.abs(attribution), 4)[2] == "no_positive_effect"
    assert number_by_share(np.minimum(labels, 1), attribution, 4)[2] == "collapsed"


def tiny_sam(folder: Path) -> Path:
    """A Segment Anything of the real classes, a few thousand weights, at random."""
    transformers = pytest.importorskip("transformers")
    vision = transformers.SamVisionConfig(
        hidden_size=16,
        output_channels=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=64,
        patch_size=8,
        window_size=4,
        global_attn_indexes=[1],
        mlp_dim=32,
        num_pos_feats=8,
    )
    prompt = transformers.SamPromptEncoderConfig(
        hidden_size=16, image_size=64, patch_size=8, image_embedding_size=8, mask_input_channels=4
    )
    decoder = transformers.SamMaskDecoderConfig(
        hidden_size=16, mlp_dim=32, num_hidden_layers=2, num_attention_heads=2, iou_head_hidden_dim=16
    )
    state = torch.get_rng_state()
    torch.manual_seed(3)
    model = transformers.SamModel(
        transformers.SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder)
    )
    torch.set_rng_state(state)
    model.save_pretrained(folder)
    return folder


def test_sam_cuts_the_picture_by_its_masks(tmp_path: Path) -> None:
    model, image = load_sam(tiny_sam(tmp_path), CPU), pictures(1, 40, 56)[0]
    anything = {"least_quality": -1e9, "least_stability": 0.0, "points_per_side": 3}  # the weights are random
    labels = sam_regions(model, image, points_per_batch=4, **anything)
    assert labels.shape == (40, 56)
    assert labels.max() >= 1
    np.testing.assert_array_equal(labels, sam_regions(model, image, points_per_batch=9, **anything))
    assert sam_regions(model, image, **{**anything, "least_quality": 1e9}).max() == 0


def asked_point_by_point(model: Any, image: np.ndarray, points_per_side: int) -> list[tuple[float, np.ndarray]]:
    """Every mask at every point of the grid with the model's own quality, by plain torch: (quality, bool (H, W))."""
    height, width = image.shape[1:]
    side = model.config.vision_config.image_size
    scale = side / max(height, width)
    size = [int(length * scale + 0.5) for length in (height, width)]
    rgb = torch.from_numpy(np.broadcast_to(image, (3, height, width)).copy())[None]
    scaled = functional.interpolate(rgb, size, mode="bilinear", align_corners=False, antialias=True)[0].float()
    mean, std = torch.tensor([[123.675, 116.28, 103.53], [58.395, 57.12, 57.375]])[..., None, None]
    pixels = functional.pad((scaled - mean) / std, (0, side - size[1], 0, side - size[0]))[None]
    found = []
    for k in range(points_per_side):
        for i in range(points_per_side):
            point = torch.tensor([(i + 0.5) / points_per_side * size[1], (k + 0.5) / points_per_side * size[0]])
            with torch.inference_mode():
                answer = model(pixel_values=pixels, input_points=point[None, None, None], multimask_output=True)
            square = functional.interpolate(answer.pred_masks[0], (side, side), mode="bilinear", align_corners=False)
            cut = square[..., : size[0], : size[1]]
            logits = functional.interpolate(cut, (height, width), mode="bilinear", align_corners=False)[0]
            qualities = answer.iou_scores[0, 0].tolist()
            found += [(q, (mask > 0).numpy()) for q, mask in zip(qualities, logits, strict=True)]
    return found


@pytest.mark.parametrize("shape", [(64, 64), (40, 56), (90, 60)])
@pytest.mark.parametrize("channels", [1, 3])
def test_sam_cuts_by_the_masks_that_a_plain_loop_over_points_finds(
    shape: tuple[int, int], channels: int, tmp_path: Path
) -> None:
    model = load_sam(tiny_sam(tmp_path), CPU)
    smooth = gaussian_filter(np.random.default_rng(0).normal(size=(channels, *shape)), (0, 5, 5))
    image = np.clip(128 + 900 * smooth, 0, 255).astype(np.uint8)
    found = asked_point_by_point(model, image, 4)
    above = sorted(quality for quality, _ in found if quality > 0)  # transformers filters by a quality above 0 only
    median = (above[len(above) // 2 - 1] + above[len(above) // 2]) / 2
    every = sam_regions(model, image, points_per_side=4, least_quality=median, least_stability=0.0, largest_overlap=1.0)
    kept = [mask for quality, mask in sorted(found, key=lambda one: -one[0]) if quality > median and mask.any()]
    assert len(kept) >= 3
    smallest = np.zeros(shape, dtype=int)
    for row, column in np.ndindex(shape):
        over = [(int(mask.sum()), -n) for n, mask in enumerate(kept) if mask[row, column]]
        smallest[row, column] = 1 - min(over)[1] if over else 0
    assert (every == smallest).mean() > 0.99  # a logit near zero may fall to either side


def test_sam_keeps_the_best_of_masks_whose_boxes_overlap(tmp_path: Path) -> None:
    model, image = load_sam(tiny_sam(tmp_path), CPU), pictures(1, 40, 56)[0]
    anything = {"least_quality": -1e9, "least_stability": 0.0, "points_per_side": 3}
    alone = sam_regions(model, image, largest_overlap=0.0, **anything)
    best = max(asked_point_by_point(model, image, 3), key=lambda one: one[0])[1]
    assert ((alone == 1) == best).mean() > 0.98
    assert len(np.unique(alone)) <= len(np.unique(sam_regions(model, image, largest_overlap=0.9, **anything)))


def test_the_smallest_mask_lies_on_top() -> None:
    masks = np.zeros((3, 10, 10), dtype=bool)
    masks[0, 2:4, 2:4] = True
    masks[1, :8, 1:] = True
    masks[2, 1:5, 1:5] = True
    expected = np.zeros((10, 10), dtype=int)
    expected[:8, 1:] = 2
    expected[1:5, 1:5] = 3
    expected[2:4, 2:4] = 1
    np.testing.assert_array_equal(sam.smallest_on_top(masks), expected)
    np.testing.assert_array_equal(sam.smallest_on_top(masks[:0]), np.zeros((10, 10)))


def test_sam_needs_a_checkpoint_that_is_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"must be a folder with config\.json and model\.safetensors"):
        load_sam(tmp_path, CPU)
    with pytest.raises(ValueError, match="needs sam_checkpoint"):
        config(method="sam")
    with pytest.raises(ValueError, match="choose must be fixed"):
        config(method="slic", choose="bic")


@pytest.mark.parametrize("method", ["ppeps_wgm", "slic", "grid", "sam"])
def test_every_segmenter_keeps_the_interface(method: str, tmp_path: Path) -> None:
    settings = config(method=method, sam_checkpoint=str(tiny_sam(tmp_path)) if method == "sam" else None)
    maps = attributions(3, 40, 32)
    maps[1] = -1
    ids = ["a", "b", "c"]
    result = settings.segment(maps, pictures(3, 40, 32), ids, CPU)
    assert result["segments"].dtype == np.uint8
    assert result["segments"].shape == (3, 40, 32)
    assert result["weights"].shape == (3, 4)
    assert result["status"][1] == "no_positive_effect"
    assert (result["segments"][1] == 255).all()
    for n in (0, 2):
        assert result["segments"][n].max() < 4
        assert result["weights"][n].sum() == pytest.approx(1, abs=1e-6)
        assert (np.diff(result["weights"][n]) <= 0).all()
    alone = settings.segment(maps[2:], pictures(3, 40, 32)[2:], ["c"], CPU)
    assert all(np.array_equal(alone[name][0], result[name][2]) for name in result)


@pytest.mark.parametrize("criterion", ["bic", "held_out"])
def test_the_number_of_planted_components_is_found(criterion: Any) -> None:
    centres = (np.stack(np.mgrid[:64, :64], -1).reshape(-1, 2) + 0.5) / 64
    rng = np.random.default_rng(0)
    maps = []
    for means in ([[0.5, 0.5]], [[0.25, 0.25], [0.75, 0.7]], [[0.2, 0.3], [0.5, 0.75], [0.8, 0.25], [0.85, 0.8]]):
        density = sum(multivariate_normal(mean, 0.004 * np.eye(2)).pdf(centres) for mean in means)
        maps.append((density * rng.uniform(0.5, 1.5, 64 * 64)).reshape(64, 64))
    weights = torch.from_numpy(np.stack(maps))
    fit, numbers = fit_chosen_gmm(weights, range(1, 7), criterion, n_starts=4)
    assert numbers.tolist() == [1, 2, 4]
    assert (fit.weights > 0).sum(1).tolist() == [1, 2, 4]
    assert fit.means.shape == (3, 6, 2)
    alone = fit_weighted_gmm(weights[1:2], 2, n_starts=4)
    assert torch.equal(fit.labels[1], alone.labels[0])
    torch.testing.assert_close(log_likelihood(fit, weights), fit.log_likelihood)


def test_unknown_criteria_are_refused() -> None:
    with pytest.raises(ValueError, match="expected bic or held_out"):
        fit_chosen_gmm(torch.ones(1, 8, 8), [1, 2], "aic")  # type: ignore[arg-type]


class Workplace:
    """Inputs of the stage in a folder, with a store of its own."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.maps = folder, attributions(5, 24, 24)
        self.ids = [f"sample-{n}" for n in range(5)]
        self.maps[3] = -1
        self.store = folder / "store"
        monkeypatch.chdir(folder)
        monkeypatch.setenv("LVLMVA_STORE", str(self.store))
        everyone = sorted([*self.ids, "another"])
        write_arrays(folder / "images.zarr", {"images": pictures(6, 24, 24)}, {"class_names": ["a", "b"]})
        columns = {"id": everyone, "split": "train", "label": 0, "spurious": False, "group": "0/False"}
        write_table(folder / "samples.parquet", pd.DataFrame({**columns, "source": "", "sha256": ""}))
        self.write_maps()

    def write_maps(self) -> None:
        attrs = {"ids": self.ids, "keys": self.ids, "method": "deep_lift_shap"}
        write_arrays(self.folder / "attributions.zarr", {"attributions": self.maps}, attrs)

    def run(self, **changes: Any) -> dict[str, Any]:
        template = (Path(__file__).parents[2] / "params.yaml").read_text(encoding="utf-8")
        (self.folder / "params.yaml").write_text(with_segment(template, config(**changes)), encoding="utf-8")
        names = ("params.yaml", "attributions.zarr", "images.zarr", "samples.parquet", "segments.zarr", "segment.json")
        segment(*(self.folder / name for name in names))
        return read_json(self.folder / "segment.json")["segment"]

    def records(self) -> dict[Path, bytes]:
        return {file: file.read_bytes() for file in sorted(self.store.rglob("*.arrays"))}


def with_segment(template: str, section: Segmenter) -> str:
    from io import StringIO

    from ruamel.yaml import YAML

    yaml = YAML(pure=True)
    content = yaml.load(template)
    content["segment"] = section.model_dump()
    buffer = StringIO()
    yaml.dump(content, buffer)
    return buffer.getvalue()


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workplace:
    return Workplace(tmp_path, monkeypatch)


def test_stage_writes_what_the_fit_says(workplace: Workplace) -> None:
    metrics = workplace.run()
    fit = fit_weighted_gmm(np.maximum(workplace.maps, 0), 4, n_starts=4)
    out = workplace.folder / "segments.zarr"
    np.testing.assert_array_equal(read_array(out, "segments"), fit.labels)
    np.testing.assert_array_equal(read_array(out, "means"), fit.means.double())
    attrs = read_attrs(out)
    assert attrs["ids"] == workplace.ids
    assert attrs["status"] == fit.status
    assert (attrs["method"], attrs["n_regions"], attrs["seed"]) == ("ppeps_wgm", 4, 0)
    assert metrics["n_samples_left_out"] == 1
    assert metrics["status"] == {"no_positive_effect": 1, "ok": 4}
    used = [n for n in range(5) if n != 3]
    assert metrics["mean_log_likelihood_nats"] == pytest.approx(float(fit.log_likelihood[used].mean()), rel=1e-6)


def test_stage_segments_no_map_twice(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what is new is segmented: nothing the second time, one map when one changes, all for another J."""
    segmented: list[str] = []
    original = PpepsWgm.segment

    def counting(self: PpepsWgm, maps: np.ndarray, images: Any, ids: Any, device: torch.device) -> Any:
        segmented.extend(ids)
        return original(self, maps, images, ids, device)

    monkeypatch.setattr(PpepsWgm, "segment", counting)
    workplace.run()
    assert segmented == workplace.ids
    first = {file: file.read_bytes() for file in (workplace.folder / "segments.zarr").rglob("*") if file.is_file()}
    workplace.run()
    assert segmented == workplace.ids
    assert first == {file: file.read_bytes() for file in first}
    workplace.maps[2] *= 3
    workplace.write_maps()
    workplace.run()
    assert segmented[5:] == ["sample-2"]
    workplace.run(n_regions=3)
    assert segmented[6:] == workplace.ids


def test_stage_mends_a_damaged_record(workplace: Workplace, caplog: pytest.LogCaptureFixture) -> None:
    workplace.run()
    records = workplace.records()
    damaged = next(iter(records))
    damaged.write_bytes(records[damaged][:-3] + b"xyz")
    workplace.run()
    assert "damaged record" in caplog.text
    assert workplace.records() == records


@pytest.mark.parametrize("method", ["ppeps_wgm", "grid"])
def test_an_earlier_output_holds_all_that_the_store_needs(workplace: Workplace, method: str) -> None:
    workplace.run(method=method)
    elsewhere = Store(workplace.folder / "elsewhere")
    for key, record in records_in(workplace.folder / "segments.zarr"):
        elsewhere.put_arrays("segmentations", key, record)
    records = {file.relative_to(workplace.store): content for file, content in workplace.records().items()}
    assert len(records) == 5
    assert {f.relative_to(elsewhere.root): f.read_bytes() for f in elsewhere.root.rglob("*.arrays")} == records


@pytest.mark.parametrize("method", ["slic", "grid"])
def test_stage_runs_the_other_segmenters(workplace: Workplace, method: str) -> None:
    metrics = workplace.run(method=method)
    assert metrics["method"] == method
    assert "mean_log_likelihood_nats" not in metrics
    out = workplace.folder / "segments.zarr"
    assert read_array(out, "segments").shape == (5, 24, 24)
    images = read_array(workplace.folder / "images.zarr", "images")[1:]  # "another" sorts before the samples
    expected = config(method=method).segment(workplace.maps, images, workplace.ids, CPU)
    np.testing.assert_array_equal(read_array(out, "segments"), expected["segments"])


def test_stage_stops_where_no_sample_has_a_positive_effect(workplace: Workplace) -> None:
    workplace.maps[:] = -1
    workplace.write_maps()
    with pytest.raises(InputError, match="no sample has any positive attribution"):
        workplace.run()


def test_stage_names_the_sample_whose_map_is_broken(workplace: Workplace) -> None:
    workplace.maps[1, 0, 0] = np.nan
    workplace.write_maps()
    with pytest.raises(InputError, match="sample-1: "):
        workplace.run()
