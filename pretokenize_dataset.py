"""Encode recordings once, before training: ``python pretokenize_dataset.py --data-path DIR --output-path DIR [--max-episodes N]``.

The same as ``dreamer pretokenize``; ``--help`` shows all options.
"""

import sys

from dreamer.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["pretokenize", *sys.argv[1:]]))
