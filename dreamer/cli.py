"""``dreamer``: the verbs. Bad input ends with one line and exit code 2, Ctrl-C with 130, SIGTERM with 143; running a verb again goes on."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import webbrowser
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import dreamer
from dreamer.interrupt import exit_code, terminable
from dreamer.player.commands import add_verbs

PRESETS = Path(__file__).parent / "presets"
MINECRAFT = "minerl_cosmos"  # preset of pretokenize --data-path, where no settings are named
PHASES = ("tokenizer", "phase1", "phase2", "bc_long", "phase3")


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        print(f"dreamer: error: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    words, began = list(sys.argv[1:] if argv is None else argv), time.monotonic()
    try:
        arguments = _parse(words)
        arguments.began = began
        if "RANK" in os.environ and words[0] not in ("train", "pretokenize"):  # by torchrun
            from dreamer.training.distributed import refuse_several

            refuse_several(words[0])
        with terminable():
            return arguments.verb(arguments, shlex.join(["dreamer", *words]))
    except SystemExit as done:  # --help, --version, or a word that the parser does not know
        return done.code if isinstance(done.code, int) else 2
    except KeyboardInterrupt as interruption:
        print("\ndreamer: interrupted; run the same command again to go on", file=sys.stderr)
        return exit_code(interruption)
    except (ValueError, OSError) as error:
        if os.environ.get("DREAMER_TRACEBACK"):
            raise
        who = f"dreamer[{os.environ['RANK']}]" if "RANK" in os.environ else "dreamer"
        print(f"{who}: error: {_one_line(error)}", file=sys.stderr)
        return 2


def train_script(part: str, config: Path, argv: Sequence[str] | None = None) -> int:
    """``dreamer train PART`` as the scripts beside the package call it; ``config``: the settings if none are named."""
    parser = Parser(description=f"dreamer train {part}; further arguments are passed on to it.", allow_abbrev=False)
    parser.add_argument("--config", type=Path, default=config, metavar="FILE", help=f"settings in YAML (default: {config})")
    parser.add_argument("--data-path", metavar="DIR", help="latents that pretokenize_dataset.py made, for data.latents")
    arguments, rest = parser.parse_known_args(argv)
    latents = [] if arguments.data_path is None else [f"data.latents={json.dumps(arguments.data_path)}"]
    return main(["train", part, "--config", str(arguments.config), *latents, *rest])


def _one_line(error: Exception) -> str:
    text = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    return " ".join(text.split())


def _parse(words: list[str]) -> argparse.Namespace:
    parser = _parser()
    arguments, rest = parser.parse_known_args(words)
    # argparse takes key=value words only where they stand together; they may stand anywhere
    strange = [word for word in rest if word.startswith("-") or "=" not in word or not hasattr(arguments, "overrides")]
    if strange:
        parser.error(f"unrecognized argument {strange[0]!r}; settings are given as key=value")
    for word in getattr(arguments, "overrides", ()):
        if (Path(word) / "config.yaml").is_file():
            parser.error(f"{word!r} is the folder of a run; to go on with its settings: --config {Path(word) / 'config.yaml'}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def _parser() -> Parser:
    parser = Parser(prog="dreamer", description="Dreamer 4: a world model from recordings, and an agent that learns inside it.")
    parser.add_argument("--version", action="version", version=f"dreamer {dreamer.__version__}")
    verbs = parser.add_subparsers(metavar="verb", required=True)

    def add(name: str, verb: Callable[..., int], text: str, where: Any = verbs, preset: str | None = None) -> Parser:
        own = where.add_parser(name, help=text, description=text)
        own.set_defaults(verb=verb)
        source = own.add_mutually_exclusive_group()
        source.add_argument("--config", type=Path, metavar="FILE", help="settings in YAML")
        source.add_argument("--preset", choices=presets(), default=None, help=f"settings that come with the package (default: {preset})")
        own.set_defaults(default_preset=preset)
        own.add_argument("overrides", nargs="*", metavar="key=value", help="single settings, such as seed=1 or phase1.train.steps=100")
        return own

    demo = add("demo", _demo, "Everything once, from recording to a report that a browser shows.", preset="demo")
    demo.add_argument("--no-open", action="store_true", help="do not open the report in a browser at the end")
    demo.add_argument("--seeds", nargs="+", metavar="N", help="once for each seed, in run_dir/seed_N, then all of them taken together")
    demo.add_argument("--out", type=Path, metavar="DIR", help="with --seeds: folder of the results (default: run_dir/results)")
    add("record", _stage("record"), "Play, and write what was seen and done as episodes (or import data.recordings).")
    train = verbs.add_parser("train", help="Train one part.", description="Train one part. Running it again resumes.")
    parts = train.add_subparsers(metavar="part", required=True)
    for phase in PHASES:
        part = add(phase, _train(phase), f"Train {phase}.", parts)
        part.add_argument("--dry-run", action="store_true", help="only say what it would take: shapes, parameters, FLOPs, memory")
        part.add_argument("--processes", type=int, metavar="N", help="with --dry-run: for one of N processes that torchrun starts")
    _add_pretokenize(add("pretokenize", _pretokenize, "Encode a run's episodes with its tokenizer, or (--data-path) any recordings."))
    evaluate = verbs.add_parser("evaluate", help="Measure what was learned.", description="Measure what was learned.")
    what = evaluate.add_subparsers(metavar="what", required=True)
    add("world-model", _stage("evaluate world-model"), "Open-loop dreams of held-out episodes against the truth.", what)
    add("agent", _stage("evaluate agent"), "Returns in the real environment, with baselines.", what)
    add("report", _stage("report"), "Put what a run holds on one page.")
    add("check", _check, "Prove shapes, x-prediction and gradient flow on what a run holds, else on fresh models.")
    results = verbs.add_parser("results", help="Take finished runs of several seeds together.", description="Figures of several seeds.")
    results.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders of finished runs that differ in their seed alone")
    results.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for results.json, README.md and the pictures")
    results.set_defaults(verb=_results)
    add("doctor", _doctor, "Say what this machine has, and what will and will not run on it.", preset="demo")
    text = "List and compare the runs in and below some folders."
    runs = verbs.add_parser("runs", help=text, description=text)
    runs.add_argument("folders", type=Path, nargs="*", default=[Path("runs")], metavar="DIR", help="default: runs")
    runs.add_argument("--out", type=Path, metavar="FILE", help="page (HTML) with the settings that differ and all curves")
    runs.set_defaults(verb=_runs)
    add("config", _show_config, "Print the complete settings as YAML.")
    imports = verbs.add_parser("import", help="Recordings to an episode store.", description="Recordings to an episode store.")
    imports.add_argument("path", type=Path, help="folder or file with recordings")
    imports.add_argument("--reader", required=True, help="their format")
    imports.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="of the reader; may be given several times")
    imports.add_argument("--out", type=Path, required=True, help="folder of the store; made, or appended to")
    imports.set_defaults(verb=_import)
    text = "What recordings or a store hold: counts, actions, problems, and a contact sheet."
    looks = verbs.add_parser("inspect", help=text, description=text)
    looks.add_argument("path", type=Path, help="a recording, a folder of recordings, an episode store or a latent store")
    looks.add_argument("--reader", help="format of the recordings (default: guessed by the names of the files)")
    looks.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="of the reader; may be given several times")
    looks.add_argument("--max-episodes", type=int, metavar="N", help="look at N episodes, spread evenly (default: all)")
    looks.add_argument("--out", type=Path, metavar="DIR", help="folder for inspect.json and contact_sheet.png (default: text only)")
    looks.set_defaults(verb=_inspect)
    add_verbs(verbs, _browse)
    return parser


def _add_pretokenize(own: Parser) -> None:
    """What ``dreamer pretokenize`` takes for recordings, beside settings. Defaults that are not false are those of ``pretokenize_path``."""
    free = own.add_argument_group("recordings, without a run")
    free.add_argument("--data-path", type=Path, metavar="DIR", help="recordings, or an episode store")
    free.add_argument("--output-path", type=Path, metavar="DIR", help="folder of the latent store; made, or gone on with")
    free.add_argument("--max-episodes", type=int, metavar="N", help="only the first N (default: all)")
    free.add_argument("--reader", help="format of the recordings (default: guessed by the names of the files)")
    free.add_argument("--option", action="append", dest="options", metavar="KEY=VALUE", help="of the reader; may be given several times")
    free.add_argument("--tokenizer", type=Path, metavar="DIR", help="a trained one (default: cosmos_tokenizer of the settings)")
    free.add_argument("--shard", metavar="I/N", help="do part I of N, counted from 0 (default: RANK and WORLD_SIZE of torchrun, if set)")
    text = "who hands out the work; ray: the Ray cluster of RAY_ADDRESS, else one started here (default: local)"
    free.add_argument("--engine", choices=("local", "ray"), help=text)
    free.add_argument("--workers", type=int, metavar="N", help="of the engine ray (default: one for each GPU, else for each core)")
    free.add_argument("--strict", action="store_true", help="stop at the first recording that cannot be read")
    free.add_argument("--device", choices=("auto", "cpu", "cuda"), help="default: device of the settings")
    free.add_argument(
        "--actions", choices=("all", "linspace"), help="of a latent step's frames, or one a step (default: data.actions of the settings)"
    )
    free.add_argument("--dtype", choices=("float32", "float16"), help="of the latents (default: float16)")
    free.add_argument("--batch-frames", type=int, metavar="N", help="of an episode, encoded at once (default: 121)")
    free.add_argument("--batch-episodes", type=int, metavar="N", help="encoded side by side (default: 1)")
    free.add_argument("--shard-episodes", type=int, metavar="N", help="in one file, lost if it is cut off unfinished (default: 8)")


def presets() -> list[str]:
    """Names of the settings that come with the package."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def _load(arguments: argparse.Namespace):
    from dreamer.config import DreamerConfig  # PyTorch takes seconds to import: not for --help
    from dreamer.yaml_config import load_config

    preset = arguments.preset or arguments.default_preset
    path = arguments.config or (PRESETS / f"{preset}.yaml" if preset else None)
    if path is None and not arguments.overrides:
        raise ValueError("no settings: give --config FILE, --preset NAME or key=value words; dreamer config prints all that there are")
    config, key = load_config(DreamerConfig, path, arguments.overrides), "cosmos_tokenizer.trust_torchscript"
    if config.cosmos_tokenizer.trust_torchscript and not any(word.partition("=")[0].strip() == key for word in arguments.overrides):
        raise ValueError(f"{path}: {key} is true, so that programs in files would run; if you trust them, type {key}=true as well")
    return config


