"""Arrays and JSON from elsewhere: bounded, never unpickled, and every error names its file."""

import io
import json
import zipfile

import numpy as np
import pytest

from dreamer.data.readers import files
from dreamer.data.readers.files import load_json, load_jsonl, load_npy, load_npz, npz_shapes


def npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """A header without the numbers that it promises."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": dtype, "fortran_order": False, "shape": shape})
    return stream.getvalue()


def test_arrays_are_loaded(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.arange(6).reshape(2, 3), y=np.zeros(4), z=np.array(["none"]))
    assert npz_shapes(tmp_path / "a.npz") == {"x": (2, 3), "y": (4,), "z": (1,)}
    assert set(load_npz(tmp_path / "a.npz")) == {"x", "y", "z"}
    assert load_npz(tmp_path / "a.npz", ["x"])["x"].tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(("dtype", "shape"), [("<f8", (1 << 40,)), ("<i4", (1 << 20, 1 << 20)), ("|u1", (1 << 62,)), ("<U0", (1 << 40,))])
def test_headers_that_promise_more_than_there_is_are_refused(tmp_path, dtype, shape):
    (tmp_path / "a.npy").write_bytes(npy_header(dtype, shape))
    with pytest.raises(ValueError, match=r"a\.npy: cannot be read .*its header promises"):
        load_npy(tmp_path / "a.npy")
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", npy_header(dtype, shape))
    with pytest.raises(ValueError, match=r"a\.npz: cannot be read .*its header promises"):
        load_npz(tmp_path / "a.npz")


def test_archives_that_unpack_to_too_much_are_refused(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "a.npz", x=np.zeros(1 << 20))
    assert (tmp_path / "a.npz").stat().st_size < 1 << 14
    monkeypatch.setattr(files, "MAX_NPZ_BYTES", 1 << 20)
    with pytest.raises(ValueError, match=r"a\.npz: cannot be read \(it unpacks to 8388736 bytes, more than 1048576"):
        load_npz(tmp_path / "a.npz")


def test_objects_are_never_unpickled(tmp_path):
    np.save(tmp_path / "a.npy", np.array([print], object), allow_pickle=True)
    np.savez(tmp_path / "a.npz", x=np.array([{"a": 1}], object))
    for load, name in ((load_npy, "a.npy"), (load_npz, "a.npz"), (npz_shapes, "a.npz")):
        with pytest.raises(ValueError, match=f"{name}: cannot be read .*objects"):
            load(tmp_path / name)


def test_what_is_missing_or_no_archive_is_named(tmp_path):
    for load, name in ((load_npy, "a.npy"), (load_npz, "a.npz"), (load_json, "a.json"), (lambda file: load_jsonl(file, 9), "a.jsonl")):
        with pytest.raises(ValueError, match=f"{name}:.* cannot be read"):
            load(tmp_path / name)
        (tmp_path / name).write_bytes(b"\xff\xfe hello")
        with pytest.raises(ValueError, match=f"{name}:.* cannot be read"):
            load(tmp_path / name)


@pytest.mark.parametrize("text", ["", "{", "NaN", "-Infinity", "1e999", "[" * 100_000, "9" * 5000, '{"a": 1} x'])
def test_what_is_no_json_is_named(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"a\.json: cannot be read"):
        load_json(tmp_path / "a.json")
    (tmp_path / "a.jsonl").write_text(f"[1]\n{text}\n[2]\n")
    with pytest.raises(ValueError, match=r"a\.jsonl: line 2 cannot be read .*; remove this line and those behind it"):
        load_jsonl(tmp_path / "a.jsonl", 9)


def test_large_json_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_JSON_BYTES", 20)
    (tmp_path / "a.json").write_text(json.dumps(list(range(30))))
    with pytest.raises(ValueError, match=r"a\.json: cannot be read \(more than 20 bytes"):
        load_json(tmp_path / "a.json")
    (tmp_path / "a.jsonl").write_text("[1]\n" + json.dumps(list(range(30))))
    with pytest.raises(ValueError, match=r"a\.jsonl: line 2 cannot be read \(more than 20 bytes"):
        load_jsonl(tmp_path / "a.jsonl", 9)


def test_lines_are_counted(tmp_path):
    file = tmp_path / "a.jsonl"
    for end in ("", "\n", "\n\n"):
        file.write_text('{"a": 1}\n{"a": 2}' + end)
        assert load_jsonl(file, 2) == [{"a": 1}, {"a": 2}]
    with pytest.raises(ValueError, match=r"a\.jsonl: line 2 cannot be read \(more than 1 lines"):
        load_jsonl(file, 1)
    file.write_text('{"a": 1}\n\n{"a": 2}\n')  # a row that was lost would shift all actions behind it
    with pytest.raises(ValueError, match=r"a\.jsonl: line 2 cannot be read"):
        load_jsonl(file, 9)
    file.write_text("")
    assert load_jsonl(file, 9) == []
