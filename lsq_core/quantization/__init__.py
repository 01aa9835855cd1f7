"""Quantizers, and what they store a matrix as."""
