"""Comparison, export and reports of runs."""
