"""Half-quadratic quantization (HQQ)."""
