"""Evaluation of models on a corpus, and prediction of the perplexity of plans."""
