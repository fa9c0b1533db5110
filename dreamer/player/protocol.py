"""What page and server say to each other. The page sends JSON text alone; the server sends JSON text, and frames as bytes."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from dreamer.imagination.policy import Mode
from dreamer.types import Config

MAX_MESSAGE = 4096  # bytes
Degrees = Annotated[float, Field(ge=-180, le=180, allow_inf_nan=False)]
Place = Annotated[int, Field(ge=0, lt=2**31)]


class Message(Config):
    model_config = ConfigDict(strict=True)


class Input(Message):
    """What is held now, and by how much the mouse turned the camera since the last message."""

    type: Literal["input"]
    number: int = Field(ge=0, lt=2**53)  # counts up; a frame tells the last one that it answers to
    pressed: tuple[Annotated[int, Field(ge=0)], ...] = Field(default=(), max_length=64)  # places in Controls.buttons, oldest first
    turn: tuple[Degrees, Degrees] = (0.0, 0.0)  # pitch, yaw


class Seen(Message):
    """A frame was drawn."""

    type: Literal["seen"]
    frame: int = Field(ge=0, lt=2**53)


class Pause(Message):
    type: Literal["pause"]
    value: bool


class Step(Message):
    """One frame, then pause."""

    type: Literal["step"]


class Restart(Message):
    type: Literal["restart"]
    where: Literal["same", "random", "environment", "recorded"]
    episode: Place | None = None  # with recorded
    step: Place | None = None


class Policy(Message):
    """Who plays: the policy, in this way, or with null the person."""

    type: Literal["policy"]
    mode: Mode | None


class Settings(Message):
    """Each null stays as it is."""

    type: Literal["settings"]
    num_steps: Annotated[int, Field(ge=1, le=1024)] | None = None
    context: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    seed: Place | None = None
    fps: Annotated[float, Field(ge=0.5, le=120, allow_inf_nan=False)] | None = None
    real: bool | None = None  # beside the dream


class Record(Message):
    type: Literal["record"]
    value: bool


class Store(Message):
    """Keep the recording as an episode."""

    type: Literal["store"]


Command = Pause | Step | Restart | Policy | Settings | Record | Store
_ANY: TypeAdapter[Any] = TypeAdapter(
    Annotated[Input | Seen | Pause | Step | Restart | Policy | Settings | Record | Store, Field(discriminator="type")]
)


def parse(text: str) -> Input | Seen | Command:
    """Raises ``ValueError``, in one line, for what is no message."""
    if len(text.encode("utf-8", "replace")) > MAX_MESSAGE:
        raise ValueError(f"a message of more than {MAX_MESSAGE} bytes")
    try:
        return _ANY.validate_json(text)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        raise ValueError(f"{'.'.join(map(str, first['loc'])) or 'message'}: {first['msg']}") from None


def pack(header: dict[str, Any], pictures: Sequence[bytes]) -> bytes:
    """A frame on the wire: the header's length (32 bits, little endian), the header as JSON with ``sizes`` in it, the pictures."""
    text = json.dumps(header | {"sizes": [len(p) for p in pictures]}, separators=(",", ":"), allow_nan=False).encode()
    return struct.pack("<I", len(text)) + text + b"".join(pictures)


def unpack(data: bytes) -> tuple[dict[str, Any], list[bytes]]:
    """The inverse of ``pack``."""
    (length,) = struct.unpack_from("<I", data)
    header, at, pictures = json.loads(data[4 : 4 + length]), 4 + length, []
    for size in header["sizes"]:
        pictures.append(data[at : at + size])
        at += size
    return header, pictures
