"""Two findings of the report, asked of annotated documents: what tells useful text from useless?

    python -m benchmarks.findings annotated_documents.jsonl

The report (section 2.1) found labels about content to predict usefulness better than labels about format, and scores
0-9 better than binary ones. Useful is here what a source was chosen for: text that teaches (encyclopedia, handbooks,
instruction answers, sound word problems) against text that cannot (spam, corrupted and repeated text, data files,
licences, damaged word problems). A logistic regression on the scores is fitted on four fifths of the documents and
ranks the others: the area under the ROC curve, pooled over five folds, with 95% intervals by bootstrap over documents.
"""

import argparse
from itertools import combinations
from pathlib import Path

import numpy as np

from upweight.curate.usefulness import Labels, outranked, ranked, read_judged

HARD = "word-problems-"
"""Sources within which only soundness differs: the same problems clean and damaged."""
RESAMPLES = 1_000


def area(values: np.ndarray, labels: np.ndarray) -> float:
    """The share of pairs of a useful and a useless document that are ranked right, ties half."""
    return float(outranked(values, labels).mean())


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
    sets = {
        "content, 12 dimensions, 0-9": Labels("content"),
        "format, 8 dimensions, 0-9": Labels("format"),
        "all 20, 0-9": Labels(),
        "all 20, binary (5 or more)": Labels(binary="half"),
        "all 20, binary (above the median)": Labels(binary="median"),
        "content, binary (5 or more)": Labels("content", "half"),
        "format, binary (5 or more)": Labels("format", "half"),
    }
    found = {name: ranked(chosen.of(scores), labels) for name, chosen in sets.items()}
    rows = [f"| {name} | {interval(values, labels)} |" for name, values in found.items()]
    content, form = Labels("content").of(scores), Labels("format").of(scores)
    chosen = list(combinations(range(content.shape[1]), form.shape[1]))[:: 495 // 45]
    fair = [area(ranked(content[:, columns], labels), labels) for columns in chosen]
    rows.append(f"| content, 8 of the 12 dimensions, mean of {len(fair)} choices | {np.mean(fair):.3f} |")
    names = list(found)
    rows.append(f"| content - format | {paired(found[names[0]], found[names[1]], labels)} |")
    rows.append(f"| 0-9 - binary (5 or more) | {paired(found[names[2]], found[names[3]], labels)} |")
    rows.append(f"| 0-9 - binary (above the median) | {paired(found[names[2]], found[names[4]], labels)} |")
    return rows


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("annotated", type=Path)
    judged = read_judged(parser.parse_args().annotated)
    for name, prefix in (("all kinds of text", ""), ("word problems alone", HARD)):
        chosen = judged.of(prefix)
        scores, labels = chosen.scores, chosen.useful
        print(f"\n| {name}: {int(labels.sum())} useful, {int((~labels).sum())} not | area under the curve |")
        print("| --- | ---: |")
        print("\n".join(report(scores, labels)))


if __name__ == "__main__":
    main()
