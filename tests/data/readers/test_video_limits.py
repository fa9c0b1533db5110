"""Videos that ask for too much, name other files, or were cut off: refused, with the file's name and before memory is spent."""

from __future__ import annotations

import io
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from dreamer.data.readers import frames
from dreamer.data.readers.ends import missing_bytes
from dreamer.data.readers.video import VideoReader

CONTAINERS = {"one.mp4": "mpeg4", "one.mov": "libx264", "one.mkv": "libx264", "one.webm": "libvpx-vp9", "one.avi": "mjpeg"}


def write(path: Path, codec: str = "mpeg4", rate: int = 20, streams: int = 1) -> Path:
    """Four frames of 16x16 in every stream."""
    size = (16, 16)
    with av.open(str(path), "w") as container:
        made = [container.add_stream(codec, rate=rate) for _ in range(streams)]
        for stream in made:
            stream.height, stream.width = size
            stream.pix_fmt = {"mjpeg": "yuvj420p", "png": "rgb24"}.get(codec, "yuv420p")
        for t in range(4):
            for stream in made:
                picture = av.VideoFrame.from_ndarray(np.full((*size, 3), 20 * t, np.uint8), format="rgb24")
                picture.pts = t
                container.mux(stream.encode(picture))
        for stream in made:
            container.mux(stream.encode())
    return path


def read(path: Path) -> np.ndarray:
    return VideoReader(path, frames_per_second=20.0, size=(16, 16)).read(path).frames


def large_jpeg() -> bytes:
    stream = io.BytesIO()
    Image.new("L", (8192, 4104)).save(stream, "JPEG", quality=1)
    return stream.getvalue()


def test_frames_that_are_too_large_are_refused(tmp_path: Path) -> None:
    """Half a kB that unpacks to 33 million pixels a frame: nothing in the container tells of it."""
    video = tmp_path / "bomb.avi"
    with av.open(str(video), "w") as container:
        stream = container.add_stream("mjpeg", rate=20)
        stream.height, stream.width, stream.pix_fmt = 16, 16, "yuvj420p"
        container.start_encoding()
        packet = av.Packet(large_jpeg())
        packet.stream, packet.pts, packet.dts, packet.is_keyframe = stream, 0, 0, True
        container.mux(packet)
    with av.open(str(video)) as container:  # what is refused here is a picture that would decode
        assert next(container.decode(video=0)).width == 8192
    with pytest.raises(ValueError, match=r"bomb\.avi: cannot be decoded after 0 frames .*more than the allowed 33554432 pixels"):
        read(video)


def test_a_list_of_other_files_is_no_video(tmp_path: Path) -> None:
    """FFmpeg knows formats whose files name other files; a recording must not read what its sender wishes."""
    write(tmp_path / "secret.mp4")
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile 'secret.mp4'\n")
    with av.open(str(tmp_path / "list.mp4")) as container:
        assert len(list(container.decode(video=0))) == 4
    with pytest.raises(ValueError, match=r"list\.mp4: cannot be decoded"):
        read(tmp_path / "list.mp4")


@pytest.mark.parametrize(("limit", "value"), [("MAX_TOTAL_PIXELS", 3 * 256), ("MAX_DECODED_BYTES", 3 * 3 * 256)])
def test_a_recording_that_is_too_much_in_all_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, value: int) -> None:
    video = write(tmp_path / "one.mp4")
    monkeypatch.setattr(frames, limit, value)
    with pytest.raises(ValueError, match=r"one\.mp4: more than 3 frames of 16x16, read as 16x16: too much for one recording"):
        read(video)
    monkeypatch.setattr(frames, limit, value * 4 // 3)
    assert len(read(video)) == 4


def test_many_streams_are_refused(tmp_path: Path) -> None:
    assert len(read(write(tmp_path / "some.mkv", streams=frames.MAX_STREAMS))) == 4
    with pytest.raises(ValueError, match=r"many\.mkv: 17 streams; expected at most 16"):
        read(write(tmp_path / "many.mkv", streams=frames.MAX_STREAMS + 1))


def test_other_codecs_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"one\.avi: cannot be decoded: its codec is png; expected one of av1, .*h264"):
        read(write(tmp_path / "one.avi", "png"))


def test_a_rate_that_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"fast\.mp4: says 5000 frames per second; expected at most 1000"):
        VideoReader(write(tmp_path / "fast.mp4", rate=5000))


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_file_that_was_cut_off_anywhere_is_refused(tmp_path: Path, name: str) -> None:
    video = write(tmp_path / name, CONTAINERS[name])
    whole = video.read_bytes()
    assert missing_bytes(video) == 0 and len(read(video)) == 4
    for length in range(0, len(whole), max(1, len(whole) // 80)):
        video.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=name):
            read(video)
    video.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=rf"{name}: cannot be decoded"):
        read(video)


@pytest.mark.parametrize("content", [b"", b"RIFF", b"\x1a\x45\xdf\xa3", b"\x1a\x45\xdf\xa3\x81a\x18\x53\x80\x67\xff"])
def test_what_tells_no_end_misses_nothing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "one").write_bytes(content)
    assert missing_bytes(tmp_path / "one") == 0
