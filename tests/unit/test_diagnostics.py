from pathlib import Path

import numpy as np

from lvlmva_core.report.diagnostics import embeddings_figure, entropy_figure
from lvlmva_core.report.figures import save_figure


def test_embeddings_are_the_first_two_principal_components_of_each_model() -> None:
    rng = np.random.default_rng(0)
    features = {"base": rng.normal(size=(40, 5)) * [1, 5, 2, 1, 1], "lvlm_va": rng.normal(size=(40, 3)) * [9, 1, 3]}
    labels, spurious = np.arange(40) % 2, np.arange(40) % 3 == 0
    figure = embeddings_figure(features, labels, spurious, ["a", "b"])
    for axes, values in zip(figure.axes, features.values(), strict=True):
        drawn = np.concatenate([np.asarray(points.get_offsets()) for points in axes.collections])
        variances, directions = np.linalg.eigh(np.cov(values.T))  # rising
        places = (values - values.mean(axis=0)) @ directions[:, ::-1][:, :2]
        order = np.concatenate([np.flatnonzero((labels == k) & (spurious == s)) for k in (0, 1) for s in (False, True)])
        for component in range(2):
            direction = directions[:, -1 - component]
            signs = np.sign(direction[np.abs(direction).argmax()])  # drawn with the largest entry positive
            np.testing.assert_allclose(signs * drawn[:, component], places[order, component], atol=1e-9)
        assert f"{variances[-2:].sum() / variances.sum():.0%}" in axes.get_title()


def test_every_sample_is_in_the_histogram_also_below_the_floor(tmp_path: Path) -> None:
    entropies = np.concatenate([[0.0, 1e-30], np.geomspace(1e-9, 0.69, 98)])
    spurious = np.arange(100) % 4 == 0
    figure = entropy_figure(entropies, spurious, None)
    heights = [sum(bar.get_height() for bar in container) for container in figure.axes[0].containers]  # type: ignore[union-attr]
    assert heights == [75, 25]
    assert "not defined" in figure.axes[0].get_title()
    for name in ("a.png", "b.png"):
        save_figure(entropy_figure(entropies, spurious, 0.75), tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert len(entropy_figure(np.zeros(5), np.ones(5, bool), None).axes) == 1
