"""The two parts of every corpus."""

#: Profiles are measured on the first, perplexity on the second; only local files share texts.
SPLITS = ("calibration", "evaluation")
