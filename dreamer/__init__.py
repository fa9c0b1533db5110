"""Dreamer 4: a world model learned from recordings, and an agent that learns inside it."""

__version__ = "0.1.0"
