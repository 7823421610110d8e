"""The prompts of refinement and reconstruction: texts with {{places}}, one file each, to be read and replaced.

`Prompts.of(folder)` takes those that lie in a folder of one's own (critique.md, ...) and the shipped ones else.

A configuration holds the texts themselves, so that a changed prompt is a changed identity and is refused as stale.
"""

import re
from importlib.resources import files
from pathlib import Path

from upweight.core.errors import UserError

_PLACE = re.compile(r"\{\{(\w+)\}\}")


def read_prompt(name: str, folder: str | Path | None = None) -> str:
    """The text of the prompt of that name: FOLDER/NAME.md where there is one, else as shipped."""
    own = None if folder is None else Path(folder) / f"{name}.md"
    if own is not None and own.exists():
        return own.read_text("utf-8")
    return (files(__name__) / f"{name}.md").read_text("utf-8")


def require(name: str, text: str, *places: str) -> None:
    """Raises UserError where a prompt lacks a place without which its part could not be played."""
    missing = [place for place in places if f"{{{{{place}}}}}" not in text]
    if missing:
        raise UserError(
            f"the prompt {name} has no place {', '.join(f'{{{{{place}}}}}' for place in missing)}: whoever is asked "
            "with it would not see it. Put it into the text"
        )


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