def _setting_words(arguments: argparse.Namespace) -> list[str]:
    """The words that give the settings, for another verb with the same ones."""
    preset = arguments.preset or arguments.default_preset
    source = ["--config", str(arguments.config)] if arguments.config else ["--preset", preset] if preset else []
    return [*source, *arguments.overrides]


def _stage(name: str) -> Callable[[argparse.Namespace, str], int]:
    def verb(arguments: argparse.Namespace, command: str) -> int:
        from dreamer.pipeline import Run, run_stage

        run = Run(_load(arguments), command, _setting_words(arguments))
        did_work = run_stage(run, name)
        if run.ranks.is_main:
            print(f"{name}: {'done' if did_work else 'nothing left to do'} in {run.path}")
        return 0

    return verb


def _pretokenize(arguments: argparse.Namespace, command: str) -> int:
    names = ("max_episodes", "reader", "options", "strict", "actions", "dtype", "batch_frames", "batch_episodes", "shard_episodes")
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None and value is not False}
    if arguments.data_path is None or arguments.output_path is None:
        free = ("data_path", "output_path", "tokenizer", "shard", "engine", "workers", "device")
        others = [name for name in free if getattr(arguments, name)]
        if others := [*others, *given]:
            told = ", ".join(f"--{name.replace('_', '-')}" for name in others)
            missing = [f"--{name}" for name in ("data-path", "output-path") if getattr(arguments, name.replace("-", "_")) is None]
            raise ValueError(f"got {told} without {' and '.join(missing)}; with none of these, a run's episodes are encoded")
        return _stage("pretokenize")(arguments, command)
    from dreamer.pipeline.pretokenize import encode, open_tokenizer
    from dreamer.training.models_io import load_tokenizer
    from dreamer.yaml_config import parse_options

    given["options"] = parse_options(arguments.options or ())
    if arguments.tokenizer is not None:
        if arguments.config or arguments.preset or arguments.overrides:
            raise ValueError("--tokenizer and settings are both given; expected one of them: settings say which other tokenizer to take")
        open_any, device = partial(load_tokenizer, arguments.tokenizer), "auto"
    else:
        arguments.default_preset = MINECRAFT
        config = _load(arguments)
        open_any, device = partial(open_tokenizer, config), config.device
        given.setdefault("actions", config.data.actions)
    given |= {"engine": arguments.engine or "local", "share": arguments.shard, "num_workers": arguments.workers}
    store = encode(open_any, arguments.data_path, arguments.output_path, device=arguments.device or device, command=command, **given)
    print(f"{store.path}: {len(store)} episodes with {store.lengths.sum()} latent steps, {len(store.quarantine)} recordings left out")
    if store.quarantine:
        print(f"why: see {store.path / 'quarantine.json'}")
    if not store.is_complete:
        print(f"{len(store.finished)} of {store.num_groups} groups of episodes are there; the other processes make the rest")
    return 0


