"""Quantized models: their modules, making them, saving and loading them."""
