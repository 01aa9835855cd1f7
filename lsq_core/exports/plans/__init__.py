"""One file for each tool that a plan can be exported to."""
