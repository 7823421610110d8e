"""Two findings of the report, asked of annotated documents: what tells useful text from useless?

    python -m benchmarks.findings annotated_documents.jsonl

The report (section 2.1) found labels about content to predict usefulness better than labels about format, and scores
0-9 better than binary ones. Useful is here what a source was chosen for: text that teaches (encyclopedia, handbooks,
instruction answers, sound word problems) against text that cannot (spam, corrupted and repeated text, data files,
licences, damaged word problems). A logistic regression on the scores is fitted on four fifths of the documents and
ranks the others: the area under the ROC curve, pooled over five folds, with 95% intervals by bootstrap over documents.
"""

import argparse
import json
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np

from upweight.curate.dimensions import DIMENSIONS

USEFUL = (
    *(
        "wikipedia",
        "rust-book",
        "debian-handbook",
        "python-docs",
        "linux-docs",
        "sympy-docs",
        "maxima-docs",
        "gap-docs",
    ),
    *("man-pages", "instruction-answers", "word-problems-clean"),
)
USELESS = (
    *("spam", "corrupted-ocr", "corrupted-shuffled", "corrupted-mojibake", "repeated", "data-files", "licences"),
    *(f"word-problems-{damage}" for damage in ("wrong", "bare", "typo", "garb", "rep", "eqs")),
)
HARD = ("word-problems-",)
"""Sources within which only soundness differs: the same problems clean and damaged."""
FOLDS, RESAMPLES, PENALTY, STEPS = 5, 1_000, 1.0, 30


def fitted(rows: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Weights and offset of a ridge-penalised logistic regression, by Newton's method."""
    rows = np.concatenate([rows, np.ones((len(rows), 1))], 1)
    weights = np.zeros(rows.shape[1])
    ridge = PENALTY * np.eye(len(weights))
    ridge[-1, -1] = 1e-6
    for _ in range(STEPS):
        share = 1 / (1 + np.exp(-(rows @ weights)))
        gradient = rows.T @ (share - labels) + ridge @ weights
        curvature = (rows * (share * (1 - share))[:, None]).T @ rows + ridge
        weights -= np.linalg.solve(curvature, gradient)
    return weights


def predicted(rows: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """What a regression on the other folds says of each row; columns are standardised on those as well."""
    fold = np.random.default_rng(0).permutation(len(rows)) % FOLDS
    found = np.zeros(len(rows))
    for number in range(FOLDS):
        inside, outside = fold != number, fold == number
        mean, spread = rows[inside].mean(0), rows[inside].std(0) + 1e-9
        weights = fitted((rows[inside] - mean) / spread, labels[inside])
        found[outside] = ((rows[outside] - mean) / spread) @ weights[:-1] + weights[-1]
    return found


def area(values: np.ndarray, labels: np.ndarray) -> float:
    """The share of pairs of a useful and a useless document that are ranked right, ties half."""
    _, place, times = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(times) - (times - 1) / 2)[place]
    useful = labels.sum()
    return float((ranks[labels > 0].sum() - useful * (useful + 1) / 2) / (useful * (len(labels) - useful)))


def interval(values: np.ndarray, labels: np.ndarray) -> str:
    """The area with its interval."""
    random = np.random.default_rng(0)
    areas = []
    for _ in range(RESAMPLES):
        sample = random.integers(0, len(labels), len(labels))
        areas.append(area(values[sample], labels[sample]))
    low, high = np.quantile(areas, (0.025, 0.975))
    return f"{area(values, labels):.3f} ({low:.3f}-{high:.3f})"


def paired(first: np.ndarray, second: np.ndarray, labels: np.ndarray) -> str:
    """The difference of two areas on the same documents, with its interval."""
    random = np.random.default_rng(0)
    found = []
    for _ in range(RESAMPLES):
        sample = random.integers(0, len(labels), len(labels))
        found.append(area(first[sample], labels[sample]) - area(second[sample], labels[sample]))
    low, high = np.quantile(found, (0.025, 0.975))
    return f"{area(first, labels) - area(second, labels):+.3f} ({low:+.3f} to {high:+.3f})"


def report(scores: np.ndarray, labels: np.ndarray) -> list[str]:
    """The rows of the table for one contrast."""
    content = [place for place, dimension in enumerate(DIMENSIONS) if dimension.kind == "content"]
    form = [place for place, dimension in enumerate(DIMENSIONS) if dimension.kind == "format"]
    every = [*content, *form]
    binary = (scores >= 5).astype(float)
    split = (scores > np.median(scores, axis=0)).astype(float)
    sets: dict[str, tuple[np.ndarray, Sequence[int]]] = {
        "content, 12 dimensions, 0-9": (scores, content),
        "format, 8 dimensions, 0-9": (scores, form),
        "all 20, 0-9": (scores, every),
        "all 20, binary (5 or more)": (binary, every),
        "all 20, binary (above the median)": (split, every),
        "content, binary (5 or more)": (binary, content),
        "format, binary (5 or more)": (binary, form),
    }
    ranked = {name: predicted(table[:, columns], labels) for name, (table, columns) in sets.items()}
    rows = [f"| {name} | {interval(values, labels)} |" for name, values in ranked.items()]
    chosen = list(combinations(content, len(form)))[:: 495 // 45]
    fair = [area(predicted(scores[:, columns], labels), labels) for columns in chosen]
    rows.append(f"| content, 8 of the 12 dimensions, mean of {len(fair)} choices | {np.mean(fair):.3f} |")
    names = list(ranked)
    rows.append(f"| content - format | {paired(ranked[names[0]], ranked[names[1]], labels)} |")
    rows.append(f"| 0-9 - binary (5 or more) | {paired(ranked[names[2]], ranked[names[3]], labels)} |")
    rows.append(f"| 0-9 - binary (above the median) | {paired(ranked[names[2]], ranked[names[4]], labels)} |")
    return rows


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("annotated", type=Path)
    records = [json.loads(line) for line in parser.parse_args().annotated.read_text().split("\n") if line]
    for name, wanted in (("all kinds of text", ("",)), ("word problems alone", HARD)):
        chosen = [
            record
            for record in records
            if record["source"] in (*USEFUL, *USELESS) and record["source"].startswith(wanted)
        ]
        scores = np.array([record["scores"] for record in chosen], float)
        labels = np.array([record["source"] in USEFUL for record in chosen], float)
        print(f"\n| {name}: {int(labels.sum())} useful, {int((1 - labels).sum())} not | area under the curve |")
        print("| --- | ---: |")
        print("\n".join(report(scores, labels)))


if __name__ == "__main__":
    main()
