"""Profiles: how hard each matrix of a model is to quantize."""
