"""Runs a target under atheris (libFuzzer for Python) in a process of its own, again and again until its time is over.

A broken promise is written down, once for each place, and fuzzing goes on. What Python cannot catch (a crash of native code, a hang, too
much memory) ends the process: its input is written down too, and another process goes on with the corpus.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

TARGET_NAMES = ("npy", "video", "minerl", "vpt", "minari", "episodes", "latents", "predecessor", "checkpoint", "pieces", "torchscript")
TARGET_NAMES += ("cosmos", "config", "messages", "images", "results")
INSTRUMENTED = ["dreamer", "yaml", "minari", "PIL", "json", "tokenize", "numpy.lib"]  # whose branches the fuzzer sees
SECONDS_PER_INPUT, MEGABYTES = 30, 4096  # where libFuzzer ends the process
_STATUS = re.compile(r"^#(\d+)\s+\S+\s+cov: (\d+) ft: (\d+) corp: (\d+)/")


@dataclass
class Result:
    target: str
    seconds: float = 0.0
    cpu_seconds: float = 0.0  # fewer than seconds on a machine that does other work too
    executions: int = 0
    edges: int = 0
    features: int = 0
    corpus: int = 0
    restarts: int = 0
    findings: list[dict[str, Any]] = field(default_factory=list)
    command: str = ""
    versions: dict[str, str] = field(default_factory=dict)

    def text(self) -> str:
        times = f"{self.seconds:.0f} s ({self.cpu_seconds:.0f} s of the processor)"
        lines = [f"{self.target}: {times}, {self.executions} executions, {self.edges} edges, {len(self.findings)} findings"]
        return "\n".join(lines + [f"  {found['key']}: {found['text'][:160]}  ({found['input']})" for found in self.findings])

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")


def fuzz_target(name: str, seconds: int, seed: int, work: Path, command: str) -> Result:
    """Fuzz for ``seconds``; inputs that broke a promise lie in ``work/found``, the corpus in ``work/corpus``."""
    for folder in ("corpus", "found"):
        (work / folder).mkdir(parents=True, exist_ok=True)
    (work / "found.jsonl").unlink(missing_ok=True)
    packages = ("atheris", "av", "h5py", "numpy", "pillow", "safetensors", "torch")
    versions = {"python": platform.python_version()} | {package: version(package) for package in packages}
    result, began = Result(name, command=command, versions=versions), time.monotonic()
    while (left := seconds - (time.monotonic() - began)) > 1:
        lines, cpu_seconds = _run_child(name, work, int(left), seed + result.restarts)
        result.cpu_seconds = round(result.cpu_seconds + cpu_seconds, 1)
        statuses = [match for line in lines if (match := _STATUS.match(line))]
        if statuses:
            result.executions += int(statuses[-1][1])
            result.edges, result.features = max(result.edges, int(statuses[-1][2])), max(result.features, int(statuses[-1][3]))
            result.corpus = int(statuses[-1][4])
        if any("DONE  " in line for line in lines):
            break
        if not statuses:
            raise RuntimeError(f"fuzzing {name} cannot begin: " + "\n".join(lines[-30:]))
        result.restarts += 1
        (work / f"ended_{result.restarts}.log").write_text("\n".join(lines[-200:]))
    result.seconds = round(time.monotonic() - began, 1)
    result.findings = _findings(work)
    return result


def _run_child(name: str, work: Path, seconds: int, seed: int) -> tuple[list[str], float]:
    options = [f"-max_total_time={seconds}", f"-seed={seed}", f"-timeout={SECONDS_PER_INPUT}", f"-rss_limit_mb={MEGABYTES}"]
    options += [f"-artifact_prefix={work / 'found'}/", "-print_final_stats=1", "-reload=0", "-report_slow_units=60"]
    command = [sys.executable, "-m", "fuzz", "child", name, str(work), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1", "MPLBACKEND": "Agg"}
    with (work / "log.txt").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        _, process.returncode, usage = os.wait4(process.pid, 0)
    return (work / "log.txt").read_text(errors="replace").splitlines(), usage.ru_utime + usage.ru_stime


def _findings(work: Path) -> list[dict[str, Any]]:
    told = work / "found.jsonl"
    found = [json.loads(line) for line in told.read_text().splitlines()] if told.exists() else []
    for file in sorted((work / "found").glob("*-*")):  # libFuzzer's own
        if file.name.startswith(("crash-", "timeout-", "oom-", "leak-")):
            found.append({"key": f"native {file.name.split('-')[0]}", "text": "the process ended", "input": file.name})
    return found


def child(name: str, work: Path, options: list[str]) -> int:
    """The process that fuzzes. Does not return."""
    import atheris

    with atheris.instrument_imports(include=INSTRUMENTED, enable_loader_override=False):
        from fuzz.contract import Violation, Workplace
        from fuzz.targets import TARGETS
    _quiet()
    place = Workplace(TARGETS[name])
    for seed in place.seeds():
        (work / "corpus" / hashlib.sha1(seed).hexdigest()).write_bytes(seed)
    known: set[str] = set()

    def one_input(data: bytes) -> None:
        try:
            place.run(data)
        except Violation as broken:
            if broken.key in known:
                return
            known.add(broken.key)
            file = work / "found" / hashlib.sha1(broken.key.encode()).hexdigest()[:12]
            file.write_bytes(data)
            with (work / "found.jsonl").open("a") as told:
                told.write(json.dumps({"key": broken.key, "text": str(broken), "input": file.name}) + "\n")

    longest = max(place.target.max_bytes, *(len(seed) for seed in place.seeds()))
    atheris.Setup([sys.argv[0], *options, f"-max_len={longest}", str(work / "corpus")], one_input)
    atheris.Fuzz()
    return 0


def _quiet() -> None:
    import logging
    import resource
    import warnings

    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable()
    resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))  # what asks for more gets a MemoryError, and is found
