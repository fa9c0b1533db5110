"""``python -m fuzz npy --seconds 600``: one target; ``python -m fuzz --all --jobs 2``: every target, some at a time."""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fuzz.driver import TARGET_NAMES, child, fuzz_target


def main(words: list[str]) -> int:
    if words[:1] == ["child"]:
        return child(words[1], Path(words[2]), words[3:])
    parser = argparse.ArgumentParser(prog="python -m fuzz", description="Fuzz the readers of foreign files with atheris.")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGET_NAMES)}")
    parser.add_argument("--all", action="store_true", help="every target")
    parser.add_argument("--seconds", type=int, default=600, metavar="N", help="for each target (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="targets at a time (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="of the mutations (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=Path("runs/fuzz"), metavar="DIR", help="what was found (default: %(default)s)")
    parser.add_argument("--results", type=Path, metavar="DIR", help="write TARGET.json there, such as results/fuzz")
    arguments = parser.parse_args(words)
    names = list(TARGET_NAMES) if arguments.all else arguments.targets
    if not names or (unknown := [name for name in names if name not in TARGET_NAMES]):
        parser.error(f"expected --all or targets of {', '.join(TARGET_NAMES)}" + (f"; got {unknown[0]!r}" if names else ""))

    def one(name: str) -> int:
        command = f"python -m fuzz {name} --seconds {arguments.seconds} --seed {arguments.seed}"
        result = fuzz_target(name, arguments.seconds, arguments.seed, arguments.work / name, command)
        if arguments.results:
            result.write(arguments.results / f"{name}.json")
        print(result.text(), flush=True)
        return len(result.findings)

    with ThreadPoolExecutor(max(1, arguments.jobs)) as pool:
        return 1 if sum(pool.map(one, names)) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
