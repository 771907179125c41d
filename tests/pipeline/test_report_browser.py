"""The report opened from disk in a real Chromium: it loads nothing, is filtered, and is reviewed into a CSV."""

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lvlmva.page import FOLDER
from lvlmva_core.lvlm.records import CritiqueRow
from lvlmva_core.overrides import COLUMNS, add_verdict, read_events, standing
from lvlmva_core.report.findings import page_data
from lvlmva_core.report.gallery import Gallery
from lvlmva_core.report.page import Page, render_page
from lvlmva_core.report.thumbnails import thumbnails
from tests.pipeline.browser import CHROMIUM, barriers
from tests.pipeline.review import COUNT, LONG, NASTY, SIDE, write_project, write_report

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (Debian: apt-get install chromium)")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Gallery]:
    """A report after a reviewer's corrections, one of them of regions that are not there any more."""
    folder = tmp_path_factory.mktemp("report") / "project"
    segments = write_project(folder)
    digests = write_report(folder)[1].digests
    assert len(segments) == len(digests)
    add_verdict(folder / "overrides", ("s2", digests[2], 2), "yes", "", "Ada")
    add_verdict(folder / "overrides", ("s3", digests[3], 0), "no", "", "Ada")
    add_verdict(folder / "overrides", ("s4", "of another training", 1), "no", "", "Ada")
    return write_report(folder)


def open_file(browser: Any, path: Path, **context: Any) -> tuple[Any, list[str]]:
    """The file as it is opened by a double click, and what it complains of or asks the network for."""
    page = browser.new_context(**context).new_page()
    complaints: list[str] = []
    page.on("console", lambda message: message.type in ("error", "warning") and complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: complaints.append(dialog.message))
    own = (path.as_uri(), "data:", "blob:")
    page.on("request", lambda asked: asked.url.startswith(own) or complaints.append(asked.url))
    page.goto(path.as_uri())
    page.locator("#grid .card").first.wait_for(state="attached")
    return page, complaints


def test_the_file_is_read_without_a_network(browser: Any, report: tuple[Path, Gallery]) -> None:
    path, gallery = report
    page, complaints = open_file(browser, path, viewport={"width": 1280, "height": 900}, offline=True)
    assert page.title() == "LVLM-VA on <b>these</b>"
    assert page.locator("#judged .stand-in").first.inner_text() == "the stand-in “rules”, no model"
    assert page.locator("pre").inner_text() == NASTY
    assert page.locator("#grid .card").count() == COUNT
    # the patterns: what the critic rejected lies at the right edge, in all samples but the one that Ada corrected
    pattern = page.locator(".pattern").first
    assert f"{COUNT - 1} of {COUNT} samples" in pattern.inner_text()
    assert "class <b>malignant</b>" in pattern.inner_text()
    # what Ada changed, and what does not count any more
    tables = page.locator("#numbers").inner_text()
    weights = {2: gallery.shares[2][2], 3: gallery.shares[3][2]}
    now = gallery.shares[3][0] + gallery.shares[3][2]
    for row in (
        f"s2\tbenign\t3, yellow\tno\tyes\tAda\t{weights[2]:.0%} → 0%",
        f"s3\t<b>malignant</b>\t1, red\tyes\tno\tAda\t{weights[3]:.0%} → {now:.0%}",
        "s4\t2, blue\tno\tAda\tit is of another segmentation",
    ):
        assert row in tables
    assert barriers(page) == []
    page.emulate_media(color_scheme="dark")
    assert barriers(page) == []
    # by key into the samples, one by one: what the model wrote is text, all of it
    # text_contents: a card out of view has no inner text yet (content-visibility)
    page.locator("#show").select_option("accepted")
    assert page.locator("#grid .card .id").all_text_contents() == ["s2"]
    page.locator("#show").select_option("corrected")
    assert sorted(page.locator("#grid .card .id").all_text_contents()) == ["s2", "s3"]
    page.locator("#show").select_option("all")
    page.locator("#order").select_option("id")
    page.locator("#words").fill("S0 owned <SCRIPT>")
    page.locator("#grid-shown", has_text=f"(1 of {COUNT})").wait_for()
    page.locator("#grid .card").click()
    page.locator("#name", has_text="s0").wait_for()
    page.locator("#pictures svg").first.wait_for()
    assert page.evaluate("document.getElementById('critique').textContent") == LONG
    assert page.locator("#critique").locator("*").count() == 0
    assert page.locator("#more svg").count() == 2
    assert barriers(page) == []
    page.locator("#words").fill("")
    page.locator("#shown", has_text=f"({COUNT})").wait_for()
    page.keyboard.press("Escape")  # out of the field
    page.keyboard.press("j")
    page.locator("#name", has_text="s1").wait_for()
    page.locator("#more svg").nth(2).wait_for()  # this one was explained after alignment
    page.keyboard.press("j")
    page.locator('[data-region="2"] .critic', has_text="Ada: yes").wait_for()
    page.keyboard.press("Escape")
    assert page.locator("#report").is_visible()
    assert complaints == []


