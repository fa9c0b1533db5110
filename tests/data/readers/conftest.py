"""Damage to files, as broken disks and downloads leave them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import strategies as st


def _with_damage(file: Path, data: st.DataObject, check: Callable[[], None]) -> None:
    """``check()`` while the file is cut off, has some other bytes, or only other bytes; afterwards it is as before."""
    good = file.read_bytes()
    place = data.draw(st.integers(0, len(good) - 1))
    bad = st.one_of(
        st.just(good[:place]),
        st.binary(min_size=1, max_size=8).map(lambda b: good[:place] + b + good[place + len(b) :]),
        st.binary(max_size=64),
    )
    try:
        file.write_bytes(data.draw(bad))
        check()
    finally:
        file.write_bytes(good)


@pytest.fixture(scope="session")
def with_damage() -> Callable[[Path, st.DataObject, Callable[[], None]], None]:
    return _with_damage
