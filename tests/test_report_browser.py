"""The report page in headless Chromium: plots are drawn, nothing else is requested, and it is there at once."""

import json
import re
import shutil
import subprocess
import threading
from contextlib import contextmanager
from html import unescape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from hf_sl2o.experiments.report import report_on, write_page
from hf_sl2o.experiments.report.parts import Chart

from .test_report import E2E, RESULTS

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium, chromium-browser or google-chrome on PATH"),
]
OPTIONS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars"
).split()
SECOND = 1000.0  # ms

# A page around the report, which measures it. It has a script, the report has none.
FRAME = """<!doctype html><html><head><link rel="icon" href="data:,"></head><body style="margin:0"><script>
const start = performance.now();
const rect = (at) => { const r = at.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]; };
function seen(frame) {
  const page = frame.contentDocument, root = page.documentElement;
  const figures = [...page.querySelectorAll("figure > svg")].map((svg) => ({
    title: svg.getAttribute("aria-label"), frame: rect(svg), scale: svg.clientWidth / svg.viewBox.baseVal.width,
    lines: [...svg.querySelectorAll("path.l")].map((line) => ({length: line.getTotalLength(), at: rect(line),
      stroke: frame.contentWindow.getComputedStyle(line).stroke})),
    bars: [...svg.querySelectorAll("rect.r")].map(rect), texts: [...svg.querySelectorAll("text")].map(rect),
  }));
  const said = {ms: performance.now() - start, wide: root.scrollWidth, room: root.clientWidth, figures,
    text: page.body.innerText.length};
  const out = document.createElement("pre");
  out.id = "out"; out.textContent = JSON.stringify(said); document.body.append(out);
}
</script><iframe src="/report.html" width="WIDTH" height="800" style="border:0" onload="seen(this)"></iframe>"""


@contextmanager
def served(files):
    """Serves texts by path on loopback; gives the address and the list of what was asked for."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            content = files.get(self.path)
            self.send_response(404 if content is None else 200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write((content or "").encode("utf-8", "replace"))

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def browse(folder, *words):
    out = subprocess.run(
        [CHROMIUM, *OPTIONS, f"--user-data-dir={folder}", *map(str, words)],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert out.returncode == 0, out.stderr[-2000:]
    return out.stdout


def measured(tmp_path, text, width):
    """What the browser says of a report in a window of so many pixels, and what it asked for."""
    with served({"/": FRAME.replace("WIDTH", str(width)), "/report.html": text}) as (address, asked):
        dom = browse(tmp_path / "profile", "--window-size=1300,900", "--dump-dom", f"{address}/")
    found = re.search(r'<pre id="out">(.*?)</pre>', dom, flags=re.DOTALL)
    assert found, dom[-500:]
    return json.loads(unescape(found[1])), asked


def text_of(path, folder):
    assert write_page(report_on(path), folder / "page.html") < 1_000_000
    return (folder / "page.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("width", [360, 1200])
@pytest.mark.parametrize("name", ["gpt2_e2e", "resnet8_cifar"])
def test_every_plot_is_drawn_inside_its_frame_and_nothing_else_is_asked_for(tmp_path, name, width):
    path = RESULTS / f"{name}.json"
    found, asked = measured(tmp_path, text_of(path, tmp_path), width)
    assert asked == ["/", "/report.html"]
    expected = report_on(path).figures()
    assert [figure["title"] for figure in found["figures"]] == [figure.title for figure in expected]
    for drawn, figure in zip(found["figures"], expected, strict=True):
        left, top, right, bottom = drawn["frame"]
        assert right - left > 300 and bottom - top > 100
        if isinstance(figure, Chart):
            assert len(drawn["lines"]) == len(figure.curves)
            assert all(line["length"] > 20 and line["stroke"].startswith("rgb") for line in drawn["lines"])
        else:
            assert len(drawn["bars"]) == sum(bar.value is not None for bar in figure.bars) > 0
        for place in (*(line["at"] for line in drawn["lines"]), *drawn["bars"], *drawn["texts"]):
            assert place[0] >= left - 2 and place[2] <= right + 2, (figure.title, place, drawn["frame"])
            assert place[1] >= top - 2 and place[3] <= bottom + 2, (figure.title, place, drawn["frame"])
        assert 11.5 * drawn["scale"] > 10  # the least size of text, in pixels
    assert found["room"] == width and found["wide"] <= width  # no scrolling to the side
    assert found["text"] > 1000 and found["ms"] < SECOND


def test_what_the_checks_see(tmp_path):
    """Where a plot is broken, or wider than its page, the measurements above say so."""
    text = text_of(E2E, tmp_path)
    broken = re.sub(r'(<path class="l [^>]* d=")[^"]*"', r'\1M10 10LNaN 5"', text, count=1)
    broken = broken.replace("<h1>", '<div style="width:900px">.</div><h1>', 1)
    found, _ = measured(tmp_path, broken, 360)
    assert found["figures"][0]["lines"][0]["length"] == 0 < found["figures"][0]["lines"][1]["length"]
    assert found["wide"] > 900 > found["room"]


def test_no_request_leaves_the_page_even_if_a_name_could_ask(tmp_path):
    text = text_of(E2E, tmp_path)
    leaking = text.replace("<h1>", '<img src="/leak.png"><link rel="stylesheet" href="/leak.css"><h1>', 1)
    policy = re.search(r"<meta http-equiv[^>]*>", leaking)[0]
    _, asked = measured(tmp_path, leaking, 1200)
    assert asked == ["/", "/report.html"]
    _, asked = measured(tmp_path, leaking.replace(policy, ""), 1200)  # the server sees it without the policy
    assert sorted(asked) == ["/", "/leak.css", "/leak.png", "/report.html"]


@pytest.mark.parametrize("size", ["360,800", "1200,900"])
def test_a_picture_of_the_page_shows_the_curves(tmp_path, size):
    image = pytest.importorskip("matplotlib.image", reason="matplotlib reads the picture")
    (tmp_path / "report.html").write_text(text_of(E2E, tmp_path), encoding="utf-8")
    picture = tmp_path / "picture.png"
    address = Path(tmp_path / "report.html").as_uri()
    browse(tmp_path / "profile", f"--window-size={size}", f"--screenshot={picture}", address)
    pixels = image.imread(picture)[..., :3]
    height, width = (int(number) for number in reversed(size.split(",")))
    assert pixels.shape[:2] == (height, width)
    colours = {tuple(pixel) for pixel in (255 * pixels[::3, ::3]).round().astype(int).reshape(-1, 3).tolist()}
    assert len(colours) > 30  # text and lines, not one colour
    if width > 1000:  # the first curves are in sight, that of SL2O among them
        near = abs(255 * pixels - [0xC2, 0x41, 0x0C]).max(axis=-1) < 3
        assert near.sum() > 100
