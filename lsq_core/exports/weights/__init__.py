"""Quantized models in the formats of other tools: MLX, GGUF and compressed-tensors.

A format is one file in this package and one entry in
:data:`lsq_core.exports.weights.registry.FORMATS`.
"""
