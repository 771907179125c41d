"""`lvlmva review` through HTTP, as a process: who may ask, what reaches the disk, and what the masks make of it."""

import json
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from lvlmva_core.arrays import read_array, read_json
from lvlmva_core.overrides import Verdict, add_verdict, standing, take_back
from lvlmva_core.regions import segmentation_digest
from lvlmva_core.report.tables import corrected_by
from tests.pipeline.review import COUNT, LONG, PAGE, SIDE, ReviewServer, run_mask, write_project


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReviewServer]:
    """One process for most tests, each of which has reviewers of its own."""
    folder = tmp_path_factory.mktemp("review") / "project"
    write_project(folder)
    with ReviewServer(folder) as running:
        _only_the_token_opens(running)
        yield running
        assert running.end(signal.SIGINT) == ""  # no traceback and no log line, whatever was asked


def _only_the_token_opens(server: ReviewServer) -> None:
    """Here, since the token works once; held before any other test."""
    for path in ("/", "/review.js", "/api/page", "/?token=", "/?token=wrong", f"/api/page?token={server.token}"):
        refused = server.get(path)
        assert (refused.status, refused.body[:8]) == (403, b"refused:"), path
    answer = server.get(f"/?token={server.token}")
    assert (answer.status, answer.headers["location"]) == (303, "/")
    cookie = answer.headers["set-cookie"]
    assert {part.strip().lower() for part in cookie.split(";")[1:]} == {"httponly", "samesite=strict", "path=/"}
    assert server.token not in cookie
    again = server.get(f"/?token={server.token}")  # by somebody who saw the address
    assert again.status == 403
    assert b"was used already" in again.body
    server.cookie = cookie.partition(";")[0]
    assert server.get("/").status == 200
    assert server.get(f"/?token={server.token}").status == 303  # a second tab of whom it let in


def test_the_host_is_compared_exactly(server: ReviewServer) -> None:
    for host in (server.host, f"localhost:{server.port}", f"[::1]:{server.port}"):
        assert server.ask("GET", "/api/page", hosts=(host,)).status == 200
    wrong = ["127.0.0.1", f"127.0.0.1:{server.port + 1}", f"rebound.example:{server.port}", f"127.0.0.1.:{server.port}"]
    for hosts in [*((host,) for host in wrong), (server.host, server.host)]:
        assert server.ask("GET", "/api/page", hosts=hosts).status in (400, 421), hosts
    # even with the token, which a rebound page could not have
    assert server.ask("GET", f"/?token={server.token}", hosts=(f"rebound.example:{server.port}",)).status == 421


def test_only_the_page_itself_writes(server: ReviewServer) -> None:
    content = json.dumps({"reviewer": "mallory", "place": 0, "region": 0, "verdict": "no"}).encode()
    kind = {"Content-Type": "application/json"}
    own = f"http://{server.host}"
    for refused in (
        {},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},  # another port of this machine
        {"Sec-Fetch-Site": "none"},
        {"Sec-Fetch-Site": "cross-site", "Origin": own},
        {"Origin": "null"},
        {"Origin": "https://127.0.0.1"},
        {"Origin": f"http://localhost:{server.port}"},
        {"Origin": f"http://127.0.0.1:{server.port + 1}"},
    ):
        for path in ("/api/verdicts", "/api/undo", "/api/names"):
            assert server.ask("POST", path, content, {**kind, **refused}).status == 403, refused
    form = {"Sec-Fetch-Site": "same-origin", "Content-Type": "application/x-www-form-urlencoded"}
    assert server.ask("POST", "/api/verdicts", content, form).status == 415
    cookie, server.cookie = server.cookie, ""
    assert server.ask("POST", "/api/verdicts", content, PAGE).status == 403
    server.cookie = cookie
    assert server.events("mallory") == []
    assert server.ask("POST", "/api/verdicts", content, {**kind, "Origin": own}).status == 201  # an older browser
    assert len(server.events("mallory")) == 1


