"""Refine a plan by measuring: exchanges that keep its size, kept where measured KL falls."""
