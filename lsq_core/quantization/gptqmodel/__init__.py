"""GPTQ and AWQ, by the ``gptqmodel`` package in a process of its own."""
