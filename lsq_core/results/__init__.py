"""Runs side by side: comparison, export, reports."""
