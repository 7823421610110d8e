"""The prompts of refinement and reconstruction: texts with {{places}}, one file each, to be read and replaced.

A configuration holds the texts themselves, so that a changed prompt is a changed identity and is refused as stale.
"""

import re
from importlib.resources import files

from upweight.core.errors import UserError

_PLACE = re.compile(r"\{\{(\w+)\}\}")


def read_prompt(name: str) -> str:
    """The text of the prompt of that name, as shipped."""
    return (files(__name__) / f"{name}.md").read_text("utf-8")


def fill(text: str, **values: str) -> str:
    """`text` with each {{place}} replaced by its value. The values themselves are not searched for places.

    Raises UserError where the text has a place for which there is no value.
    """
    missing = sorted(set(_PLACE.findall(text)) - values.keys())
    if missing:
        raise UserError(
            f"the prompt that begins {text[:40]!r} has places for {', '.join(missing)}, which are not known here: "
            f"use {', '.join(sorted(values))}"
        )
    return _PLACE.sub(lambda found: values[found[1]], text)
