"""Fuzzing of everything that reads a file, or a message, from elsewhere: ``python -m fuzz --help``; docs/fuzzing.md tells the rest."""