def _train(part: str) -> Callable[[argparse.Namespace, str], int]:
    def verb(arguments: argparse.Namespace, command: str) -> int:
        if not arguments.dry_run:
            if arguments.processes is not None:
                raise ValueError("--processes is for --dry-run; torchrun --nproc-per-node N -m dreamer train ... starts several")
            return _stage(part)(arguments, command)
        from dreamer.pipeline.dry_run import dry_run

        print(dry_run(_load(arguments), part, arguments.processes))
        return 0

    return verb


def _check(arguments: argparse.Namespace, command: str) -> int:
    from dreamer.pipeline import Run
    from dreamer.pipeline.check import check_run

    report = check_run(Run(_load(arguments), command))
    print(report.text())
    return 1 if report.failures else 0


def _demo(arguments: argparse.Namespace, command: str) -> int:
    if arguments.seeds:
        return _demo_seeds(arguments, command)
    if arguments.out is not None:
        raise ValueError("--out is the folder of the results of several seeds; give --seeds too")
    from dreamer.pipeline import Run, run_all
    from dreamer.pipeline.summary import key_figures

    run = Run(_load(arguments), command, _setting_words(arguments))
    run_all(run, lambda text: print(text, flush=True), arguments.began)
    print("\n".join(["", *key_figures(run), "", f"report: {run.report_path.resolve()}"]))
    if not arguments.no_open:
        _browse(run.report_path.resolve().as_uri())
    return 0


