"""Measuring models on text, and predicting what a plan will measure."""
