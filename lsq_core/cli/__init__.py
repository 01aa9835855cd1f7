"""The command line: ``lsq VERB``; :mod:`lsq_core.cli.program` runs it."""
