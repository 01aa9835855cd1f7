"""Work on Ray: an actor a device measures plans or profiles, and the driver stores the results."""
