"""Evaluate two plans of the demo model, and kill the process at a given progress message.

Run as ``python -m tests.killed_walk FOLDER MESSAGE``; the process should die by SIGKILL.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from lsq_core.evaluation import walk_file
from lsq_core.evaluation.perplexity import evaluate_models
from lsq_core.evaluation.protocol import EvaluationText
from lsq_core.model.loading import load_model
from lsq_core.model.source import ModelSource
from tests.test_walk import PROTOCOL, make_ids, quantize_plans


def main(folder: Path, message: str) -> None:
    """Evaluate until the progress message contains ``message``, then send SIGKILL to itself."""

    def progress(done: int, total: int, told: str) -> None:
        if message in told:
            os.kill(os.getpid(), signal.SIGKILL)

    walk_file.SAVE_INTERVAL_S, walk_file._MAX_SAVING_SHARE = 0.0, 1e9
    demo = load_model(ModelSource("demo"), "cpu")
    list(
        evaluate_models(
            quantize_plans(demo, 0, 5),
            [EvaluationText(make_ids(), PROTOCOL)],
            bos=0,
            reference=demo.model,
            progress=progress,
            checkpoints=[[folder / f"evaluation-{k}.npz" for k in range(2)]],
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
