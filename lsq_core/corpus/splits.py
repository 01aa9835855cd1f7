"""The two parts of every corpus."""

#: What a profile is measured on, and what perplexity is; no text is in both.
SPLITS = ("calibration", "evaluation")
