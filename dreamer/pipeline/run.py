"""One run directory: where things are, and what was spent on them."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import resource
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dreamer import __version__
from dreamer.config import DreamerConfig
from dreamer.data import EpisodeStore, LatentStore, open_latents, split_episodes
from dreamer.data.predecessor import UNKNOWN_TOKENIZER
from dreamer.data.pretokenized_dataset import Ids
from dreamer.data.shards import STORE_FILE
from dreamer.evaluation.media import write_atomic
from dreamer.models import Agent, create_cosmos_tokenizer_from_config
from dreamer.pipeline.run_files import SpentFile, read_file
from dreamer.training.checkpoint import newest_checkpoint, planned_steps, read_state
from dreamer.training.distributed import Ranks
from dreamer.training.models_io import AnyTokenizer, load_agent, load_tokenizer, settings_difference
from dreamer.types import Tokenizer
from dreamer.yaml_config import save_config


class Run:
    """The folder ``config.run_dir``::

    config.yaml      what it was made with, every value
    episodes/        recordings            latents/   the same through the tokenizer
    tokenizer/ phase1/ phase2/ bc_long/ phase3/       one training each: checkpoints/, metrics.jsonl, media/, tensorboard/
    evaluation/      results as JSON, and run.json: time and memory of every stage
    report.html
    """

    def __init__(self, config: DreamerConfig, command: str = "", words: Sequence[str] = ()) -> None:
        """``command``: what was typed. ``words``: those of it that give the settings, for commands that errors recommend."""
        self.config, self.command, self.words = config, command, words
        self.path = config.run_dir
        self.ranks = Ranks.from_environment()
        self.device = choose_device(config.device)
        if config.threads is not None:
            torch.set_num_threads(config.threads)

    @property
    def config_path(self) -> Path:
        return self.path / "config.yaml"

    @property
    def episodes_path(self) -> Path:
        recordings = self.config.data.recordings
        return recordings.path if recordings and recordings.reader == "store" else self.path / "episodes"

    @property
    def latents_path(self) -> Path:
        return self.config.data.latents or self.path / "latents"

    @property
    def has_episodes(self) -> bool:
        """Whether there are recorded frames: not where ``data.latents`` are learned from."""
        return self.config.data.latents is None

    @property
    def evaluation_path(self) -> Path:
        return self.path / "evaluation"

    @property
    def spent_path(self) -> Path:
        return self.evaluation_path / "run.json"

    @property
    def report_path(self) -> Path:
        return self.path / "report.html"

    def save_config(self) -> None:
        """Write config.yaml. Stages call it once they know that they will go on with what is there."""
        if self.ranks.is_main:
            save_config(self.config, self.config_path)

    def begin(self) -> None:
        """``save_config`` and ``note_start``, before anything is made: a run that is killed right after tells where it comes from."""
        self.save_config()
        self.note_start()

    def seed(self, *key: object) -> int:
        """A seed (31 bits) for one purpose, from the run's."""
        digest = hashlib.blake2b(repr((self.config.seed, *key)).encode(), digest_size=4).digest()
        return int.from_bytes(digest, "big") >> 1

    def command_for(self, verb: str) -> str:
        """The command of another verb for this run, as it can be typed."""
        return shlex.join(["dreamer", *verb.split(), *self.words])

    # What earlier stages made; each ValueError says which command makes it.

    def episodes(self) -> EpisodeStore:
        path = self.episodes_path
        if path != self.path / "episodes" and not (path / STORE_FILE).is_file():
            raise ValueError(
                f"{path}: no episodes store here ({STORE_FILE} is missing); data.recordings.reader is store, for other recordings name "
                "their format"
            )
        return EpisodeStore(self._existing(path, "record"))

    def latents(self, tokenizer: Tokenizer | None) -> LatentStore:
        """The latents, all episodes of them. Raises ``ValueError`` if they were made with other ``data.actions``, or by another tokenizer
        than this one (None: than the weights that the settings name, where these are here)."""
        store = LatentStore(self._existing(self.latents_path, "pretokenize")) if self.has_episodes else self._foreign_latents()
        store.check_actions(self.config.data.actions)
        fingerprint = self._cosmos_fingerprint if tokenizer is None else tokenizer.fingerprint()
        if fingerprint is not None and not (tokenizer is None and store.tokenizer_fingerprint == UNKNOWN_TOKENIZER):
            store.check_tokenizer(fingerprint)
        if self.has_episodes and len(store) != len(self.episodes()):
            raise ValueError(
                f"{store.path}: {len(store)} of {len(self.episodes())} episodes are pretokenized; run: {self.command_for('pretokenize')}"
            )
        return store

    @functools.cached_property
    def _cosmos_fingerprint(self) -> str | None:
        """Of the Cosmos tokenizer that the settings name. None where there is no such folder here, and where phase 0 makes another one."""
        cosmos = self.config.cosmos_tokenizer
        is_made = cosmos.spatial_mode == "project" or self.config.phase0.cosmos.adapt == "all"
        if not cosmos.enabled or is_made or not cosmos.checkpoint_path.is_dir():
            return None
        return create_cosmos_tokenizer_from_config(cosmos, self.device).fingerprint()

    def _foreign_latents(self) -> LatentStore:
        self.require_foreign_latents()
        store = open_latents(self.latents_path)
        self.check_settings(store)
        return store

    def require_foreign_latents(self) -> None:
        path = self.latents_path
        if not path.is_dir():
            raise ValueError(
                f"{path}: does not exist; data.latents names a folder of latents, which this makes: "
                f"python pretokenize_dataset.py --data-path RECORDINGS --output-path {path}"
            )

    def check_settings(self, store: LatentStore) -> None:
        """Raise ``ValueError`` unless ``data.latents`` were made with these settings of Cosmos, as far as the store tells."""
        path, cosmos = store.path, self.config.cosmos_tokenizer
        found = (store.token_grid[0] * store.token_grid[1], store.temporal_stride)
        if cosmos.enabled and found != (cosmos.num_tokens, cosmos.temporal_stride):
            raise ValueError(
                f"{path}: {found[0]} tokens a latent step of {found[1]} frames; with cosmos_tokenizer as it is set, they would be "
                f"{cosmos.num_tokens} and {cosmos.temporal_stride}; use the settings that the latents were made with"
            )
        told = store.extra.get("tokenizer", {})
        if cosmos.enabled and told.get("kind") == "CosmosTokenizerWrapper":
            own = cosmos.model_dump(mode="json", include=set(told["settings"]))
            if difference := settings_difference(told["settings"], own):
                raise ValueError(f"{path}: was made with cosmos_tokenizer.{difference}; use the settings that the latents were made with")

    def split(self, num_episodes: int) -> tuple[Ids, Ids]:
        """Episodes that train, and episodes that are held out."""
        return split_episodes(num_episodes, self.config.data.val_fraction)

    def tokenizer(self) -> AnyTokenizer:
        self.require_finished("tokenizer", self.config.tokenizer_steps)
        return load_tokenizer(self.path / "tokenizer", self.device)

    def own_tokenizer(self) -> Tokenizer | None:
        """``tokenizer``; None where ``data.latents`` are learned from and this run has no tokenizer."""
        return self.tokenizer() if self.has_episodes or newest_checkpoint(self.path / "tokenizer") else None

    def agent(self, phase: str, tokenizer_fingerprint: str, steps: int | None = None) -> Agent:
        """The agent that ``phase`` made, for latents of this tokenizer. ``steps``: how many that phase has to have behind it."""
        self.require_finished(phase, steps)
        agent, info = load_agent(self.path / phase, self.device, self.config.agent)
        if info["tokenizer"] != tokenizer_fingerprint:
            raise ValueError(f"{self.path / phase}: was trained on latents of another tokenizer; train it in another run_dir")
        return agent

    def has(self, phase: str) -> bool:
        """Whether ``phase`` was trained; ``ValueError`` if it began and did not end: half a training must not be judged as a whole."""
        found = newest_checkpoint(self.path / phase)
        if found:
            self.require_finished(phase, planned_steps(found[1], phase))
        return bool(found)

    def require_finished(self, phase: str, steps: int | None) -> None:
        found = newest_checkpoint(self.path / phase)
        if not found:
            raise ValueError(f"{self.path / phase}: holds no checkpoint; run first: {self.command_for(f'train {phase}')}")
        if steps is not None and found[0] < steps:
            again = self.command_for(f"train {phase}")
            raise ValueError(f"{self.path / phase}: is at step {found[0]} of {steps}; run again to finish it: {again}")

    def require_untrained(self) -> None:
        """``ValueError`` if something has learned from the run's episodes: with others among them, it could not go on."""
        folders = sorted(path.parent for path in self.path.glob("*/checkpoints"))
        newest = {folder.name: found[1] for folder in folders if (found := newest_checkpoint(folder))}
        # a Cosmos tokenizer that is taken as it is has seen no episodes
        if self.has_episodes and (trained := [phase for phase, path in newest.items() if "data" in read_state(path)["settings"]]):
            raise ValueError(
                f"{self.path}: {', '.join(trained)} learned from the episodes that are here, and can go on with no others; nothing was "
                "added: record into another run_dir"
            )

    def _existing(self, path: Path, verb: str) -> Path:
        if not path.is_dir():
            raise ValueError(f"{path}: does not exist; run first: {self.command_for(verb)}")
        return path

    # What was spent.

    def spent(self) -> dict[str, Any]:
        """``evaluation/run.json``: command, hardware, versions, revisions, and by stage the seconds, the peak memory in MB and
        its newest command."""
        if not self.spent_path.exists():
            return {"stages": {}}
        remedy = "restore it, or remove it: times are measured only once"
        return read_file(self.spent_path, SpentFile, remedy).model_dump(exclude_unset=True)

    def seconds(self, stage: str) -> float:
        """Time that all calls of a stage took together. ``ValueError`` if it was never run."""
        stages = self.spent()["stages"]
        if stage not in stages:
            raise ValueError(f"{self.spent_path}: knows no time for {stage}; run it first, or set bc_long.extra_steps")
        return float(stages[stage]["seconds"])

    def made_with(self) -> dict[str, Any]:
        """For a checkpoint, which may be copied without its run. No command: it names the run's folder, and equal runs have equal bytes."""
        made = provenance(self.command, self.device, {})
        return {"made_with": {key: made[key] for key in ("hardware", "versions", "revisions")}}

    def note_start(self) -> None:
        """Write down command, hardware, versions and revision, without any time. Of several processes, the main one does."""
        if not self.ranks.is_main:
            return
        earlier = self.spent()
        write_json(self.spent_path, provenance(self.command, self.device, earlier) | {"stages": earlier["stages"]})

    def write_spent(self, earlier: dict[str, Any], stage: str, seconds: float) -> None:
        """Add a stage's time to what was ``spent()`` earlier. Memory is the peak of the process so far. A report does not change who made
        the rest, and with what. Of several processes, the main one speaks."""
        if not self.ranks.is_main:
            return
        before = earlier["stages"].get(stage, {"seconds": 0.0, "peak_memory_mb": 0.0})
        peak = max(before["peak_memory_mb"], peak_memory_mb())
        now = {"seconds": before["seconds"] + seconds, "peak_memory_mb": peak, "command": self.command}
        made = provenance(self.command, self.device, earlier)
        if stage == "report":
            made |= {key: earlier[key] for key in ("command", "hardware", "versions") if key in earlier}
        write_json(self.spent_path, made | {"stages": earlier["stages"] | {stage: now}})


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def peak_memory_mb() -> float:
    """The most memory that this process has held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def hardware(device: torch.device) -> dict[str, str]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    facts = {
        "CPU": f"{cores} core{'s' if cores > 1 else ''}, {_cpu_name()}",
        "threads": str(torch.get_num_threads()),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if device.type == "cuda":
        facts["GPU"] = torch.cuda.get_device_name(device)
    return facts | {"Python": platform.python_version(), "PyTorch": torch.__version__, "dreamer": __version__}


def versions() -> dict[str, str]:
    """Of the packages that decide what comes out."""
    names = ("torch", "numpy", "av", "einops", "gymnasium", "crafter", "minigrid", "torchmetrics", "safetensors")
    return {name: importlib.metadata.version(name) for name in names}


def provenance(command: str, device: torch.device, earlier: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept with results: the newest command, hardware and versions, and all revisions that had a part in it."""
    made = {"command": command, "hardware": hardware(device), "versions": versions()}
    return made | {"revisions": list(dict.fromkeys([*earlier.get("revisions", []), git_revision()]))}


@functools.cache
def git_revision() -> str | None:
    """The commit that this package is at, with ``+changes`` where its files differ from it; None outside a git checkout of its own."""

    def git(*words: str) -> str:
        package = Path(__file__).parents[1]
        done = subprocess.run(["git", "-C", str(package), *words], capture_output=True, text=True, check=True, timeout=60)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # else the checkout is somebody else's, with this package installed inside
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def choose_device(name: str) -> torch.device:
    """``auto`` is CUDA where there is one; of several devices the one that LOCAL_RANK names, as torchrun sets it. Raises ``ValueError``
    for CUDA where there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is 'cuda', but PyTorch sees no CUDA device here; set device=cpu or device=auto")
    device = torch.device("cuda" if name == "auto" and torch.cuda.is_available() else "cpu" if name == "auto" else name)
    local_rank = os.environ.get("LOCAL_RANK")
    return torch.device("cuda", int(local_rank)) if device.type == "cuda" and local_rank else device
