"""LSQ Explorer's library: layer-sensitive mixed-precision quantization of language models.

The way through it, each step one function that a notebook can call::

    ModelSource -> Profile -> Plan -> quantized model -> Run, all kept in a Store

Importing this package imports neither torch nor Streamlit.
"""

__version__ = "0.3.0"
