"""The stages from a model to a run, called by :class:`lsq_core.session.Session`.

Each stage is a function of an :class:`lsq_core.stages.model.OpenModel`. Results are saved in the
store, and stored results are not computed again.
"""