def test_verdicts_by_mouse_and_key_stay_and_are_downloaded(
    browser: Any, report: tuple[Path, Gallery], tmp_path: Path
) -> None:
    path, gallery = report
    page, complaints = open_file(browser, path, viewport={"width": 1280, "height": 900})
    page.locator("#order").select_option("id")
    page.locator("#grid .card", has_text="s1").click()
    page.locator("#pictures svg").first.wait_for()
    # by mouse, at the right edge, and only now a name is asked for
    box = page.locator("#pictures svg").first.bounding_box()
    page.mouse.click(box["x"] + box["width"] * (17 / SIDE), box["y"] + box["height"] * (10 / SIDE))
    page.locator("#note").fill('=a ruler, "seen" <b>')
    page.locator("#regions .region.chosen").get_by_role("button", name="Yes: region 3").click()
    page.locator("#who-name").fill("../x")
    page.locator("#who-name").press("Enter")
    page.locator("#who-error", has_text="a name has 1 to 60 letters").wait_for()
    page.locator("#who-name").fill("Zoë B.x")
    page.locator("#who-name").press("Enter")
    page.locator('[data-region="2"] .state', has_text="kept in this browser").wait_for()
    # by key: the rest of the sample, then the next one; the last verdict is undone
    page.locator("#name").focus()
    for key in ("n", "u"):
        page.keyboard.press(key)
    page.locator("#name", has_text="s2").wait_for()
    page.keyboard.press("n")
    page.locator('[data-region="0"] .state', has_text="kept").wait_for()
    page.keyboard.press("z")
    page.locator("#status", has_text="the verdict on region 1 is undone").wait_for()
    # opened again, all is there, and goes on
    page.reload()
    page.locator("#counter", has_text=f"1 of {COUNT} reviewed").wait_for()
    page.keyboard.press("r")  # it was opened where it was left: at a sample
    name = page.locator(".pattern .name").first
    name.fill("the right edge")
    name.press("Enter")
    page.locator("#download-names").wait_for()
    page.locator(".pattern .all-no").first.click()
    page.locator("#done", has_text="No for 4 regions of “the right edge”; 1 had a verdict of yours").wait_for()
    with page.expect_download() as got:
        page.locator("#download").click()
    assert got.value.suggested_filename == "Zoë B.x.csv"
    got.value.save_as(tmp_path / "Zoë B.x.csv")
    with (tmp_path / "Zoë B.x.csv").open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == COLUMNS
    assert [row[:5] for row in rows[:5]] == [
        ["s1", gallery.digests[1], "2", "yes", '=a ruler, "seen" <b>'],
        ["s1", gallery.digests[1], "0", "no", ""],
        ["s1", gallery.digests[1], "1", "unsure", ""],
        ["s2", gallery.digests[2], "0", "no", ""],
        ["s2", gallery.digests[2], "0", "undo", ""],
    ]
    assert {row[5] for row in rows} == {"Zoë B.x"}
    # the pipeline reads it as one of its own
    said = {event.key[::2]: event.verdict for event in standing(read_events(tmp_path / "Zoë B.x.csv").events).values()}
    of_pattern = {(f"s{n}", 2): "no" for n in (0, 3, 4, 5)}
    assert said == {("s1", 2): "yes", ("s1", 0): "no", ("s1", 1): "unsure", **of_pattern}
    with page.expect_download() as got:
        page.locator("#download-names").click()
    got.value.save_as(tmp_path / "names.csv")
    with (tmp_path / "names.csv").open(encoding="utf-8", newline="") as file:
        names = list(csv.reader(file))
    assert names[0] == ["sample", "segmentation", "region", "name", "reviewer"]
    assert names[1][2:] == ["2", "the right edge", "Zoë B.x"]
    assert names[1][1] == gallery.digests[int(names[1][0][1:])]
    assert complaints == []


