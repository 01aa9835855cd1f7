"""Quantized models: modules, conversion, saving and loading."""
