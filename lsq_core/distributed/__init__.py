"""Work on Ray: one actor per device measures plans or profiles; the driver stores the results."""
