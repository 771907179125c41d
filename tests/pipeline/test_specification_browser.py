"""The specification in the review page, in a real Chromium. A module of its own: Playwright runs an event loop."""

from pathlib import Path
from typing import Any

import pytest

from lvlmva_core.arrays import read_array
from lvlmva_core.lvlm.prompts import read_specification
from lvlmva_core.overrides import add_verdict
from lvlmva_core.regions import segmentation_digest
from tests.pipeline.browser import CHROMIUM, barriers, watched
from tests.pipeline.review import ReviewServer
from tests.pipeline.test_specification import write_specified

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (Debian: apt-get install chromium)")


def test_an_expert_takes_over_what_corrections_share_and_saves(browser: Any, tmp_path: Path) -> None:
    folder = tmp_path / "project"
    write_specified(folder)
    file = folder / "prompts/decoy_digits/specification.yaml"
    for n, label_map in enumerate(read_array(folder / "data/segments.zarr", "segments")):
        add_verdict(folder / "overrides", (f"s{n}", segmentation_digest(label_map), 0), "no", "a ruler", "anna")
    with ReviewServer(folder) as mine:
        page, complaints = watched(browser, mine, viewport={"width": 1100, "height": 900})
        page.goto(mine.address)
        page.goto(f"http://{mine.host}/specification/")
        page.locator("#counted", has_text="on 6 of 18 regions").wait_for()
        assert "no model" in page.locator("#critic .stand-in").inner_text()
        assert "No model is configured" in page.locator("#who").inner_text()
        assert "No model was asked for this list" in " ".join(page.locator("main").inner_text().split())
        card = page.locator("#common .card", has_text="benign").first
        assert "3 regions called spurious or irrelevant by experts" in card.inner_text()
        assert "note: a ruler" in card.inner_text()
        assert barriers(page) == []
        card.get_by_role("button", name="accept: at the").first.click()
        page.locator("#features input").fill('a "ruler" <b>')
        page.locator('[data-class="benign"]').fill("Even, sharp, small.")
        page.get_by_role("button", name="Show the change and its price").click()
        page.locator("#diff .new", has_text="Even, sharp, small.").wait_for()
        assert 'a "ruler" <b>' in page.locator("#diff").inner_text()
        assert "does not read the specification" in page.locator("#price").inner_text()
        assert barriers(page) == []
        page.emulate_media(color_scheme="dark")
        page.set_viewport_size({"width": 360, "height": 740})
        assert barriers(page) == []
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        page.locator("#picture").fill("close photographs!")  # what was shown is no longer what would be saved
        page.locator("#plan").wait_for(state="hidden")
        page.get_by_role("button", name="Show the change and its price").click()
        page.locator("#save").click()
        page.locator("#status", has_text="Saved").wait_for()
        found = read_specification(file)
        assert found.classes["benign"] == "Even, sharp, small."
        assert found.spurious_features == ['a "ruler" <b>']
        assert found.picture == "close photographs!"
        assert "# none yet" in file.read_text()
        # a second tab, and an editor that was faster
        other = page.context.new_page()
        other.goto(f"http://{mine.host}/specification/")
        other.locator('[data-class="benign"]').fill("Something else.")
        changed = file.read_text().replace("ragged", "ragged, blurred")
        file.write_text(changed)
        other.get_by_role("button", name="Show the change and its price").click()
        other.locator("#error", has_text="has changed since you began").wait_for()
        assert other.locator('[data-class="benign"]').input_value() == "Something else."  # not lost either
        assert file.read_text() == changed
        assert complaints == []
