"""Weights in Hugging Face's format, in and out: directories that transformers and vLLM open.

Ours and theirs differ in two ways, both undone exactly. The projections of attention and of the feed-forward network
are stored fused here (`qkv`: for each key/value head its query heads, its key, its value; `gate_up`), one by one there.
Rotary features that turn together are neighbours here, and head_size / 2 apart there.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from upweight.core.errors import UserError
from upweight.core.hub import find_directory
from upweight.model.config import ModelConfig
from upweight.model.hub_config import from_hub_config, to_hub_config
from upweight.model.transformer import Transformer

INDEX_NAME = "model.safetensors.index.json"
WEIGHTS_NAME = "model.safetensors"
SHARD_BYTES = 5 * 10**9

_LAYER_NAMES = {
    "attention_norm.weight": "input_layernorm.weight",
    "query_norm.weight": "self_attn.q_norm.weight",
    "key_norm.weight": "self_attn.k_norm.weight",
    "out.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "down.weight": "mlp.down_proj.weight",
}
_TOP_NAMES = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}


def load(
    path: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[Transformer, ModelConfig]:
    """The model of a directory in Hugging Face format, or of a name on the hub ("owner/name").

    Raises UserError where the architecture is not of the Llama family (model/language_model.py opens others too), and
    where a tensor is missing, cut off or of another shape than the config says; the message names it.
    """
    directory = find_directory(path)
    config = read_config(directory)
    with torch.device("meta"):
        model = Transformer(config)
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    state = from_hub_names(_Stored(directory), config, wanted, dtype)
    model.load_state_dict(state, assign=True)
    return model.to(device), config


def read_config(path: str | Path) -> ModelConfig:
    """The config of a model directory, without its weights."""
    file = Path(path) / "config.json"
    try:
        fields = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is not readable as JSON ({error}): is {path} a model directory?") from error
    if not isinstance(fields, dict):
        raise UserError(f"{file} is no model's config: it holds no JSON object")
    return from_hub_config(fields, where=str(file))


def save(model: Transformer, path: str | Path, *, dtype: torch.dtype | None = None) -> None:
    """Write config.json and safetensors that transformers and vLLM open; the tokenizer is saved beside them by text/.

    Each file is complete or absent, and config.json comes last: a directory that has one has its weights. Of several
    processes of one run, which hold the same weights, the first one writes.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_rank() > 0:
        return
    directory = Path(path)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.detach().to("cpu", dtype).contiguous()
        for name, tensor in to_hub_names(model.state_dict(), model.config)
    }
    shards = _shards(tensors)
    for file, part in shards.items():
        temporary = directory / f"{file}.partial"
        save_file(part, temporary, metadata={"format": "pt"})
        temporary.replace(directory / file)
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        places = {name: file for file, part in shards.items() for name in part}
        _write_json(directory / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": places})
    else:
        (directory / INDEX_NAME).unlink(missing_ok=True)
    stored = next(iter(tensors.values())).dtype
    _write_json(directory / "config.json", to_hub_config(model.config, stored))


def fingerprint(model: nn.Module) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of all weights, names and shapes included."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


class _Stored(Mapping[str, Tensor]):
    """The tensors of a directory by name, each read when it is asked for."""

    def __init__(self, directory: Path) -> None:
        index = directory / INDEX_NAME
        files = _shard_names(index) if index.exists() else [WEIGHTS_NAME]
        self._places: dict[str, Any] = {}
        self.directory = directory
        for name in files:
            file = directory / name
            if not file.exists():
                raise UserError(f"{file} is missing: the model directory is incomplete, copy or download it again")
            try:
                opened = safe_open(file, framework="pt")
                self._places.update((tensor, opened) for tensor in opened.keys())  # noqa: SIM118
            except SafetensorError as error:
                raise UserError(f"{file} is cut off or damaged ({error}): copy or download it again") from error

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._places[name].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _shard_names(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is damaged ({error}): copy or download it again") from error


def from_hub_names(
    stored: Mapping[str, Tensor], config: ModelConfig, wanted: Mapping[str, torch.Size], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Our state dict from theirs. Raises UserError for a tensor that is missing, misshaped or left over."""
    reader = _Reader(stored, config)
    state: dict[str, Tensor] = {}
    for name in wanted:
        tensor = reader.read(name)
        if not tensor.is_floating_point():
            raise UserError(
                f"the weights of {name} are stored as {str(tensor.dtype).removeprefix('torch.')}, not as "
                "floating-point numbers: they are quantized or damaged, save the model in full precision first"
            )
        state[name] = tensor.to(dtype).contiguous()
    for name, tensor in state.items():
        if tensor.shape != wanted[name]:
            raise UserError(
                f"the weights of {name} have the shape {tuple(tensor.shape)}, but config.json asks for "
                f"{tuple(wanted[name])}: the weights and the config are of different models"
            )
    ignored = {"lm_head.weight"} if config.tied else set()
    left = sorted(
        name for name in stored if name not in reader.used | ignored and not name.endswith("rotary_emb.inv_freq")
    )
    if left:
        raise UserError(f"the weights hold {len(left)} tensors that this architecture has no place for: {left[:4]}")
    return state


class _Reader:
    """Reads tensors by our names out of a mapping by theirs, and remembers which of theirs it used."""

    def __init__(self, stored: Mapping[str, Tensor], config: ModelConfig) -> None:
        self._stored, self._config = stored, config
        self.used: set[str] = set()

    def read(self, name: str) -> Tensor:
        if name in _TOP_NAMES:
            return self._take(_TOP_NAMES[name])
        _, layer, part = name.split(".", 2)
        prefix = f"model.layers.{layer}."
        if part in ("qkv.weight", "qkv.bias"):
            kind = part.removeprefix("qkv.")
            query, key, value = (self._take(f"{prefix}self_attn.{which}_proj.{kind}") for which in "qkv")
            return _fuse(query, key, value, self._config)
        if part == "gate_up.weight":
            return torch.cat([self._take(f"{prefix}mlp.{which}_proj.weight") for which in ("gate", "up")])
        tensor = self._take(prefix + _LAYER_NAMES[part])
        return (
            _neighbours(tensor, self._config.head_size) if part in ("query_norm.weight", "key_norm.weight") else tensor
        )

    def _take(self, name: str) -> Tensor:
        if name not in self._stored:
            raise UserError(
                f"the weights lack the tensor {name}: the model directory is incomplete or of another model"
            )
        self.used.add(name)
        return self._stored[name]


def to_hub_names(state: Mapping[str, Tensor], config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Their names and tensors from ours."""
    for name, tensor in state.items():
        if name in _TOP_NAMES:
            yield _TOP_NAMES[name], tensor
            continue
        _, layer, part = name.split(".", 2)
        prefix = f"model.layers.{layer}."
        if part in ("qkv.weight", "qkv.bias"):
            kind = part.removeprefix("qkv.")
            for which, projection in zip("qkv", _split(tensor, config), strict=True):
                yield f"{prefix}self_attn.{which}_proj.{kind}", projection
        elif part == "gate_up.weight":
            for which, half in zip(("gate", "up"), tensor.chunk(2), strict=True):
                yield f"{prefix}mlp.{which}_proj.weight", half
        elif part in ("query_norm.weight", "key_norm.weight"):
            yield prefix + _LAYER_NAMES[part], _halves(tensor, config.head_size)
        else:
            yield prefix + _LAYER_NAMES[part], tensor


def _fuse(query: Tensor, key: Tensor, value: Tensor, config: ModelConfig) -> Tensor:
    """One projection ordered by key/value head from three."""
    size, kv_heads = config.head_size, config.kv_heads
    if len(query) != config.heads * size or len(key) != kv_heads * size or len(value) != kv_heads * size:
        raise UserError(
            f"projections of {len(query)}, {len(key)} and {len(value)} rows do not fit {config.heads} query and "
            f"{kv_heads} key/value heads of {size}: the weights and the config are of different models"
        )
    parts = (
        _neighbours(query, size).reshape(kv_heads, config.group * size, *query.shape[1:]),
        _neighbours(key, size).reshape(kv_heads, size, *key.shape[1:]),
        value.reshape(kv_heads, size, *value.shape[1:]),
    )
    return torch.cat(parts, dim=1).flatten(0, 1)


def _split(fused: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of `_fuse`."""
    size = config.head_size
    query, key, value = fused.unflatten(0, (config.kv_heads, -1)).split((config.group * size, size, size), dim=1)
    return _halves(query.flatten(0, 1), size), _halves(key.flatten(0, 1), size), value.flatten(0, 1)


def _neighbours(rows: Tensor, size: int) -> Tensor:
    """Features i and i + size/2 of each head become neighbours 2i and 2i + 1."""
    paired: Tensor = rows.unflatten(0, (-1, 2, size // 2)).transpose(1, 2)
    return paired.flatten(0, 2)


def _halves(rows: Tensor, size: int) -> Tensor:
    """The inverse of `_neighbours`."""
    halved: Tensor = rows.unflatten(0, (-1, size // 2, 2)).transpose(1, 2)
    return halved.flatten(0, 2)


def _shards(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Files of at most SHARD_BYTES (or one tensor), named as transformers names them."""
    groups: list[dict[str, Tensor]] = [{}]
    for name, tensor in tensors.items():
        if groups[-1] and sum(held.nbytes for held in groups[-1].values()) + tensor.nbytes > SHARD_BYTES:
            groups.append({})
        groups[-1][name] = tensor
    if len(groups) == 1:
        return {WEIGHTS_NAME: groups[0]}
    return {f"model-{part:05d}-of-{len(groups):05d}.safetensors": group for part, group in enumerate(groups, start=1)}


def _write_json(file: Path, value: object) -> None:
    temporary = file.with_name(f"{file.name}.partial")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    temporary.replace(file)
