"""The version of this project."""

__version__ = "0.5.0"
