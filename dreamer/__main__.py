"""``python -m dreamer``: the same as the command ``dreamer``."""

from dreamer.cli import main

raise SystemExit(main())