def test_what_cannot_be_meant_is_refused_in_a_line_and_writes_nothing(server: ReviewServer) -> None:
    good = {"reviewer": "eve", "place": 0, "region": 0, "verdict": "no", "note": ""}
    for change, status, words in (
        ({"verdict": "undo"}, 400, "verdict"),
        ({"verdict": None}, 400, "verdict"),
        ({"place": COUNT}, 404, "there are 6 samples"),
        ({"place": -1}, 400, "place"),
        ({"place": "0"}, 400, "place"),
        ({"region": 3}, 404, "no region 3"),
        ({"region": 255}, 404, "no region 255"),
        ({"more": 1}, 400, "more"),
        ({"note": "x" * 2001}, 409, "the note has 2001 characters"),
        ({"note": "x" * 70_000}, 413, "more than 65536 bytes"),
        ({"reviewer": "../../eve"}, 409, "expected a name"),
        ({"reviewer": "verdicts"}, 409, "expected a name"),
    ):
        answer = server.post("/api/verdicts", {**good, **change})
        assert answer.status == status, (change, answer)
        assert words in answer.json()["error"]
    for body in (b"", b"{", b"[" * 60_000, b"\xff", b"null"):
        assert server.ask("POST", "/api/verdicts", body, PAGE).status == 400
    assert server.events("eve") == []


def test_no_path_leads_out_of_the_page(server: ReviewServer) -> None:
    secret = (server.folder / "params.yaml").read_bytes()[:40]
    for path in (
        "/params.yaml",
        "/../params.yaml",
        "/%2e%2e/params.yaml",
        "/..%2f..%2fparams.yaml",
        "//etc/passwd",
        "/review.py",
        "/review_page/review.js",
        "/api/samples/0/..%2f..%2f..%2fparams.png",
        "/api/samples/-1/image.png",
        "/api/samples/6/image.png",
        "/api/samples/0/mask.png",
        "/api/samples/0/after.png",  # nothing was aligned yet
        "/index.html",
        "/api/samples/99999999999999999999/labels",
    ):
        answer = server.get(path)
        assert answer.status == 404, path
        assert secret not in answer.body
    assert server.get("/api/verdicts?reviewer=..%2f..%2fparams").status == 409
    assert server.ask("DELETE", "/api/verdicts", headers=PAGE).status == 405


