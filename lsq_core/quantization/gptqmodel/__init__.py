"""GPTQ and AWQ, run by the ``gptqmodel`` package in a separate process."""