def _browse(link: str) -> None:
    """Open a browser, where there are a person and a screen."""
    has_display = sys.platform in ("darwin", "win32") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
    if sys.stdout.isatty() and has_display:
        webbrowser.open(link)


def _demo_seeds(arguments: argparse.Namespace, command: str) -> int:
    """The demo once for each seed, each in a process of its own (so that its peak memory is its own), then the results."""
    seeds = [word for word in arguments.seeds if "=" not in word]  # --seeds takes the settings that follow it
    arguments.overrides += [word for word in arguments.seeds if "=" in word]
    if strange := [seed for seed in seeds if not (seed.isascii() and seed.isdigit())]:
        raise ValueError(f"--seeds: {strange[0]!r} is no seed; expected whole numbers such as 0 1 2")
    seeds = [str(int(seed)) for seed in seeds]
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds: got {' '.join(seeds) or 'none'}; expected different ones, such as 0 1 2")
    if any(word.partition("=")[0].strip() == "seed" for word in arguments.overrides):
        raise ValueError("seed= and --seeds are both given; expected one of them")
    base = _load(arguments).run_dir
    settings = [word for word in _setting_words(arguments) if word.partition("=")[0].strip() != "run_dir"]
    paths = [base / f"seed_{seed}" for seed in seeds]
    for seed, path in zip(seeds, paths, strict=True):
        place = str(path) if re.fullmatch(r"[\w./-]+", str(path)) else json.dumps(str(path))  # it is read as YAML
        words = ["demo", *settings, f"seed={seed}", f"run_dir={place}"]
        print(shlex.join(["dreamer", *words]), flush=True)
        if code := _run_child(words):
            return code  # the child has said why
    return _write_results(paths, arguments.out or base / "results", command)


