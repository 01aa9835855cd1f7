"""The way from a model to a run, stage by stage; :class:`lsq_core.session.Session` calls them.

Each stage is a function of an :class:`lsq_core.stages.model.OpenModel`. What it makes is kept in
the store, and what the store has already is not made again.
"""
