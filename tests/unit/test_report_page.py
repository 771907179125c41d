"""The report's page in parts: its headline against the numbers, its size against the budget, its text as text."""

import base64
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lvlmva.page import FOLDER
from lvlmva_core.report.gallery import Gallery
from lvlmva_core.report.headline import headline_of
from lvlmva_core.report.page import Page, Table, one_script, render_page
from lvlmva_core.report.thumbnails import kept_samples, runs, thumbnails

NASTY = "<script>alert(1)</script></style><!-- \"' &amp; \u2028 שלום 🩻"


def measured(seeds: int, **metrics: tuple[float, float, float]) -> dict[str, Any]:
    """metrics/evaluate.json with a metric's (base, mean, standard deviation) each."""
    tests = {
        name: {"base": {"difference": {"mean": after - before, "std": std}, "p_two_sided": 0.25}}
        for name, (before, after, std) in metrics.items()
    }
    return {
        "methods": {
            "base": {"test": {name: before for name, (before, _, _) in metrics.items()}},
            "lvlm_va": {
                "seeds": seeds,
                "test": {name: {"mean": after, "std": std} for name, (_, after, std) in metrics.items()},
            },
        },
        "tests": {"lvlm_va": tests},
    }


def test_the_headline_says_the_numbers_and_which_way_they_went() -> None:
    found = headline_of(
        measured(
            3,
            wga=(0.56, 0.901, 0.02),
            accuracy=(0.85, 0.86, 0.008),
            mu_align=(0.876, 0.969, 0.007),
            reliance_true=(0.53, 0.065, 0.004),
            reliance=(0.01, 0.2, 0.01),
        ),
        "a grey square",
    )
    assert found.before == (
        "Before, the model put 12% of its attribution on the spurious feature (a grey square), gave way to it by 0.53 "
        "standard deviations of its output and was right on 85% of the test pictures (56% in its worst group)."
    )
    assert found.after.startswith("Now it puts 3% of its attribution on it, gives way to it by 0.07 standard")
    changes = {figure.heading: (figure.before, figure.after, figure.change) for figure in found.figures}
    assert changes == {
        "WGA": ("0.560", "0.901", "better"),
        "accuracy": ("0.850", "0.860", "even"),  # by no more than twice its spread
        "μ_align": ("0.876", "0.969", "better"),
        "reliance, true": ("0.530", "0.065", "better"),  # less of it is better
        "reliance": ("0.010", "0.200", "worse"),
    }
    assert "ΔWGA +0.341 (p = 0.250)" in found.tests
    assert "With 3 seeds no difference can be significant." in found.tests
    assert "no difference" not in headline_of(measured(6, accuracy=(0.8, 0.9, 0.01)), "x").tests
    plain = headline_of(measured(3, accuracy=(0.8, 0.9, 0.01), reliance=(0.1, 0.05, 0.01)), "x")
    assert plain.before == (
        "Before, the model gave way to what was rejected by 10% of its logit and was right on 80% of the test pictures."
    )
    assert plain.control == ""
    with_control = measured(3, wga=(0.5, 0.7, 0.02))
    with_control["methods"]["lambda_zero"] = {"test": {"wga": {"mean": 0.72, "std": 0.03}}}
    with_control["methods"]["base"]["test"]["accuracy"] = 0.8
    with_control["methods"]["lvlm_va"]["test"]["accuracy"] = {"mean": 0.8, "std": 0.0}
    with_control["tests"]["lvlm_va"]["wga"]["lambda_zero"] = {"difference": {"mean": -0.02, "std": 0.01}}
    assert headline_of(with_control, "x").control == (
        "Fine-tuning without masks (λ = 0) reaches WGA 0.720; with the masks it is -0.020 ± 0.010 from there."
    )


def test_runs_are_the_label_map_again() -> None:
    rng = np.random.default_rng(0)
    for labels in (
        rng.integers(0, 7, (30, 31), dtype=np.uint8),
        np.full((64, 64), 255, dtype=np.uint8),  # one run that is longer than a byte counts
        np.zeros((1, 257), dtype=np.uint8),
        np.repeat(rng.integers(0, 3, 9, dtype=np.uint8), 256).reshape(9, 256),
    ):
        encoded = runs(labels)
        again = [encoded[n] for n in range(0, len(encoded), 2) for _ in range(encoded[n + 1] + 1)]
        assert again == labels.ravel().tolist()


