"""Plans: which matrix gets which configuration. Nothing here imports torch."""
