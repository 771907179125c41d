"""The review page in a real Chromium: by mouse, by key, after kill -9, on a phone, and against another site's form."""

import http.server
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline.browser import CHROMIUM, barriers, watched
from tests.pipeline.review import COUNT, LONG, SIDE, ReviewServer, write_project

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (Debian: apt-get install chromium)")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ReviewServer]:
    write_project(tmp_path / "project")
    with ReviewServer(tmp_path / "project") as running:
        yield running


def open_page(browser: Any, server: ReviewServer, reviewer: str, **context: Any) -> tuple[Any, list[str]]:
    """The page as a reviewer opens it for the first time, and what it complains of from then on."""
    page, complaints = watched(browser, server, **context)
    page.goto(server.address)
    page.locator("#who-name").fill(reviewer)
    page.locator("#who-name").press("Enter")
    page.locator("#pictures svg").first.wait_for()
    return page, complaints


def test_verdicts_by_mouse_and_by_key_reach_the_file_and_outlive_the_server(browser: Any, server: ReviewServer) -> None:
    page, complaints = open_page(browser, server, "anna", viewport={"width": 1280, "height": 900})
    assert server.token not in page.url
    assert "the stand-in “rules”" in page.locator("#judged .stand-in").first.inner_text()
    assert page.locator("#counter").inner_text() == f"0 of {COUNT} reviewed"
    # what the critic wrote is text, all of it
    page.locator("#critique").get_by_text("a long word").wait_for()
    assert page.evaluate("document.getElementById('critique').textContent") == LONG
    assert page.title() == "LVLM-VA on these pictures: review"
    assert page.locator("#critique").locator("*").count() == 0

    # by mouse: region 2 is clicked in the picture, at the right edge, and then its button
    box = page.locator("#pictures svg").first.bounding_box()
    page.mouse.click(box["x"] + box["width"] * (17 / SIDE), box["y"] + box["height"] * (10 / SIDE))
    chosen = page.locator("#regions .region.chosen")
    assert chosen.get_attribute("data-region") == "2"
    page.locator("#note").fill('=a ruler, "seen" <b>')
    chosen.get_by_role("button", name="No: region 3").click()
    page.locator('[data-region="2"] .state', has_text="saved").wait_for()
    (event,) = server.events("anna")
    assert (event.sample, event.region, event.verdict, event.note) == ("s0", 2, "no", '=a ruler, "seen" <b>')

    # by key: the first open region is chosen by itself, 2 chooses the second; after the last the next sample comes
    page.locator("#name").focus()
    page.keyboard.press("2")
    page.keyboard.press("y")
    page.keyboard.press("u")
    page.locator("#name", has_text="s1").wait_for()
    page.locator("#counter", has_text=f"1 of {COUNT}").wait_for()
    said = [(event.sample, event.region, event.verdict) for event in server.events("anna")]
    assert said == [("s0", 2, "no"), ("s0", 1, "yes"), ("s0", 0, "unsure")]
    page.keyboard.press("j")
    page.locator("#name", has_text="s2").wait_for()
    page.keyboard.press("k")
    page.locator("#name", has_text="s1").wait_for()
    page.keyboard.press("z")
    page.locator("#name", has_text="s0").wait_for()
    page.locator("#counter", has_text=f"0 of {COUNT}").wait_for()
    assert [event.verdict for event in server.events("anna")] == ["no", "yes", "unsure", "undo"]
    assert barriers(page) == []
    page.emulate_media(color_scheme="dark")
    assert barriers(page) == []
    page.keyboard.press("?")
    assert page.locator("#help-box").is_visible()
    assert barriers(page) == []
    page.keyboard.press("n")  # no verdict behind an open box
    page.keyboard.press("Escape")
    assert len(server.events("anna")) == 4
    assert complaints == []

    # killed between two clicks: the next one is refused aloud and taken back, what was saved is there again
    server.end(signal.SIGKILL)
    page.keyboard.press("n")
    page.locator("#error", has_text="not saved, region 1 of s0: the server does not answer").wait_for()
    assert page.locator('#regions [data-region="0"] [aria-pressed="true"]:not(.choose)').count() == 0
    with ReviewServer(server.folder, server.port) as again:
        page.goto(again.address)
        page.locator("#pictures svg").first.wait_for()
        assert page.locator("#name").inner_text() == "s0"
        pressed = page.locator('.verdicts [aria-pressed="true"]')
        assert sorted(pressed.evaluate_all("all => all.map(each => each.ariaLabel)")) == [
            "No: region 3, yellow",
            "Yes: region 2, blue",
        ]


def test_search_and_filters_and_a_phone(browser: Any, server: ReviewServer) -> None:
    page, complaints = open_page(browser, server, "bert", viewport={"width": 360, "height": 740}, has_touch=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert barriers(page) == []
    page.locator("#queue summary").click()
    page.locator("#words").fill("corner sample 4")
    page.locator("#shown", has_text="(1)").wait_for()
    page.locator("#name", has_text="s4").wait_for()
    page.locator("#words").fill("")
    page.locator("#shown", has_text=f"({COUNT})").wait_for()
    page.locator("#class").select_option("<b>malignant</b>")
    assert page.locator("#shown").inner_text() == "(3)"
    page.locator("#show").select_option("done")
    assert page.locator("#shown").inner_text() == "(0)"
    page.locator("#accept").click()
    page.locator("#counter", has_text=f"1 of {COUNT}").wait_for()
    assert [event.verdict for event in server.events("bert")] == ["yes", "yes", "no"]  # the critic's
    assert complaints == []
    assert server.end(signal.SIGINT) == ""


def test_another_sites_form_writes_nothing(browser: Any, server: ReviewServer, tmp_path: Path) -> None:
    page, _ = open_page(browser, server, "dora")
    form = (
        f'<form method="post" enctype="text/plain" action="http://{server.host}/api/verdicts">'
        """<input name='{"reviewer":"dora","place":0,"region":0,"verdict":"no","note":"' value='"}'></form>"""
        "<script>document.forms[0].submit()</script>"
    )
    (tmp_path / "index.html").write_text(form)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments, directory=str(tmp_path))

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as elsewhere:
        threading.Thread(target=elsewhere.serve_forever, daemon=True).start()
        # another port of this machine is the same site: the cookie goes along, and the server refuses
        with page.expect_response(lambda answer: answer.url.endswith("/api/verdicts")) as refused:
            page.goto(f"http://127.0.0.1:{elsewhere.server_port}/")
        assert refused.value.status == 403
        assert "cookie" in refused.value.request.all_headers()
        elsewhere.shutdown()
    assert server.events("dora") == []
    assert server.end(signal.SIGINT) == ""
