"""The way from a model to a run, stage by stage; :class:`lsq_core.session.Session` calls them.

Each stage is a function of an :class:`lsq_core.stages.model.OpenModel`. Results go to
the store; what the store has already is not computed again.
"""
