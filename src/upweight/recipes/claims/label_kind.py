"""Labels about content predict usefulness better than labels about format.

Report, section 2.1. A regression on the scores of the dimensions about format, on those about content, and on all: how
many useless documents does it rank below a useful one? The annotated documents are given with --annotated; each seed
draws half of them. The halves overlap, so the stars, with documents as units, say more here than the interval over
seeds. The reference are labels about format.
"""

from upweight.app.recipe import Recipe
from upweight.curate.usefulness import Labels
from upweight.recipes.claims import of_labels


def recipe(seed: int = 0, annotated: str = "") -> Recipe:
    """Three choices of dimensions on the same documents."""
    return of_labels("label_kind", annotated, {kind: Labels(kind) for kind in ("format", "content", "all")}, seed)
