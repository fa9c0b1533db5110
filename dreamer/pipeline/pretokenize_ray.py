"""Recordings to latents on a Ray cluster: Ray Data hands out the groups of ``dreamer/data/groups.py`` to actors that keep a tokenizer.

A group is made whole or not at all, and its bytes depend on its recordings and the tokenizer alone. So Ray may kill an actor and give its
group to another one, and the folder, which all machines of the cluster must see, ends as it does without Ray.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from dreamer.data import LatentStore
from dreamer.data.pretokenize import GroupMaker, write_quarantine
from dreamer.pipeline.run import choose_device

MAX_RETRIES = 3  # of a group whose worker was killed: one that kills every worker must not go round for ever
OpenMaker = Callable[[torch.device], GroupMaker]


@dataclass(frozen=True)
class Resources:
    """What each actor gets, and how many there may be."""

    num_cpus: int
    num_gpus: int
    num_workers: int


def choose_resources(cluster: Mapping[str, float], device: str, num_workers: int | None) -> Resources:
    """An actor for each GPU of the cluster, else for each core. Raises ``ValueError`` for more than it has, and for no GPU where
    ``device`` asks for one."""
    gpus, cpus = int(cluster.get("GPU", 0)), int(cluster.get("CPU", 0))
    uses_gpus = device != "cpu" and gpus > 0
    if device == "cuda" and not uses_gpus:
        raise ValueError("device is 'cuda', but the Ray cluster has no GPU; set device=cpu or device=auto")
    most, kind = (gpus, "GPUs") if uses_gpus else (cpus, "cores")
    wanted = most if num_workers is None else num_workers
    if not 1 <= wanted <= most:
        raise ValueError(f"workers is {wanted}; expected 1 to {most}, the {kind} of the Ray cluster")
    return Resources(0 if uses_gpus else 1, 1 if uses_gpus else 0, wanted)


def pretokenize_on_ray(
    planned: GroupMaker,
    open_maker: OpenMaker,
    device: str,
    num_workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LatentStore:
    """Make the groups of ``planned`` that are not finished on a Ray cluster: the one that is connected, or that RAY_ADDRESS names, else one
    started here.

    open_maker(device) gives each actor its own ``planned``; it must be picklable, and find the same folders everywhere. Raises
    ``ValueError`` and ``OSError`` as ``dreamer.data.pretokenize`` does, and ``ValueError`` if ray is not installed.
    """
    ray = load_ray()
    todo = [number for number in range(len(planned.groups)) if number not in planned.finished]
    total = len(planned.groups.sources)
    done = itertools.count(total - sum(len(planned.groups[number]) for number in todo) + 1)
    if todo:
        has_started = not ray.is_initialized()
        if has_started:
            ray.init(include_dashboard=False, log_to_driver=False)  # where RAY_ADDRESS says, if it is set
        try:
            resources = choose_resources(ray.cluster_resources(), device, num_workers)
            for row in _rows(ray, open_maker, device, resources, todo):
                if row["kind"]:
                    raise {"ValueError": ValueError, "OSError": OSError}[row["kind"]](row["error"])
                for _ in planned.groups[row["group"]]:
                    if progress:
                        progress(next(done), total)
        except ray.exceptions.RayError as error:
            text = f"the Ray cluster lost the workers of a group {1 + MAX_RETRIES} times, or itself ({type(error).__name__})"
            raise OSError(f"{planned.path}: {text}; what is finished stays, run again") from error
        finally:
            if has_started:
                ray.shutdown()
    return write_quarantine(planned.path)


def load_ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report to its makers
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ValueError(f"the engine ray needs Ray Data ({error}): pip install 'dreamer4[ray]'") from error
    return ray


def _rows(ray: Any, open_maker: OpenMaker, device: str, resources: Resources, todo: list[int]) -> Any:
    """What the actors answer, group by group, in the order in which they are done."""
    ray.data.DataContext.get_current().enable_progress_bars = False
    dataset = ray.data.from_items([{"group": number} for number in todo], override_num_blocks=len(todo))  # a task for each
    return dataset.map_batches(
        _Actor,
        fn_constructor_kwargs={"open_maker": open_maker, "device": device, "folder": os.getcwd()},
        batch_size=1,
        num_cpus=resources.num_cpus,
        num_gpus=resources.num_gpus,
        max_task_retries=MAX_RETRIES,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=min(resources.num_workers, len(todo)), max_tasks_in_flight_per_actor=1),
    ).iter_rows()


class _Actor:
    """Lives in a process of the cluster."""

    def __init__(self, open_maker: OpenMaker, device: str, folder: str) -> None:
        self.open_maker, self.device, self.folder = open_maker, device, folder
        self.maker: GroupMaker | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """Make the group of a batch of one row. What ``pretokenize`` raises comes back as a row: Ray would tell it in pages."""
        (number,) = (int(group) for group in batch["group"])
        kind, text = "", ""
        try:
            if self.maker is None:
                os.chdir(self.folder)  # relative paths mean what they mean to who gave them
                self.maker = self.open_maker(choose_device(self.device))
            self.maker.make([number], lambda: None)
        except (ValueError, OSError) as error:
            kind, text = "OSError" if isinstance(error, OSError) else "ValueError", str(error)
        return {"group": [number], "kind": [kind], "error": [text]}
