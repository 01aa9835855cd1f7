"""An actor that measures a part of a profile."""

from __future__ import annotations

from lsq_core.distributed.actor import ModelActor, check_calibration
from lsq_core.distributed.messages import ProfileTask
from lsq_core.profiling.profile import Profile
from lsq_core.stages.profile import measure_metrics


class Profiler(ModelActor):
    """Measures metrics on some layers; the driver stores the results."""

    def _measure(self, task: ProfileTask) -> Profile:
        settings = self.setup.settings
        check_calibration(settings.calibration, task.corpus)
        return measure_metrics(
            self.session, settings, task.profile, task.metrics, "profile", task.layers
        )
