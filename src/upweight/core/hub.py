"""Names on the Hugging Face hub: where a path is no directory here, it may be one of these."""

import re
from collections.abc import Sequence
from pathlib import Path

from upweight.core.errors import UserError

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
MODEL_FILES = ("*.safetensors", "*.json", "*.jinja")
TOKENIZER_FILES = ("tokenizer*.json", "special_tokens_map.json", "*.jinja")


def find_directory(path: str | Path, patterns: Sequence[str] = MODEL_FILES) -> Path:
    """A local directory as it is, or the snapshot of a hub name, downloaded where it is not at hand."""
    directory = Path(path)
    if directory.is_dir():
        return directory
    if not HUB_NAME.fullmatch(str(path)):
        raise UserError(f"{path} is neither a directory nor a name on the hub such as Qwen/Qwen3-0.6B")
    # imported here: only a name on the hub needs it
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(path), allow_patterns=list(patterns)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(f"{path} is no directory here, and the hub did not give it: {error}") from error
