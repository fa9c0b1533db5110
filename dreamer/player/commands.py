"""The verbs play and dream. Nothing heavy is imported before one of them runs."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

STEPS = 24  # frames that dreamer dream shows unless told otherwise
EXTRA = ("starlette", "uvicorn", "websockets")  # packages of the extra play


def add_verbs(verbs: Any, browse: Callable[[str], None]) -> None:
    """Add both to a parser's verbs. ``browse`` opens a link for the person, if it can."""
    text = "Play inside the world model, on a page in the browser."
    play = verbs.add_parser("play", help=text, description=text)
    play.add_argument("--env", metavar="NAME", help="real environment beside the dream (default: the run's)")
    play.add_argument("--port", type=int, default=8642, metavar="N", help="of 127.0.0.1; 0: any that is free (default: %(default)s)")
    play.add_argument("--no-open", action="store_true", help="only print the link")
    play.set_defaults(verb=_play, browse=browse)
    text = "Dream open loop from recorded frames, as a video or a picture."
    dream = verbs.add_parser("dream", help=text, description=text)
    dream.add_argument("--out", type=Path, required=True, metavar="FILE", help=".mp4, .gif, .webp, or .png for a grid of moments")
    dream.add_argument("--start", action="append", default=[], metavar="E:S", help="episode and latent step; may be given several times")
    dream.add_argument("--num", type=int, default=4, metavar="N", help="starts, if none are named (default: %(default)s)")
    dream.add_argument("--steps", type=int, metavar="N", help=f"frames to dream (default: {STEPS}, or as many as were recorded)")
    words = "recorded (default), noop, policy, policy-argmax, or a script such as 'right*8,do*2'"
    dream.add_argument("--actions", default="recorded", metavar="WORDS", help=words)
    dream.add_argument("--seed", type=int, metavar="N", help="of noise, policy and starts (default: the run's)")
    dream.add_argument("--denoise-steps", type=int, metavar="K", help="a power of two (default: as in the evaluation)")
    dream.add_argument("--context", type=int, metavar="N", help="latent steps that the model is shown (default: as in the evaluation)")
    dream.set_defaults(verb=_dream)
    for own in (play, dream):
        own.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="folder of a run, of a phase in it, or of a checkpoint")
        own.add_argument("--fps", type=float, metavar="N", help="frames a second (default: the recordings')")
        own.add_argument("--device", choices=("auto", "cpu", "cuda"), help="default: the run's")
        own.add_argument("--compile", action="store_true", help="torch.compile: a minute or two later, and faster from then on")
        own.add_argument(
            "--threads", type=int, default=1, metavar="N", help="of PyTorch on the CPU (default: 1, the quickest for small models)"
        )


def _open_source(arguments: argparse.Namespace, env: str | None = None) -> Any:
    import torch

    from dreamer.player.source import open_source

    if arguments.threads < 1 or not (arguments.fps is None or 0 < arguments.fps < 1000):
        raise ValueError(f"--threads is {arguments.threads}, --fps {arguments.fps}; expected at least 1, and above 0 and below 1000")
    source = open_source(arguments.checkpoint, env=env, device=arguments.device, fps=arguments.fps)
    torch.set_num_threads(arguments.threads)
    if arguments.compile:
        _compile(source)
    return source


def _compile(source: Any) -> None:
    """Compile the world model, and dream a moment, so that nobody waits for it later."""
    from dreamer.models.transformer import compile_passes
    from dreamer.player.engine import default_settings
    from dreamer.player.rollouts import choose_places, roll_out

    print("compiling the world model, which takes a minute or two", flush=True)
    compile_passes(source.agent.dynamics.transformer)
    settings = default_settings(source)
    (place,) = choose_places(source, [], 1, 2, settings)
    roll_out(source, place, "recorded", 2, settings)


def _play(arguments: argparse.Namespace, command: str) -> int:
    if not 0 <= arguments.port < 65536:
        raise ValueError(f"--port is {arguments.port}; expected 0 to 65535")
    if missing := [package for package in EXTRA if importlib.util.find_spec(package) is None]:
        raise ValueError(f"dreamer play needs the package {missing[0]}: pip install 'dreamer4[play]'")
    from dreamer.player.server import serve

    def say(link: str) -> None:
        print(f"play here: {link}\nOnly this machine can open it, and only with the whole link. Ctrl-C ends it.", flush=True)
        if not arguments.no_open:
            arguments.browse(link)

    try:
        serve(_open_source(arguments, arguments.env), port=arguments.port, say=say)
    except KeyboardInterrupt:
        print()  # the usual end
    return 0


def _dream(arguments: argparse.Namespace, command: str) -> int:
    from dreamer.player.engine import check_settings, default_settings
    from dreamer.player.rollouts import check_suffix, choose_places, num_recorded, roll_out, write_rollouts

    steps = STEPS if arguments.steps is None else arguments.steps
    if arguments.num < 1 or steps < 1:
        raise ValueError(f"--num is {arguments.num}, --steps {steps}; expected at least 1 of each")
    check_suffix(arguments.out)
    source = _open_source(arguments)
    given = {"num_steps": arguments.denoise_steps, "context": arguments.context, "seed": arguments.seed}
    settings = default_settings(source).model_copy(update={key: value for key, value in given.items() if value is not None})
    check_settings(source, settings)
    places = choose_places(source, arguments.start, arguments.num, steps, settings)
    if arguments.steps is None and arguments.actions == "recorded":
        steps = max(1, min(steps, *(num_recorded(source, place) for place in places)))
    rollouts = [roll_out(source, place, arguments.actions, steps, settings) for place in places]
    print(f"written: {write_rollouts(arguments.out, rollouts, source.fps)}")
    return 0