def test_what_a_model_wrote_is_data_and_the_page_runs_nothing_inline(server: ReviewServer) -> None:
    answer = server.get("/api/samples/0/critique")
    assert answer.json() == {"critique": LONG}
    assert answer.headers["content-type"] == "application/json"
    page = server.get("/")
    policy = dict(part.strip().split(" ", 1) for part in page.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == "'self'"
    for headers in (answer.headers, page.headers):
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store"
    html = page.body.decode()
    assert re.findall(r"<script(?![^>]* src=)", html) == []
    assert re.findall(r"\s(on\w+|style)=", html) == []
    for script in ("dom.js", "disk.js", "gallery.js", "patterns.js", "picture.js", "review.js", "server.js"):
        found = server.get(f"/{script}")
        assert found.headers["content-type"].startswith("text/javascript")
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b", found.body.decode())


def test_the_page_is_told_what_the_stages_wrote(server: ReviewServer) -> None:
    page = server.get("/api/page").json()
    assert page["critics"] == page["judges"] == [{"name": "rules", "stand_in": True}]
    segments = read_array(server.folder / "data/segments.zarr", "segments")
    maps = read_array(server.folder / "data/attributions.zarr", "attributions").astype(float)
    for n, sample in enumerate(page["samples"]):
        assert sample["class"] == ["benign", "<b>malignant</b>"][n % 2]
        total = sum(max(value, 0.0) for value in maps[n].flat)
        for region in sample["regions"]:
            inside = sum(
                max(value, 0.0)
                for value, r in zip(maps[n].flat, segments[n].flat, strict=True)
                if r == region["region"]
            )
            assert region["share"] == pytest.approx(inside / total)
            assert region["verdict"] == ("no" if region["region"] == 2 else "yes")
            assert region["asked"] == ((n, region["region"]) != (COUNT - 1, 1))
        assert server.get(f"/api/samples/{n}/labels").body == segments[n].tobytes()
    for kind in ("image", "before"):
        answer = server.get(f"/api/samples/0/{kind}.png")
        assert (answer.headers["content-type"], answer.body[:8]) == ("image/png", b"\x89PNG\r\n\x1a\n")
    assert server.get("/api/found?words=CORNER+sample").json() == [1, 2, 3, 4, 5]
    assert server.get("/api/found?words=s0+%3Cscript").json() == [0]


def test_patterns_are_told_and_keep_the_names_that_a_reviewer_gives(server: ReviewServer) -> None:
    (pattern,) = server.get("/api/page").json()["patterns"]
    assert pattern["members"] == [[n, 2] for n in range(COUNT)]  # what the critic rejected
    answer = server.post("/api/names", {"reviewer": "nora", "pattern": 0, "name": " the <b>right</b>\n edge "})
    assert (answer.status, answer.json()) == (201, {"name": "the <b>right</b> edge"})
    (renamed,) = server.get("/api/page").json()["patterns"]
    assert renamed == {**pattern, "name": "the <b>right</b> edge"}
    assert b'value="the &lt;b&gt;right&lt;/b&gt; edge"' in server.get("/").body
    for change, status, words in (
        ({"pattern": 1}, 404, "there are 1 patterns"),
        ({"name": ""}, 409, "has 0 characters"),
        ({"reviewer": "../nora"}, 409, "expected a name"),
    ):
        refused = server.post("/api/names", {"reviewer": "nora", "pattern": 0, "name": "x", **change})
        assert refused.status == status
        assert words in refused.json()["error"]
    kept = (server.folder / "overrides/patterns/nora.csv").read_text().splitlines()
    anchor = renamed["anchor"]
    assert kept[1:] == [f"{anchor['sample']},{anchor['segmentation']},2,the <b>right</b> edge,nora"]
    assert server.events("nora") == []


def test_two_tabs_and_two_reviewers_write_at_once_and_lose_nothing(server: ReviewServer) -> None:
    answers: dict[str, list[int]] = {"anna": [], "bert": []}

    def tab(reviewer: str, offset: int) -> None:
        for n in range(10):
            answer = server.say(reviewer, (n + offset) % COUNT, n % 3, ["yes", "no", "unsure"][n % 3])
            answers[reviewer].append(answer.json()["order"])

    tabs = [threading.Thread(target=tab, args=(name, offset)) for name in answers for offset in (0, 3)]
    for each in tabs:
        each.start()
    for each in tabs:
        each.join()
    for reviewer, orders in answers.items():
        assert sorted(orders) == list(range(1, 21))
        assert [event.order for event in server.events(reviewer)] == list(range(1, 21))
        shown = server.get(f"/api/verdicts?reviewer={reviewer}").json()
        expected = {(e.sample, e.region): e.verdict for e in standing(server.events(reviewer)).values()}
        assert {(f"s{v['place']}", v["region"]): v["verdict"] for v in shown["verdicts"]} == expected
        assert shown["stale"] == 0


def test_undo_takes_back_the_verdict_that_was_seen(server: ReviewServer) -> None:
    for verdict in ("yes", "no"):
        server.say("carl", 1, 1, verdict, "  a\n note ")
    answer = server.post("/api/undo", {"reviewer": "carl", "order": 2}).json()
    assert (answer["place"], answer["region"]) == (1, 1)
    assert [(v["verdict"], v["note"], v["order"]) for v in answer["verdicts"]] == [("yes", "a note", 1)]
    stale_tab = server.post("/api/undo", {"reviewer": "carl", "order": 2})
    assert stale_tab.status == 409
    assert "does not stand any more" in stale_tab.json()["error"]
    assert [event.verdict for event in server.events("carl")] == ["yes", "no", "undo"]


def test_killed_at_any_moment_and_started_again_no_answered_verdict_is_lost(tmp_path: Path) -> None:
    folder = tmp_path / "project"
    segments = write_project(folder)
    server = ReviewServer(folder)
    server.log_in()
    answered: list[tuple[str, int, str, int]] = []

    def click() -> None:
        for n in range(10_000):
            verdict = ["yes", "no", "unsure"][n % 3]
            try:
                answer = server.say("anna", n % COUNT, n % 3, verdict)
            except (OSError, ValueError):  # killed in the middle of an answer
                return
            answered.append((f"s{n % COUNT}", n % 3, verdict, answer.json()["order"]))

    clicking = threading.Thread(target=click)
    clicking.start()
    while len(answered) < 30:
        assert clicking.is_alive()
    server.end(signal.SIGKILL)
    clicking.join()
    with ReviewServer(folder) as again:
        again.log_in()
        events = [(e.sample, e.region, e.verdict, e.order) for e in again.events("anna")]
        assert events[: len(answered)] == answered
        assert len(events) <= len(answered) + 1  # the one that was under way
        assert {e.segmentation for e in again.events("anna")} == {segmentation_digest(each) for each in segments}
        shown = again.get("/api/verdicts?reviewer=anna").json()["verdicts"]
        assert max(v["order"] for v in shown) == len(events)
        # the outputs are made anew under a page that is open
        (folder / "data/segments.zarr/zarr.json").touch()
        refused = again.say("anna", 0, 0, "yes")
        assert refused.status == 409
        assert "have changed since this page was served" in refused.json()["error"]
        assert len(again.events("anna")) == len(events)
        assert again.end(signal.SIGTERM) == ""


def test_the_masks_follow_the_reviewers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "project"
    segments = write_project(folder)
    (folder / "overrides/verdicts.csv").write_text("sample,segmentation,region,verdict\ns5,old,0,no\n")
    verdicts: list[tuple[str, int, int, Verdict]] = [
        ("anna", 0, 0, "no"),  # alone
        ("anna", 1, 2, "yes"),
        ("bert", 1, 2, "yes"),
        ("carl", 1, 2, "no"),  # outvoted
        ("anna", 2, 2, "yes"),
        ("bert", 2, 2, "no"),  # a tie: the critic's "no" stands
        ("anna", 3, 2, "unsure"),  # masks nothing
        ("anna", 4, 0, "no"),  # undone
    ]
    for reviewer, place, region, verdict in verdicts:
        key = (f"s{place}", segmentation_digest(segments[place]), region)
        add_verdict(folder / "overrides", key, verdict, "", reviewer)
    take_back(folder / "overrides", 5, "anna")
    data = folder / "data"
    run_mask(folder)
    expected = {0: {0, 2}, 1: set(), 2: {2}, 3: set(), 4: {2}, 5: {2}}
    masks = read_array(data / "masks.zarr", "masks")
    for place, rejected in expected.items():
        by_pixel = [[int(value) in rejected for value in line] for line in segments[place]]
        np.testing.assert_array_equal(masks[place], by_pixel)
    assert masks.shape == (COUNT, SIDE, SIDE)
    said = capsys.readouterr().err
    assert f"tie: {folder}/overrides: region 2 of 's2': yes by anna, no by bert; the critic's verdict stands" in said
    assert f"stale override: {folder}/overrides: region 0 of 's5' by verdicts: it is of another segmentation" in said
    summary = read_json(folder / "mask.json")["mask"]
    assert (summary["verdicts_overridden"], summary["ties"], summary["stale_overrides"]) == (3, 1, 1)
    assert summary["reviewers"] == ["anna", "bert", "carl", "verdicts"]
    assert corrected_by(summary) == (
        "Reviewed by anna, bert, carl, verdicts: 3 verdicts are not the critic's; ties, where the critic's stands: 1; "
        "of earlier segmentations, which do not count: 1."
    )
    assert corrected_by({**summary, "reviewers": []}) == ""
