"""Algorithm 1 of [A]: outlier layers, detected by differences between neighbours."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

#: Fraction trimmed at each end before the mean and standard deviation are computed, and the z-score
#: threshold.
TRIM_FRACTION = 0.05
THRESHOLD = 3.0


@dataclass(frozen=True, eq=False)
class Detection:
    """Algorithm 1 applied to one series of scores, one for each layer that has the module type.

    ``differences``, ``z`` and ``rises`` (whether the score exceeds the previous layer's) are
    (layers − 1,). ``flagged`` holds indices into the series, strongest first.
    """

    differences: np.ndarray
    rises: np.ndarray
    mean: float
    deviation: float
    z: np.ndarray
    flagged: tuple[int, ...]


def detect_outliers(
    series: np.ndarray, *, ratios: bool, top_m: int = 0, threshold: float = THRESHOLD
) -> Detection:
    """Flag layers whose score differs unusually from the previous layer's.

    Parameters
    ----------
    series
        Scores in layer order, (layers,).
    ratios
        Whether to divide neighbouring scores (SensiBoost) or subtract them (KurtBoost).
    top_m
        Keep only the strongest ``top_m``; 0 keeps all.
    threshold
        The z-score above which a layer is flagged.

    Example
    -------
    >>> detect_outliers(np.r_[np.ones(15), 9, np.ones(14)], ratios=False).flagged
    (15, 16)
    """
    series = np.asarray(series, dtype=float)
    if len(series) < 3 or not np.isfinite(series).all():
        nothing = np.zeros(0)
        return Detection(nothing, nothing.astype(bool), np.nan, np.nan, nothing, ())
    with np.errstate(divide="ignore", invalid="ignore"):
        differences = series[1:] / series[:-1] if ratios else np.diff(series)
        cut = int(TRIM_FRACTION * len(differences))
        trimmed = np.sort(differences)[cut : len(differences) - cut]
        mean, deviation = float(trimmed.mean()), float(trimmed.std(ddof=1))
        z = np.abs(differences - mean) / deviation
    above_threshold = np.flatnonzero(z > threshold)
    strongest = above_threshold[np.argsort(-z[above_threshold], kind="stable")]
    selected = strongest[:top_m] if top_m else strongest
    rises = series[1:] > series[:-1]
    return Detection(differences, rises, mean, deviation, z, tuple(int(i) + 1 for i in selected))


def largest_possible_z(layers: int) -> float:
    """Return the largest z-score possible for ``layers`` scores if nothing is trimmed.

    For ``n`` differences this is ``(n − 1)/√n``; with fewer than 20, a 5 % cut trims none.
    """
    n = layers - 1
    return (n - 1) / np.sqrt(n) if n > 1 else 0.0


def shallow_model_note(layers: int) -> str:
    """Return a note if a model is too shallow for Algorithm 1, else ''."""
    if largest_possible_z(layers) <= THRESHOLD:
        return (
            f"With {layers} layers no z-score can exceed Algorithm 1's threshold of 3 "
            f"(the largest possible z is {largest_possible_z(layers):.2f}), so SensiBoost and "
            "KurtBoost equal the uniform plan here."
        )
    if layers - 1 < 20:
        return (
            f"With {layers} layers Algorithm 1 trims nothing and hardly ever flags a layer; "
            "interpret its plans with care."
        )
    return ""
