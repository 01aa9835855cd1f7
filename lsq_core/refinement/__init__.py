"""Refine a plan by exchanges that keep its size and lower the measured KL divergence."""
