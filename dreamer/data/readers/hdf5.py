"""Looks at an episode in an HDF5 file before it is read: a few bytes can promise terabytes, name other files, or hide another format."""

from __future__ import annotations

import importlib
import io
from pathlib import Path
from typing import Any

from PIL import Image

MAX_EPISODE_BYTES = 8 << 30  # as it is read
_JPEG = b"\xff\xd8\xff"


def check_episode_group(file: Path, name: str) -> None:
    """Raise ``ValueError`` if the group ``name`` holds more than ``MAX_EPISODE_BYTES``, links to other places, data that lies in other
    files, or pictures that are no JPEG: minari would have Pillow open them as whatever they are, PostScript too.

    Raises also what h5py raises, for a file that it cannot read.
    """
    h5py = importlib.import_module("h5py")
    with h5py.File(file, "r") as root:
        num_bytes, waiting, seen = 0, [_own(h5py, root, name)], set()
        while waiting:
            item = waiting.pop()
            if (place := h5py.h5o.get_info(item.id).addr) in seen:
                raise ValueError(f"{item.name} occurs twice in it")
            seen.add(place)
            if isinstance(item, h5py.Group):
                waiting += [_own(h5py, item, key) for key in item]
                continue
            if item.external or item.is_virtual:
                raise ValueError(f"the data of {item.name} lie in other files")
            num_bytes += item.size * item.dtype.itemsize
            if num_bytes <= MAX_EPISODE_BYTES and h5py.check_vlen_dtype(item.dtype) not in (None, str, bytes):
                num_bytes += _picture_bytes(item)
            if num_bytes > MAX_EPISODE_BYTES:
                raise ValueError(f"it unpacks to {num_bytes} bytes, more than {MAX_EPISODE_BYTES}")


def _own(h5py: Any, group: Any, key: str) -> Any:
    """The member of a group, which must be its own."""
    link = group.get(key, getlink=True)
    if link is None:
        raise ValueError(f"{key} is missing")
    item = group[key] if isinstance(link, h5py.HardLink) else None
    if not isinstance(item, h5py.Group | h5py.Dataset):
        raise ValueError(f"{key} in {group.name} is a {type(link if item is None else item).__name__}; expected data or a group of them")
    return item


def _picture_bytes(dataset: Any) -> int:
    """What pictures of the size of the first one unpack to."""
    pictures = [bytes(picture) for picture in dataset[()].reshape(-1)]
    for number, picture in enumerate(pictures):
        if not picture.startswith(_JPEG):
            raise ValueError(f"picture {number} of {dataset.name} is no JPEG")
    if not pictures:
        return 0
    with Image.open(io.BytesIO(pictures[0]), formats=("JPEG",)) as first:
        return 3 * first.width * first.height * len(pictures)
