"""The report in a real browser: no errors, nothing fetched, no text of a model that acts, readable on a phone."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from .conftest import hfpipe

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
EVIL = "<script>document.title = 'taken'</script><img src=x onerror=\"console.error('taken')\">"


def browse(page: Path) -> tuple[str, list[str]]:
    """The page's DOM after its scripts have run, and what stands in the console; the network is cut off."""
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    options += ["--allow-file-access-from-files", "--host-resolver-rules=MAP * ~NOTFOUND", "--window-size=1280,900"]
    options += [f"--user-data-dir={page.parent / 'profile'}", "--virtual-time-budget=5000"]
    done = subprocess.run([BROWSER, *options, page.as_uri()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.fixture(scope="module")
def report(micro_run, tmp_path_factory) -> Path:
    """The report of a run in which a model has answered everything with HTML."""
    run = tmp_path_factory.mktemp("page") / "run"
    shutil.copytree(micro_run, run)
    for stage in ("midtrain", "sft", "dpo"):
        rows = [json.loads(line) for line in (run / stage / "probes.jsonl").read_text().splitlines()]
        told = [{**row, "answer": EVIL, "turns": [EVIL], "raw": EVIL} for row in rows]
        (run / stage / "probes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in told))
        samples = [{**s, "answer": EVIL} for s in json.loads((run / stage / "eval.json").read_text())["samples"]]
        (run / stage / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
        scores = json.loads((run / stage / "eval.json").read_text())
        (run / stage / "eval.json").write_text(json.dumps({**scores, "samples": samples}))
        record = json.loads((run / stage / "stage.json").read_text())
        (run / stage / "stage.json").write_text(json.dumps({**record, "sources": [{"text": 400 * "W"}]}))
    hfpipe("report", run)
    return run / "report.html"


def test_what_a_model_wrote_stays_text(report):
    dom, console = browse(report)
    assert console == []
    assert "<title>taken" not in dom
    assert html.escape(EVIL, quote=False) in dom
    assert not re.search(r"<img[^>]*onerror", dom)


def test_the_browser_notices_what_it_is_asked_to_notice(tmp_path):
    page = tmp_path / "page.html"
    page.write_text(f"<title>x</title><body>{EVIL}</body>")
    dom, console = browse(page)
    assert "<title>taken" in dom
    assert any("taken" in line for line in console)


@pytest.mark.parametrize("width", [390, 1200])
def test_no_page_is_wider_than_its_screen(report, width):
    frame = report.parent / f"frame{width}.html"
    frame.write_text(
        f"<title>waiting</title><iframe src=report.html width={width} height=800 onload="
        "'document.title = this.contentDocument.documentElement.scrollWidth'></iframe>"
    )
    dom, _ = browse(frame)
    found = re.search(r"<title>(\d+)</title>", dom)
    assert found, dom[:300]
    assert 0.9 * width <= int(found[1]) <= width
