"""``benchmarks/player.py`` measures a page in a real browser."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install playwright")

ROOT = Path(__file__).parents[2]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    module = importlib.import_module("player")
    monkeypatch.setattr(module, "SETTLE", 300)
    return module


def test_rate_and_delay_are_those_of_the_page(benchmark: Any, browser: Any, serve: Callable[..., Any]) -> None:
    page = browser.new_page()
    found = benchmark.measure(benchmark.Browser(page, serve().link), clock=20, seconds=2.0, presses=4)
    page.close()
    assert found.clock == 20 and found.slowest_frame_ms >= 1000 / found.frames_per_second > 0
    assert 2 <= found.presses <= 4 and 0 < found.key_to_frame_ms <= found.key_to_frame_ms_95 and found.model_ms > 0


def test_a_dream_that_stands_still_is_not_measured(benchmark: Any, browser: Any, serve: Callable[..., Any]) -> None:
    page = browser.new_page()
    watched = benchmark.Browser(page, serve().link)
    page.locator("#pause").click()
    page.get_by_text("paused: Play goes on").wait_for(timeout=60_000)
    page.wait_for_timeout(500)  # frames may be on their way
    with pytest.raises(RuntimeError, match="0 frames, 0 of 2 presses answered; the page says 'paused"):
        benchmark.measure(watched, clock=20, seconds=0.1, presses=2)
    page.close()


def test_the_server_of_its_own_is_the_command(benchmark: Any, run_path: Path, tmp_path: Path) -> None:
    with benchmark.serving(run_path) as link:
        assert link.startswith("http://127.0.0.1:") and "#" in link
    with pytest.raises(SystemExit), benchmark.serving(tmp_path):
        pass
