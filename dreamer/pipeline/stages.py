"""The stages of a run in their order. Each can be called again at any time: it goes on where it stopped, or does nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import nullcontext

from dreamer.data.shards import remove_stale_files
from dreamer.pipeline.collect import check_lengths, record_episodes
from dreamer.pipeline.evaluate import evaluate_agent, evaluate_world_model
from dreamer.pipeline.pretokenize import pretokenize_latents
from dreamer.pipeline.report import write_run_report
from dreamer.pipeline.run import Run
from dreamer.pipeline.train import knows_rewards, train_bc_long, train_phase1, train_phase2, train_phase3, train_tokenizer
from dreamer.training.distributed import connected

BEAT = 20.0  # seconds between two notes of the time that a stage has taken so far
START = "start"  # of Python and PyTorch: no stage, but time that people wait

# phase 3 before the baseline that must train for as long
STAGES: dict[str, Callable[[Run], bool]] = {
    "record": record_episodes,
    "tokenizer": train_tokenizer,
    "pretokenize": pretokenize_latents,
    "phase1": train_phase1,
    "phase2": train_phase2,
    "phase3": train_phase3,
    "bc_long": train_bc_long,
    "evaluate world-model": evaluate_world_model,
    "evaluate agent": evaluate_agent,
    "report": write_run_report,
}


def run_stage(run: Run, name: str) -> bool:
    """Run one stage and note its time, also if it is interrupted; if it fails or is killed, of all but the last ``BEAT`` seconds.
    Returns whether there was anything left to do."""
    if run.ranks.is_main:
        remove_stale_files(run.path)
        remove_stale_files(run.evaluation_path)
    began, earlier, ended, did_work = time.monotonic(), run.spent(), threading.Event(), False

    def beat() -> None:
        while not ended.wait(BEAT):
            run.write_spent(earlier, name, time.monotonic() - began)

    clock = threading.Thread(target=beat, name=f"clock of {name}", daemon=True)
    clock.start()
    try:
        # encoding needs no group, and shares of it may end hours apart
        with nullcontext() if name == "pretokenize" else connected(run.ranks, run.device):
            did_work = STAGES[name](run)
    except KeyboardInterrupt:
        did_work = True
        raise
    finally:
        ended.set()
        clock.join()
        seconds = time.monotonic() - began
        if did_work or seconds > BEAT:
            run.write_spent(earlier, name, seconds)
    return did_work


def _left_out(run: Run, name: str) -> str | None:
    """Why a stage has nothing to work on in this run; None if it has."""
    if name == "evaluate agent" and run.config.env is None:
        return "env is null"
    if name in ("record", "tokenizer", "pretokenize") and not run.has_episodes:
        return "data.latents are there"
    if name in ("phase3", "bc_long") and not knows_rewards(run):
        return "the recordings hold no rewards to practise for"
    return None


def run_all(run: Run, say: Callable[[str], None], began: float | None = None) -> None:
    """Every stage in order, from recording to report; without an environment nobody plays in it, without rewards there is nothing to
    practise for (nor a baseline to hold it against), and with ``data.latents`` there is nothing to record and to encode. ``say`` is
    told what begins and how long it took.

    ``began``: when the process did, on the clock of ``time.monotonic``; what passed since is noted as the stage ``START`` if there is
    anything left to do.
    """
    start_up = 0.0 if began is None else time.monotonic() - began
    for number, name in enumerate(STAGES, start=1):
        if reason := _left_out(run, name):
            say(f"[{number}/{len(STAGES)}] {name}: left out, {reason}")
            continue
        began = time.monotonic()
        say(f"[{number}/{len(STAGES)}] {name}")
        did_work = run_stage(run, name)
        if did_work and start_up and name != "report":  # a report is made every time
            run.write_spent(run.spent(), START, start_up)
            start_up = 0.0
        if name == "record":
            check_lengths(run)
        took = f"{time.monotonic() - began:.1f} s"
        say(f"[{number}/{len(STAGES)}] {name}: {took if did_work else 'already done'}")
