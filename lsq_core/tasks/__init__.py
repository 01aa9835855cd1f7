"""Tasks of EleutherAI's lm-eval, an extra that ``make lm-eval`` installs."""
