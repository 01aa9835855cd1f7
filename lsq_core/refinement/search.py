"""The refinement search: expand around a plan, propose exchanges of equal size, keep improvements.

Each round expands the divergence around the present plan and solves knapsacks on the expected
changes plus a margin of some standard errors: without a margin, the exchanges chosen tend to be
those that look best by chance. The plans for several margins are measured side by side, and if the
best of them improves on the present plan, the search continues from it. Each round reads different
sequences, and the search ends after several consecutive rounds without an improvement.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from lsq_core.refinement.step import RefinementStep

if TYPE_CHECKING:
    from lsq_core.refinement.expansion import Expansion

#: Numbers of standard errors added to the expected changes, one for each proposal; with a larger
#: margin, fewer matrices change.
MARGINS = (0.0, 1.0, 2.0, 3.0)
#: Consecutive rounds without a better proposal after which the search ends.
PATIENCE = 2


def refine(
    start: RefinementStep,
    expand: Callable[[RefinementStep], Expansion],
    solve: Callable[[np.ndarray], np.ndarray],
    measure: Callable[[Sequence[np.ndarray]], Sequence[float]],
) -> Iterator[RefinementStep]:
    """Yield the best plan so far after each round, until ``PATIENCE`` rounds in a row fail.

    ``expand`` returns the expansion around a step's choice, on the part of the text selected by its
    number of rounds. ``solve`` returns the choice within the budget that minimises a cost
    (n, options), and ``measure`` the measured divergence of each choice.
    """
    present = start
    while present.failed < PATIENCE:
        expansion = expand(present)
        proposals = _propose(present, expansion, solve)
        measured = measure([proposal.choice for proposal in proposals]) if proposals else []
        best = min(zip(measured, proposals, strict=True), key=lambda pair: pair[0], default=None)
        rounds = present.rounds + 1
        if best is not None and best[0] < present.kl:
            present = replace(best[1], kl=float(best[0]), rounds=rounds)
        else:
            present = replace(present, rounds=rounds, failed=present.failed + 1)
        yield present


def _propose(
    present: RefinementStep, expansion: Expansion, solve: Callable[[np.ndarray], np.ndarray]
) -> list[RefinementStep]:
    """Return the distinct plans for all margins, excluding the present one."""
    seen, proposals = [present.choice], []
    rows = np.arange(len(present.choice))
    share = expansion.kl / len(rows)
    for margin in MARGINS:
        cost = share + expansion.change + margin * expansion.error
        choice = solve(cost)
        if any(np.array_equal(choice, other) for other in seen):
            continue
        seen.append(choice)
        expected = present.kl + float(np.nansum(expansion.change[rows, choice]))
        proposals.append(RefinementStep(present.number + 1, choice, np.nan, cost, margin, expected))
    return proposals