def _run_child(words: list[str]) -> int:
    """``dreamer WORDS`` in another process, which ends in its own way first. Ctrl-C reaches both, SIGTERM is handed on."""
    child = subprocess.Popen([sys.executable, "-m", "dreamer.cli", *words])
    try:
        return child.wait()
    except KeyboardInterrupt as interruption:
        if exit_code(interruption) == 128 + signal.SIGTERM:
            child.terminate()
        child.wait()
        raise


def _results(arguments: argparse.Namespace, command: str) -> int:
    return _write_results(arguments.runs, arguments.out, command)


def _write_results(paths: Sequence[Path], out: Path, command: str) -> int:
    from dreamer.pipeline.results import collect_results
    from dreamer.pipeline.results_page import write_results

    results = collect_results(paths, command)
    write_results(results, out)
    for check in results.checks:
        print(f"{'met    ' if check.is_met else 'NOT met'}  {check.target}: {check.measured}")
    print(f"results: {out.resolve() / 'README.md'}")
    return 0


def _doctor(arguments: argparse.Namespace, command: str) -> int:
    from dreamer.pipeline.doctor import diagnose

    diagnosis = diagnose(_load(arguments))
    print(diagnosis.text())
    return 0 if diagnosis.is_well else 1


def _runs(arguments: argparse.Namespace, command: str) -> int:
    from dreamer.pipeline.runs import compare, write_comparison

    comparison = compare(arguments.folders)
    print(comparison.text())
    if arguments.out is not None:
        print(f"written: {write_comparison(comparison, arguments.out, command)}")
    return 0


def _show_config(arguments: argparse.Namespace, command: str) -> int:
    from dreamer.config import DreamerConfig
    from dreamer.yaml_config import config_text, load_config

    nothing = not (arguments.config or arguments.preset or arguments.overrides)
    print(config_text(load_config(DreamerConfig) if nothing else _load(arguments)), end="")
    return 0


def _import(arguments: argparse.Namespace, command: str) -> int:
    from dreamer.data import import_recordings
    from dreamer.pipeline.collect import ProgressBar
    from dreamer.yaml_config import parse_options

    with ProgressBar("import") as bar:
        report = import_recordings(arguments.path, arguments.out, arguments.reader, options=parse_options(arguments.option), progress=bar)
    known = f", {report.num_known} were there already" if report.num_known else ""
    print(f"{report.path}: {report.num_episodes} episodes with {report.num_frames} frames added{known}")
    for skipped in report.skipped:
        print(f"left out: {skipped}")
    return 0


def _inspect(arguments: argparse.Namespace, command: str) -> int:
    from dreamer.pipeline.inspect import inspect_path
    from dreamer.yaml_config import parse_options

    def progress(done: int, total: int) -> None:
        if sys.stderr.isatty():  # videos take a while
            print(f"\r{done} of {total}", end="\n" if done == total else "", file=sys.stderr, flush=True)

    options = parse_options(arguments.option)
    found = inspect_path(arguments.path, arguments.reader, options, max_episodes=arguments.max_episodes, progress=progress)
    print(found.text())
    for file in found.write(arguments.out) if arguments.out else []:
        print(f"written: {file}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
