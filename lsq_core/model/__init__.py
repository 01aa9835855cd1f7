"""Models: their sources, structure and loading."""
