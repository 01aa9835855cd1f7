"""The search: expand about a plan, propose exchanges of the same size, keep what measures better.

Each round expands the divergence about the present plan and solves a knapsack on the expected
changes, to which standard errors are added: without that margin the exchanges that are chosen are
those that chance made look best. The plans by some margins are measured side by side, and the
search goes on from the best where that is better than the present one. Each round reads other
sequences, and the search ends after some rounds in which no proposal was better.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from lsq_core.refinement.step import RefinementStep

if TYPE_CHECKING:
    from lsq_core.refinement.expansion import Expansion

#: Standard errors that are added to the expected changes, each for a proposal: with more of them
#: fewer matrices change.
MARGINS = (0.0, 1.0, 2.0, 3.0)
#: Rounds without a better proposal that end a search.
PATIENCE = 2


def refine(
    start: RefinementStep,
    expand: Callable[[RefinementStep], Expansion],
    solve: Callable[[np.ndarray], np.ndarray],
    measure: Callable[[Sequence[np.ndarray]], Sequence[float]],
) -> Iterator[RefinementStep]:
    """Yield the best plan so far after each round, until rounds bring nothing better.

    ``expand`` gives the expansion about a step's choice, on the part of the text that its number of
    rounds tells, ``solve`` the choice within the budget that costs least by a cost (n, options),
    and ``measure`` the measured divergence of choices.
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
    """Return the different plans that margins lead to, without the present one."""
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
