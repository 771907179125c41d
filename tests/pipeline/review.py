"""What the tests of `lvlmva review` start from: a small project as the stages leave it, and its server as a process."""

import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from lvlmva.page import FOLDER
from lvlmva_core.arrays import write_arrays, write_table
from lvlmva_core.lvlm.records import CritiqueRow, NotAsked, Region, Verdict, VerdictRow, write_rows
from lvlmva_core.overrides import Event, read_events, read_reviews, resolve
from lvlmva_core.regions import regions_present, segmentation_digest
from lvlmva_core.render import COLOUR_NAMES
from lvlmva_core.report.changes import change_tables
from lvlmva_core.report.findings import page_data
from lvlmva_core.report.gallery import Gallery, read_gallery, with_masks
from lvlmva_core.report.page import Page, render_page
from lvlmva_core.report.patterns_shown import cards, pattern_data
from lvlmva_core.report.thumbnails import thumbnails
from lvlmva_core.samples import read_images
from stages.mask import mask

ROOT = Path(__file__).parents[2]
COUNT, SIDE = 6, 20
NASTY = (
    "<script>document.title = 'owned'</script><img src=x onerror=\"document.title='owned'\"> \"'&amp; 🩻 שלום \u202e"
)
LONG = NASTY + "a long word of the critic " * 2000  # more than 50 kB
PAGE = {"Sec-Fetch-Site": "same-origin", "Content-Type": "application/json"}  # what the page's own requests hold


class Answer(NamedTuple):
    """What a server answered."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


def write_project(folder: Path) -> np.ndarray:
    """Write six samples with three regions each, judged by the stand-in `rules`; returns uint8 (6, 20, 20) regions."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for name in ("dvc.yaml", "params.yaml"):
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / "overrides", folder / "overrides", ignore=shutil.ignore_patterns(".*"))
    ids = [f"s{n}" for n in range(COUNT)]
    table = pd.DataFrame(
        {
            "id": ids,
            "split": "train",
            "label": np.arange(COUNT) % 2,
            "spurious": pd.array([None] * COUNT, dtype="boolean"),
            "group": "x",
            "source": "x",
            "sha256": "x",
        }
    )
    write_table(folder / "data/samples.parquet", table)
    write_table(
        folder / "data/alignment_set.parquet",
        pd.DataFrame({"id": ids, "entropy": np.linspace(0, 1, COUNT)}),
    )
    images = rng.integers(0, 256, (COUNT, 3, SIDE, SIDE), dtype=np.uint8)
    write_arrays(folder / "data/images.zarr", {"images": images}, {"class_names": ["benign", "<b>malignant</b>"]})
    segments = np.zeros((COUNT, SIDE, SIDE), dtype=np.uint8)
    segments[:, 12:] = 1
    segments[:, :, 15:] = 2
    segments[np.arange(COUNT), np.arange(COUNT), 0] = 255
    attributions = rng.normal(size=segments.shape).astype(np.float32)
    write_arrays(folder / "data/attributions.zarr", {"attributions": attributions}, {"ids": ids})
    attrs = {"ids": ids, "status": ["ok"] * COUNT, "n_regions": 3}
    write_arrays(folder / "data/segments.zarr", {"segments": segments}, attrs)
    critiques, verdicts = [], []
    for n, sample in enumerate(ids):
        of = {"sample": sample, "segmentation": segmentation_digest(segments[n]), "settings": {}, "failure": None}
        regions = [Region(region=r, color=COLOUR_NAMES[r]) for r in regions_present(segments[n])]
        text = LONG if n == 0 else f"sample {n}: the corner is bright"
        critiques.append(CritiqueRow(**of, critic="rules", regions=regions, class_name="x", critique=text, record=None))
        said = [Verdict(**region.model_dump(), verdict="no" if region.region == 2 else "yes") for region in regions]
        more = {}
        if n == COUNT - 1:  # nobody was asked about one of its regions
            more["not_asked"] = NotAsked(regions=regions[1:2], at_most=0.05, calls_saved=0)
            del said[1]
        verdicts.append(VerdictRow(**of, **more, critic="rules", judge="rules", verdicts=said, records=[]))
    write_rows(folder / "data/critiques.jsonl", critiques)
    write_rows(folder / "data/verdicts.jsonl", verdicts)
    return segments


