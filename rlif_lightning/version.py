"""The version, alone in a file that needs no import to read."""

__version__ = "0.1.0"
