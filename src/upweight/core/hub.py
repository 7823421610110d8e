"""Names on the Hugging Face hub: where a path is no directory here, it may be a model or a data set of that name."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from upweight.core.errors import UserError

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
MODEL_FILES = ("*.safetensors", "*.json", "*.jinja")
TOKENIZER_FILES = ("tokenizer*.json", "special_tokens_map.json", "*.jinja")


def find_directory(
    path: str | Path, patterns: Sequence[str] = MODEL_FILES, *, kind: Literal["model", "dataset"] = "model"
) -> Path:
    """A local directory as it is, or the snapshot of a hub name, downloaded where it is not at hand.

    Args:
        patterns: which files of the snapshot are needed.
        kind: what the hub holds under that name.
    """
    directory = Path(path)
    if directory.is_dir():
        return directory
    if not HUB_NAME.fullmatch(str(path)):
        raise UserError(f"{path} is neither a directory nor a name on the hub such as Qwen/Qwen3-0.6B")
    # imported here: only a name on the hub needs it
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(path), repo_type=kind, allow_patterns=list(patterns)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(f"{path} is no directory here, and the hub did not give it: {error}") from error


def open_dataset(name: str, *, split: str, subset: str | None = None, streaming: bool = False) -> Any:
    """The rows of a data set of the `datasets` library: a hub name, or a directory that `save_to_disk` wrote.

    Args:
        split, subset: as `load_dataset` takes them.
        streaming: rows of a hub name are fetched as they are read; a directory is read from the disk either way.

    Raises UserError where the library is missing (the extra `datasets`), and where the data set cannot be opened.
    """
    try:
        # imported here: an optional extra
        import datasets
    except ImportError:
        raise UserError(
            f"reading the data set {name} needs the package datasets: pip install 'upweight[datasets]', or name its "
            "JSON lines or parquet files instead"
        ) from None
    directory = Path(name)
    try:
        if (directory / "dataset_dict.json").exists():
            return datasets.load_from_disk(name)[split]
        if (directory / "state.json").exists():
            return datasets.load_from_disk(name)
        return datasets.load_dataset(name, subset, split=split, **({"streaming": True} if streaming else {}))
    except (OSError, ValueError, KeyError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        told = (str(error).strip() or type(error).__name__).splitlines()[0]
        if isinstance(error, KeyError):
            told = f"it has no split {told}"
        raise UserError(f"the data set {name} (subset {subset}, split {split}) cannot be opened: {told}") from error
