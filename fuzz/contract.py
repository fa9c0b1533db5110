"""What every reader promises for every input: a value, or a ``ValueError`` or ``OSError`` that says which file is at fault.

Never another exception, never code from the file, never more than ``MAX_SECONDS`` or ``MAX_MEGABYTES`` for one input.
"""

from __future__ import annotations

import re
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dreamer

MAX_SECONDS = 10.0  # of the processor
MAX_MEGABYTES = 512  # by which one input may raise the process's peak
MAX_MESSAGE = 4000  # characters: longer ones say nothing
# Events of Python's audit hooks that no reader has a reason to cause.
FORBIDDEN = ("ctypes.dlopen", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.system", "pickle.find_class", "subprocess.Popen")
FORBIDDEN += ("socket.bind", "socket.connect", "socket.getaddrinfo", "urllib.Request")
# These make Python out of text that stands in a program, not in a file of data: annotations, generated methods, the pages' templates.
OWN_EXEC = ("/typing.py", "/dataclasses.py", "/collections/__init__.py", "/beartype/", "/jaxtyping/")
PACKAGE = str(Path(dreamer.__file__).parent)


class Violation(Exception):
    """A promise that was broken. ``key`` is the same for all inputs that break it at the same place."""

    def __init__(self, key: str, text: str) -> None:
        super().__init__(text)
        self.key = key


@dataclass(frozen=True)
class Variant:
    """One way in which an input becomes files: ``files`` maps it to their contents by place. ``seeds`` are valid inputs."""

    name: str
    files: Callable[[bytes], Mapping[str, bytes]]
    seeds: Sequence[bytes]
    read: Callable[[Path], Any] | None = None  # instead of the target's

    @property
    def folder_name(self) -> str:
        return re.sub(r"\W+", "_", self.name)


@dataclass
class Target:
    """One reader. The first byte of an input picks the variant, the rest is its own.

    prepare: writes valid files into a folder, once. read: reads what lies there. variants: made after ``prepare``, from the same folder.
    names_files: whether errors must name a file below the folder.
    """

    name: str
    prepare: Callable[[Path], None]
    variants: Callable[[Path], Sequence[Variant]]
    read: Callable[[Path], Any]
    names_files: bool = True
    max_bytes: int = 1 << 16


@dataclass
class Workplace:
    """A target with a folder of its own, ready for any number of inputs."""

    target: Target
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="fuzz_", dir=_fast_disk())))

    def __post_init__(self) -> None:
        self.target.prepare(self.folder)
        self.variants = list(self.target.variants(self.folder))
        self.read_valid()
        watch()

    def read_valid(self) -> None:
        """Every seed can be read: else a fuzzer would start from files that are refused at the door."""
        for number, variant in enumerate(self.variants):
            for seed in variant.seeds:
                self.run(bytes([number]) + seed, is_seed=True)

    def seeds(self) -> list[bytes]:
        return [bytes([number]) + seed for number, variant in enumerate(self.variants) for seed in variant.seeds]

    def run(self, data: bytes, *, is_seed: bool = False) -> str:
        """Read one input; returns "value" or the error's message. Raises ``Violation``."""
        variant = self.variants[data[0] % len(self.variants)] if data else self.variants[0]
        files = {self.folder / name: content for name, content in variant.files(data[1:]).items()}
        before = {file: file.read_bytes() if file.exists() else None for file in files}
        for file, content in files.items():
            file.write_bytes(content)
        try:
            return self._judged(variant.read or self.target.read, is_seed)
        finally:
            for file, content in before.items():
                file.unlink() if content is None else file.write_bytes(content)

    def _judged(self, read: Callable[[Path], Any], is_seed: bool) -> str:
        began, memory = time.process_time(), _new_peak_megabytes()
        outcome = "value"
        _events.clear()
        _watching.append(True)
        try:
            read(self.folder)
        except (ValueError, OSError) as error:
            if is_seed:
                raise
            outcome = self._clear(error)
        except Exception as error:
            raise Violation(_place(error), f"{type(error).__name__}: {error}"[:500]) from error
        finally:
            _watching.clear()
        if _events and not is_seed:  # valid files may cause imports, the first time
            raise Violation(f"event {_events[0].split()[0]}", f"caused {_events[:3]}")
        if is_seed:
            return outcome
        if (took := time.process_time() - began) > MAX_SECONDS:
            raise Violation("slow", f"took {took:.1f} s; promised at most {MAX_SECONDS}")
        if (grown := _peak_megabytes() - memory) > MAX_MEGABYTES:
            raise Violation("memory", f"took {grown:.0f} MB; promised at most {MAX_MEGABYTES}")
        return outcome

    def _clear(self, error: ValueError | OSError) -> str:
        text = str(error)
        if not text or len(text) > MAX_MESSAGE:
            raise Violation(f"unclear {_place(error)}", f"a message of {len(text)} characters: {text[:200]}") from error
        if self.target.names_files and str(self.folder) not in text:
            raise Violation(f"unclear {_place(error)}", f"names no file: {type(error).__name__}: {text[:300]}") from error
        return text

    def replay(self, variant: str, content: bytes) -> str:
        """``run`` for an input that was kept under its variant's folder name."""
        return self.run(bytes([[v.folder_name for v in self.variants].index(variant)]) + content)

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def _fast_disk() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def _new_peak_megabytes() -> float:
    """The peak from now on, where Linux lets it be reset; else a greater one of before hides what an input takes up to it."""
    with suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return _peak_megabytes()


def _peak_megabytes() -> float:
    status = Path("/proc/self/status")  # what is reset; getrusage may also know of the process before its exec
    if status.exists() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(found[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _place(error: BaseException) -> str:
    """Kind of the error, the deepest line of this project that it passed, and the line that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "/dreamer/" in f.filename] or frames
    return f"{type(error).__name__} {Path(own[-1].filename).name}:{own[-1].name} {Path(frames[-1].filename).name}:{frames[-1].name}"


_events: list[str] = []
_watching: list[bool] = []  # empty: not now
_hooks: list[bool] = []


def watch() -> None:
    """Note what readers cause. Audit hooks cannot be removed: there is one for the process."""
    if not _hooks:
        _hooks.append(True)
        sys.addaudithook(_audit)


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watching:
        return
    if event in FORBIDDEN:
        _events.append(f"{event} {arguments!r}"[:300])
    elif event == "exec" and not str(getattr(arguments[0], "co_filename", "?")).endswith(".py"):
        caller = sys._getframe(1).f_code.co_filename
        if not any(part in caller for part in OWN_EXEC) and PACKAGE not in str(arguments[0].co_filename):
            _events.append(f"exec {arguments[0].co_filename} {arguments[0].co_names}"[:300])
