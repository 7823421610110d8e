"""How far an answer's form carries a judge's preference, and what is left without it: style control.

Each game of an answer against the baseline has an outcome y in 0-1 and the differences z of four features of form
(length, and headings, list items and bold words for each token), standardised over the games. Fitted is

    P(win) = sigmoid(c + w . z)

and sigmoid(c) is the win rate at equal form (Chatbot Arena's style control; Arena-Hard-Auto v2 does the same). A little
ridge on w keeps the fit finite where few games are decided by form alone.
"""

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

RIDGE = 1e-2
STEPS = 50
_CODE = re.compile(r"```.*?```", re.DOTALL)
_TOKENS = re.compile(r"\w+|[^\w\s]")
_FORMS = (
    re.compile(r"^#{1,6}\s", re.MULTILINE),
    re.compile(r"^\s*(?:[-*+]|\d+\.)\s", re.MULTILINE),
    re.compile(r"\*\*[^*\n]+\*\*|__[^_\n]+__"),
)


def features(text: str) -> NDArray[np.float64]:
    """Length in words and marks, then headings, list items and bold stretches; code counts towards the length alone."""
    bare = _CODE.sub("", text)
    return np.array([len(_TOKENS.findall(text)), *(len(form.findall(bare)) for form in _FORMS)], dtype=np.float64)


def difference(answer: NDArray[np.float64], baseline: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of length the relative difference, of the rest the relative difference of their densities."""
    lengths = np.array([max(answer[0], 1.0), max(baseline[0], 1.0)])
    length = (lengths[0] - lengths[1]) / lengths.sum()
    ours, theirs = answer[1:] / lengths[0], baseline[1:] / lengths[1]
    return np.concatenate([[length], (ours - theirs) / (ours + theirs + 1.0)])


def controlled(outcomes: Sequence[float], differences: Sequence[NDArray[np.float64]]) -> float:
    """The win rate at equal form, from one outcome and one difference of features a game.

    Args:
        outcomes: 0-1 each, at least one.
        differences: in the same order; see `difference`.
    """
    wins = np.asarray(outcomes, dtype=np.float64)
    form = np.stack(list(differences))
    spread = form.std(axis=0)
    form = (form - form.mean(axis=0)) / np.where(spread > 0, spread, 1.0)
    # centred features put the mean form at c; equal form lies where the raw differences are 0
    zero = (0.0 - np.stack(list(differences)).mean(axis=0)) / np.where(spread > 0, spread, 1.0)
    design = np.concatenate([np.ones((len(wins), 1)), form], axis=1)
    penalty = np.diag([1e-6, *([RIDGE * len(wins)] * form.shape[1])])
    weights = np.zeros(design.shape[1])
    for _ in range(STEPS):  # Newton's method; the ridge makes it strictly convex
        chances = 1.0 / (1.0 + np.exp(-design @ weights))
        gradient = design.T @ (chances - wins) + penalty @ weights
        curvature = (design * (chances * (1.0 - chances))[:, None]).T @ design + penalty
        step = np.linalg.solve(curvature, gradient)
        weights -= step
        if np.abs(step).max() < 1e-10:
            break
    return float(1.0 / (1.0 + np.exp(-(weights[0] + weights[1:] @ np.where(spread > 0, zero, 0.0)))))
