"""Training state in pieces, read with care: whatever their headers say, a value or an error that names the folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dreamer.training import sharded_state
from dreamer.training.distributed import Ranks
from dreamer.training.sharded_state import read_pieces, saved_shapes, write_pieces


def save_pieces(folder: Path, *pieces: tuple[dict[str, torch.Tensor], Any]) -> None:
    for rank, (tensors, info) in enumerate(pieces, start=1):
        text = info if isinstance(info, str) else json.dumps(info)
        file = folder / f"train_state_{rank:05d}_of_{len(pieces):05d}.safetensors"
        save_file(tensors, file, {"format": "pt", "DCP_SHARDING_INFO": text})


def at(*offsets: int) -> dict[str, Any]:
    return {"x": {"saved_offsets": offsets}}


def rows(*shape: int) -> dict[str, torch.Tensor]:
    return {"x": torch.ones(shape)}


def test_each_piece_is_on_the_disk_once_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[tuple[str, int]] = []
    monkeypatch.setattr(sharded_state, "fsync_path", lambda path: synced.append((path.name, path.stat().st_size)))
    (piece,) = write_pieces(tmp_path, {"x": torch.ones(3, 2)}, Ranks())
    assert synced == [("train_state_00001_of_00001.safetensors", piece.stat().st_size)]
    target = torch.zeros_like(saved_shapes(tmp_path, ("x",))["x"], device="cpu")
    read_pieces(tmp_path, {"x": target})
    assert torch.equal(target, torch.ones(3, 2))


def test_pieces_fit_together_in_any_order_and_along_any_side(tmp_path: Path) -> None:
    save_pieces(tmp_path, (rows(1, 2), at(2, 0)), (rows(2, 1), at(0, 0)), (rows(2, 1), at(0, 1)), (rows(0, 2), at(3, 0)))
    assert {name: tuple(t.shape) for name, t in saved_shapes(tmp_path, ("x",)).items()} == {"x": (3, 2)}


@pytest.mark.parametrize(
    "info",
    [
        "[]",
        "null",
        "3",
        "{",
        "[" * 100_000,
        {"x": []},
        {"x": None},
        {"x": {}},
        {"saved_offsets": ["x"]},
        *(
            {"x": {"saved_offsets": strange}}
            for strange in (None, "ab", ["x", "y"], [0], [0, 0, 0], [], [0, -1], [1 << 70, 0], [0.5, 0], [3, 0])
        ),
    ],
    ids=lambda info: str(info)[:40],
)
def test_a_header_that_says_something_else_is_damage(tmp_path: Path, info: Any) -> None:
    save_pieces(tmp_path, (rows(2, 2), at(0, 0)), (rows(2, 2), info))
    with pytest.raises(ValueError, match="use an earlier checkpoint") as caught:
        saved_shapes(tmp_path, ("x",))
    assert str(caught.value).startswith(f"{tmp_path}: ")


def test_long_names_make_no_long_errors(tmp_path: Path) -> None:
    save_pieces(tmp_path, ({"x" * 5000: torch.ones(1)}, {"y": 1}))
    with pytest.raises(ValueError, match="use an earlier checkpoint") as caught:
        saved_shapes(tmp_path, ("x",))
    assert len(str(caught.value)) < 1000


def test_pieces_that_overlap_hide_no_gap(tmp_path: Path) -> None:
    save_pieces(tmp_path, (rows(2, 2), at(0, 0)), (rows(2, 2), at(1, 0)), (rows(1, 2), at(4, 0)))  # row 3 is missing; 5 rows in all
    with pytest.raises(ValueError, match="the pieces of 'x' do not fit together"):
        saved_shapes(tmp_path, ("x",))
    save_pieces(tmp_path, (rows(2, 2), at(0, 0)), (rows(1, 2), at(2, 0)), (rows(1, 2), at(4, 0)))
    with pytest.raises(ValueError, match="a piece of 'x' is missing"):
        saved_shapes(tmp_path, ("x",))