def gallery(n: int, side: int) -> tuple[Gallery, np.ndarray]:
    rng = np.random.default_rng(1)
    label_maps = np.zeros((n, side, side), dtype=np.uint8)
    label_maps[:, : side // 2] = 1
    return (
        Gallery(
            ids=[f"s{place}" for place in range(n)],
            rows=np.arange(n),
            labels=np.arange(n) % 2,
            classes=["a", "b"],
            class_names=["ab"[place % 2] for place in range(n)],
            groups=None,
            entropies=[0.0] * n,
            attributions=rng.normal(size=(n, side, side)).astype(np.float32),
            label_maps=label_maps,
            digests=["d"] * n,
            shares=[{0: 1 - place / n, 1: place / n} for place in range(n)],
            reliance=None,
            critiques={},
            verdicts={},
            masked=[{0: 0.0, 1: 1.0}] * n,
        ),
        rng.integers(0, 256, (n, 1, side, side), dtype=np.uint8),
    )


def test_pictures_become_smaller_until_they_fit_and_then_samples_are_left_out() -> None:
    shown, images = gallery(20, 128)
    sizes = []
    for budget in (10**7, 600_000, 300_000, 100_000, 20_000):
        kept, encoded = thumbnails(shown, range(20), images, {"s3": shown.attributions[3]}, budget)
        size = sum(len(str(value).encode()) for each in encoded for value in each.values())
        sizes.append(size)
        assert size <= budget
        assert kept == list(range(len(kept)))
        assert [each["after"] is None for each in encoded] == [n != 3 for n in kept]
        again = thumbnails(shown, range(20), images, {"s3": shown.attributions[3]}, budget)
        assert again == (kept, encoded)  # the same bytes
        if budget >= 100_000:
            assert len(kept) == 20
    assert sizes == sorted(set(sizes), reverse=True)
    assert 0 < len(kept) < 20
    # the first picture as it was, but for what WebP takes
    whole = thumbnails(shown, [0], images, {}, 10**7)[1][0]
    assert base64.b64decode(whole["image"].partition(",")[2])[8:12] == b"WEBP"


def test_where_not_all_are_shown_each_class_has_its_most_masked() -> None:
    shown, _ = gallery(20, 8)
    assert kept_samples(shown, 100) == list(range(20))
    assert kept_samples(shown, 5) == [15, 16, 17, 18, 19]
    assert kept_samples(shown, 2) == [18, 19]


def test_what_anybody_wrote_is_text_and_ends_no_element() -> None:
    page = Page(
        title=NASTY,
        warning=NASTY,
        facts=[NASTY],
        tables=[Table(NASTY, NASTY, [NASTY], [[NASTY]])],
        params=NASTY,
        left_out_of_gallery=NASTY,
    )
    text = render_page(page, FOLDER, {"critique": NASTY, "samples": []})
    assert "<script>alert" not in text
    assert "<!-- " not in text
    assert text.count("<script") == text.count("</script>") == 2
    assert text.count("</style>") == 1
    inside = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert inside is not None
    assert json.loads(inside[1])["critique"] == NASTY
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    assert policy is not None
    assert policy[1].startswith("default-src &#39;none&#39;; img-src data:; style-src &#39;sha256-")
    assert "unsafe" not in policy[1]
    served = render_page(page, FOLDER)
    assert "<style" not in served
    assert re.findall(r"<script(?![^>]* src=)", served) == []


def test_modules_become_one_script_each_once_and_after_what_it_imports(tmp_path: Path) -> None:
    (tmp_path / "c.js").write_text("export const c = 1;\n")
    (tmp_path / "b.js").write_text('import { c } from "./c.js";\n\nexport function b() {}\n')
    (tmp_path / "a.js").write_text('import { b } from "./b.js";\nimport { c } from "./c.js";\n\nb(c);\n')
    assert one_script(tmp_path, "a.js").split() == ["const", "c", "=", "1;", "function", "b()", "{}", "b(c);"]
    script = one_script(FOLDER)
    assert not re.search(r"^(import|export)\b", script, re.MULTILINE)
    used = set(re.findall(r'from "\./(\w+\.js)"', (FOLDER / "review.js").read_text()))
    assert used <= {file.name for file in FOLDER.iterdir()}
    (tmp_path / "a.js").write_text('import { b } from "./gone.js";\n')
    with pytest.raises(FileNotFoundError, match=r"gone\.js"):
        one_script(tmp_path, "a.js")
