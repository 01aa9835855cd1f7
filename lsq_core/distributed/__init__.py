"""Sweeps on Ray: an actor a device measures plans, and the driver stores what comes of them."""
