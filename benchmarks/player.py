"""Frames a second and milliseconds from key to frame, as a headless Chromium sees them. See docs/play.md.

    python benchmarks/player.py runs/demo [--clock 10 20 60] [--threads 1] [--device cuda] [--json FILE]

``dreamer play`` runs as it does for a person, and the page is used as it is. For each clock, in frames a second: how many frames are drawn
while nobody presses anything, and then, for presses at uneven times, the milliseconds from the key until its frame is drawn.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from machine import Machine

SETTLE = 2000  # ms after a change before anything is measured
LISTEN = """
window.heard = {frames: [], delays: []};
new MutationObserver((changes) => {
  const names = changes.map((change) => change.attributeName), {frames, delays} = window.heard;
  if (names.includes("data-frame")) frames.push(performance.now());
  if (names.includes("data-delay")) delays.push(Number(document.body.dataset.delay));
}).observe(document.body, {attributeFilter: ["data-frame", "data-delay"]});
"""


@dataclass(frozen=True)
class Played:
    """At one clock. ``frames_per_second``: drawn with no key pressed; a press may bring a frame early, and adds to it."""

    clock: float
    frames_per_second: float
    slowest_frame_ms: float  # the longest time between two of them
    key_to_frame_ms: float  # median
    key_to_frame_ms_95: float  # 95th percentile
    presses: int
    model_ms: float  # the server's time for the last frame


class Browser:
    """A page, and what it draws. The page's policy forbids Playwright's own way of asking it; the debugger's is not bound by it."""

    def __init__(self, page: Any, link: str) -> None:
        self.page = page
        page.goto(link)
        self._tools = page.context.new_cdp_session(page)
        page.wait_for_selector("body[data-frame]", timeout=120_000)
        self._ask(LISTEN)

    def _ask(self, text: str) -> Any:
        answer = self._tools.send("Runtime.evaluate", {"expression": text, "returnByValue": True})
        if "exceptionDetails" in answer:
            raise RuntimeError(f"the page says {answer['exceptionDetails']['text']} to {text!r}")
        return answer["result"].get("value")

    def frames(self, seconds: float) -> list[float]:
        """When frames were drawn in the next ``seconds``, in ms."""
        self._ask("heard.frames = []")
        self.page.wait_for_timeout(1000 * seconds)
        return self._ask("heard.frames")

    def delays(self, presses: int) -> list[float]:
        """What each of some presses took until its frame was drawn, in ms; those that one frame answered count once."""
        self._ask("heard.delays = []")
        rng = random.Random(0)
        for _ in range(presses):
            self.page.keyboard.press(rng.choice(("ArrowLeft", "ArrowRight", "ArrowUp")), delay=rng.uniform(30, 90))
            self.page.wait_for_timeout(rng.uniform(150, 350))
        return self._ask("heard.delays")


def measure(browser: Browser, clock: float, seconds: float, presses: int) -> Played:
    page = browser.page
    page.locator("#rate").fill(f"{clock:g}")
    page.locator("#dream").click()
    page.wait_for_timeout(SETTLE)
    frames, delays = browser.frames(seconds), browser.delays(presses)
    notice = page.locator("#notice")
    if notice.is_visible() or len(frames) < 3 or len(delays) < presses / 2:
        raise RuntimeError(f"{len(frames)} frames, {len(delays)} of {presses} presses answered; the page says {notice.text_content()!r}")
    gaps = [after - before for before, after in zip(frames, frames[1:], strict=False)]
    cuts = statistics.quantiles(delays, n=20, method="inclusive")
    model = float((page.locator("#model").text_content() or "").removesuffix(" ms"))
    rate = 1000 * len(gaps) / (frames[-1] - frames[0])
    return Played(clock, rate, max(gaps), statistics.median(delays), cuts[-1], len(delays), model)


@contextmanager
def serving(checkpoint: Path, *words: str) -> Iterator[str]:
    """The link of a ``dreamer play`` of its own."""
    command = [sys.executable, "-m", "dreamer.cli", "play", str(checkpoint), "--no-open", "--port", "0", *words]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        first = server.stdout.readline()
        if not first.startswith("play here: "):
            raise SystemExit(server.wait() or 1)  # it has said why
        yield first.removeprefix("play here: ").strip()
    finally:
        server.terminate()
        server.wait()


@contextmanager
def chromium() -> Iterator[Any]:
    """A headless browser without a graphics card."""
    from playwright.sync_api import sync_playwright

    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        raise SystemExit("Chromium is missing (Debian: apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Playing, measured from the browser.")
    parser.add_argument("checkpoint", type=Path, help="as for dreamer play")
    parser.add_argument("--clock", type=float, nargs="+", default=[10, 20, 60], help="frames a second")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1, help="of the server's PyTorch")
    parser.add_argument("--seconds", type=float, default=15.0, help="of frames for each clock")
    parser.add_argument("--presses", type=int, default=60, help="for each clock")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    arguments = command_line().parse_args(argv)
    machine, load = Machine(arguments.device, arguments.threads), os.getloadavg()[0]
    print(f"load average before {load:.2f}", flush=True)
    figures = []
    with serving(arguments.checkpoint, "--device", arguments.device, "--threads", str(arguments.threads)) as link, chromium() as chrome:
        browser = Browser(chrome.new_page(viewport={"width": 1280, "height": 900}), link)
        about = {"checkpoint": browser.page.locator("#name").text_content(), "Chromium": chrome.version}
        about |= {"denoising steps": browser.page.locator("#num_steps").input_value()}
        about |= {"real beside dream": browser.page.locator("#real-figure").is_visible()}
        for clock in arguments.clock:
            figures.append(found := measure(browser, clock, arguments.seconds, arguments.presses))
            rates = f"{found.frames_per_second:>7.1f} frames/s (longest gap {found.slowest_frame_ms:.0f} ms)"
            delays = f"{found.key_to_frame_ms:>6.0f} ms from key to frame (95 %: {found.key_to_frame_ms_95:.0f})"
            print(f"clock {clock:>4g}{rates}{delays}, model {found.model_ms:.0f} ms", flush=True)
    loads = {"before": load, "after": os.getloadavg()[0]}
    machine.write(arguments.json, figures=list(map(vars, figures)), player=about, load_average=loads)


if __name__ == "__main__":
    main()