class ReviewServer:
    """`lvlmva review`, or another page, as a process in a project.

    `get` and `post` are the page's own requests unless told otherwise.
    """

    def __init__(self, folder: Path, port: int = 0, name: str = "review", *options: str) -> None:
        self.folder = folder
        command = [sys.executable, "-m", "lvlmva.cli", name, "--port", str(port), "--no-browser", *options]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip()
        assert self.address.startswith("http://127.0.0.1:"), self.end(signal.SIGKILL)
        self.host, _, self.token = self.address.removeprefix("http://").partition("/?token=")
        self.port = int(self.host.partition(":")[2])
        self.cookie = ""

    def __enter__(self) -> "ReviewServer":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.end(signal.SIGKILL)

    def log_in(self) -> None:
        """Exchange the token for the cookie."""
        answer = self.ask("GET", f"/?token={self.token}")
        assert answer.status == 303, answer
        self.cookie = answer.headers["set-cookie"].partition(";")[0]

    def ask(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        hosts: tuple[str, ...] | None = None,
    ) -> Answer:
        """One request as it is given, with the cookie that is held."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.putrequest(method, path, skip_host=True)
            for host in (self.host,) if hosts is None else hosts:
                connection.putheader("Host", host)
            for name, value in {**({"Cookie": self.cookie} if self.cookie else {}), **(headers or {})}.items():
                connection.putheader(name, value)
            if body is not None:
                connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            answer = connection.getresponse()
            return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        finally:
            connection.close()

    def get(self, path: str) -> Answer:
        return self.ask("GET", path)

    def post(self, path: str, content: Mapping[str, Any], headers: Mapping[str, str] = PAGE) -> Answer:
        return self.ask("POST", path, json.dumps(content).encode(), headers)

    def say(self, reviewer: str, place: int, region: int, verdict: str, note: str = "") -> Answer:
        """A verdict as the page sends it."""
        content = {"reviewer": reviewer, "place": place, "region": region, "verdict": verdict, "note": note}
        return self.post("/api/verdicts", content)

    def events(self, reviewer: str) -> list[Event]:
        """What stands in a reviewer's file."""
        path = self.folder / "overrides" / f"{reviewer}.csv"
        return read_events(path).events if path.exists() else []

    def end(self, how: signal.Signals) -> str:
        """End the process; returns what it said on stderr."""
        self.process.send_signal(how)
        _, said = self.process.communicate(timeout=30)
        return said


def run_mask(folder: Path) -> None:
    """The stage `mask`, on a project of `write_project`."""
    data = folder / "data"
    mask(
        folder / "params.yaml",
        data / "segments.zarr",
        data / "verdicts.jsonl",
        folder / "overrides",
        data / "masks.zarr",
        folder / "mask.json",
        data / "attributions.zarr",
    )


def write_report(folder: Path) -> tuple[Path, Gallery]:
    """The project's report as one file, without what is measured after alignment; the stage `mask` runs before it."""
    data = folder / "data"
    run_mask(folder)
    names = ("images.zarr", "samples.parquet", "segments.zarr", "attributions.zarr", "alignment_set.parquet")
    paths = [data / name for name in (*names, "reliance.zarr", "critiques.jsonl", "verdicts.jsonl")]
    said = resolve(read_reviews(folder / "overrides").events)
    gallery = with_masks(read_gallery(*paths), data / "masks.zarr", said[0])
    images = read_images(data / "images.zarr", gallery.rows)
    patterns, rare = gallery.patterns(images)
    kept, encoded = thumbnails(gallery, range(COUNT), images, {"s1": -gallery.attributions[1]}, 10**6)
    page = Page(
        title="LVLM-VA on <b>these</b>",
        warning="No vision-language model was asked.",
        patterns=cards(gallery, patterns, images),
        rare=rare,
        tables=change_tables(gallery, *said),
        params=NASTY,
    )
    path = folder / "report.html"
    data_of_page = page_data(gallery, kept, encoded, pattern_data(gallery, patterns))
    path.write_text(render_page(page, FOLDER, data_of_page), encoding="utf-8")
    return path, gallery