def test_a_browser_that_keeps_nothing_says_so(browser: Any, report: tuple[Path, Gallery]) -> None:
    page, complaints = open_file(browser, report[0], viewport={"width": 360, "height": 740}, has_touch=True)
    page.evaluate(
        "() => { Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError') } }"
    )
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert barriers(page) == []
    page.locator("#grid .card").first.click()
    page.locator("#accept").click()
    page.locator("#who-name").fill("dora")
    page.locator("#who-start").click()
    page.locator("#kept", has_text="download your verdicts before you close it").wait_for()
    page.locator("#download", has_text="Download my 3 verdicts").wait_for()
    assert barriers(page) == []
    assert complaints == []


def test_a_thousand_samples_within_a_few_megabytes(browser: Any, report: tuple[Path, Gallery], tmp_path: Path) -> None:
    """Pictures of 64x64 pixels of noise, the worst that there is, and a critique of a thousand characters each."""
    rng = np.random.default_rng(3)
    n = 1000
    small, side = report[1], 64
    ids = [f"sample-{place:04d}" for place in range(n)]
    label_maps = np.zeros((n, side, side), dtype=np.uint8)
    label_maps[:, :, 20:40] = 1
    label_maps[:, 40:] = 2
    critique = next(iter(small.critiques.values()))
    large = replace(
        small,
        ids=ids,
        rows=np.arange(n),
        labels=np.arange(n) % 2,
        class_names=[small.classes[place % 2] for place in range(n)],
        entropies=rng.uniform(size=n).tolist(),
        attributions=rng.normal(size=(n, side, side)).astype(np.float32),
        label_maps=label_maps,
        digests=["d"] * n,
        shares=[{0: 0.5, 1: 0.3, 2: 0.2}] * n,
        critiques={
            sample: CritiqueRow(**{**vars(critique), "sample": sample, "critique": f"{sample} {'words ' * 170}"})
            for sample in ids
        },
        verdicts={},
        masked=[{0: 0.0, 1: 1.0, 2: 0.0}] * n,
        left_out={},
        given={},
    )
    images = rng.integers(0, 256, (n, 3, side, side), dtype=np.uint8)
    budget = 6_000_000
    kept, encoded = thumbnails(large, range(n), images, {}, budget)
    assert kept == list(range(n))
    text = render_page(Page(title="large"), FOLDER, page_data(large, kept, encoded, []))
    path = tmp_path / "large.html"
    path.write_text(text, encoding="utf-8")
    assert sum(len(str(value)) for each in encoded for value in each.values()) <= budget
    page, complaints = open_file(browser, path, viewport={"width": 1280, "height": 900})
    # what the page's own work takes, and not what else runs on the machine: under 2 s on an idle one
    timing = page.context.new_cdp_session(page)
    timing.send("Performance.enable", {"timeDomain": "threadTicks"})
    page.reload()
    page.locator("#grid .card svg").first.wait_for(state="attached")
    spent = {each["name"]: each["value"] for each in timing.send("Performance.getMetrics")["metrics"]}
    assert 0 < spent["TaskDuration"] < 2
    assert page.locator("#grid .card").count() == n
    assert page.locator("#grid .card svg").count() < 200  # the others wait until they are seen
    page.locator("#grid .card").last.scroll_into_view_if_needed()
    page.locator("#grid .card").last.locator("svg").first.wait_for()
    page.locator("#words").fill("sample-0777")
    page.locator("#grid-shown", has_text="(1 of 1000)").wait_for()
    assert complaints == []
