"""Whether a video file is all there. FFmpeg decodes what is left of a file that was cut off, and says nothing of the rest."""

from __future__ import annotations

from pathlib import Path
from typing import IO

_EBML, _SEGMENT = bytes.fromhex("1a45dfa3"), bytes.fromhex("18538067")


def missing_bytes(file: Path) -> int:
    """How much of an mp4, Matroska, WebM or AVI was cut off, by the sizes that it states; 0 for other formats.

    A file that was written without knowing its end (live WebM) states none, and cannot be told from a shorter one.
    """
    end = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(12)
        if start[4:8] == b"ftyp":
            place = _end_of_boxes(stream, end)
        elif start[:4] == b"RIFF" and start[8:] == b"AVI ":
            place = _end_of_chunks(stream, end)
        elif start[:4] == _EBML:
            place = _end_of_segment(stream)
        else:
            return 0
    return max(0, place - end)


def _end_of_boxes(stream: IO[bytes], end: int) -> int:
    """Where the last box of an mp4 that begins in the file ends."""
    place = 0
    while place + 8 <= end:
        stream.seek(place)
        head = stream.read(16)
        size = int.from_bytes(head[:4], "big")
        size = int.from_bytes(head[8:], "big") if size == 1 else size or end - place
        if size < 8:
            return 0  # no box
        place += size
    return place


def _end_of_chunks(stream: IO[bytes], end: int) -> int:
    """Of an AVI: RIFF chunks, one after the other."""
    place = 0
    while place + 8 <= end:
        stream.seek(place)
        head = stream.read(8)
        size = int.from_bytes(head[4:], "little")
        if head[:4] != b"RIFF" or size in (0, 0xFFFFFFFF):
            return place  # what follows is no part of it, or has no end that is known
        place += 8 + size + size % 2
    return place


def _end_of_segment(stream: IO[bytes]) -> int:
    """Of Matroska and WebM: a header and the segment, each with its size behind its name."""
    stream.seek(4)
    size = _ebml_size(stream)
    if size is None:
        return 0
    stream.seek(stream.tell() + size)
    if stream.read(4) != _SEGMENT or (size := _ebml_size(stream)) is None:
        return 0
    return stream.tell() + size


def _ebml_size(stream: IO[bytes]) -> int | None:
    """A number whose leading zero bits tell its length; all ones: not known."""
    first = stream.read(1)
    if not first or not first[0]:
        return None
    width = 9 - first[0].bit_length()
    value = int.from_bytes(bytes([first[0] & (0xFF >> width)]) + stream.read(width - 1), "big")
    return None if value == (1 << 7 * width) - 1 else value
