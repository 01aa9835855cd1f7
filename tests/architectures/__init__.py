"""Every causal language model that transformers can build, small, through the whole way."""
