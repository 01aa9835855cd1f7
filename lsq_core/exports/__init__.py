"""Plans and quantized models in the formats of other tools."""
