"""Quantizers and the formats in which they store matrices."""
