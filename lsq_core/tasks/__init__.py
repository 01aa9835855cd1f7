"""Tasks of EleutherAI's lm-eval, an optional dependency installed by ``make lm-eval``."""
