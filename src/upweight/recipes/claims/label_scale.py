"""Scores of 0-9 predict usefulness better than binary labels.

Report, section 2.1. A regression on all 20 scores of annotated documents, on whether each is 5 or more, and on whether
each is above its median: how many useless documents does it rank below a useful one? The annotated documents are given
with --annotated; each seed draws half of them. The halves overlap, so the stars, with documents as units, say more here
than the interval over seeds. The reference are labels of 5 or more.
"""

from upweight.app.recipe import Recipe
from upweight.curate.usefulness import Labels
from upweight.recipes.claims import of_labels


def recipe(seed: int = 0, annotated: str = "") -> Recipe:
    """Three kinds of labels on the same documents."""
    arms = {"five_or_more": Labels(binary="half"), "above_median": Labels(binary="median"), "scores": Labels()}
    return of_labels("label_scale", annotated, arms, seed)
