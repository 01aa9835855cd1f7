"""The version of this project."""

__version__ = "0.6.0"
