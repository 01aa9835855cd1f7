"""End-to-end tests of small models of every causal LM architecture in transformers."""
