"""Tools for looking into trained models. Each is also a command: ``python -m dreamer.utils.NAME``."""
