"""Set-up that every test shares: run-time shape checks, threads, seeds, markers."""

from __future__ import annotations

import os
import random
import typing

# Before anything imports them: pictures and games must not look for a screen.
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
os.environ.setdefault("SDL_AUDIODRIVER", "dummy")

import jaxtyping

# Shapes and types of every annotated function and dataclass of the package are checked in tests, and only there.
jaxtyping.install_import_hook("dreamer", "beartype.beartype")

import hypothesis  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

from dreamer import types  # noqa: E402

# beartype checks a value against a protocol with isinstance, which a protocol must allow.
for _noun in vars(types).values():
    if getattr(_noun, "_is_protocol", False) and _noun is not typing.Protocol:
        typing.runtime_checkable(_noun)

# OMP_NUM_THREADS counts: two threads that wait for each other on a busy machine make a test a hundred times slower.
torch.set_num_threads(int(os.environ.get("DREAMER_TEST_THREADS") or os.environ.get("OMP_NUM_THREADS") or min(2, os.cpu_count() or 1)))

# No deadline: a slow machine is not a failure. In CI the same examples every time.
hypothesis.settings.register_profile("dreamer", deadline=None, derandomize=bool(os.environ.get("CI")), database=None)
hypothesis.settings.load_profile("dreamer")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; this machine has none"))


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
