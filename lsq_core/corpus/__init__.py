"""Text corpora, for calibration and for evaluation."""
