"""`upweight new`: a commented recipe to start from, which runs as it is."""

from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

from upweight.app.recipe import NAME
from upweight.core.errors import UserError

START = "start.txt"


def write_start(path: Path) -> str:
    """Write the start to `path` and return what to do next. An existing file is refused, not replaced."""
    if path.suffix != ".py" or not NAME.fullmatch(path.stem):
        raise UserError(f"{path}: a recipe is a Python file; give it a name like my_recipe.py")
    if not path.parent.is_dir():
        raise UserError(f"{path.parent} is no directory: make it first")
    module = find_spec(path.stem) if "." not in path.stem and not path.exists() else None
    if module is not None and module.origin is not None:  # a directory of that name has none, and is no module
        raise UserError(f"{path} would hide the module {path.stem} from everything beside it: give it another name")
    text = files("upweight.app").joinpath(START).read_text().format(file=path, name=path.stem)
    try:
        with path.open("x") as file:
            file.write(text)
    except FileExistsError:
        raise UserError(f"{path} exists already: give another name, or remove it first") from None
    return f"wrote {path}. Next: upweight plan {path}, then upweight run {path}"
