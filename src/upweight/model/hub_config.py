"""config.json of Hugging Face, in and out.

What is not understood is refused: a field that is passed over gives wrong logits.
"""

from collections.abc import Mapping
from typing import Any

import torch

from upweight.core.errors import UserError
from upweight.model.config import ModelConfig
from upweight.model.rope import RopeScaling


class UnsupportedModel(UserError):
    """A complete config.json of an architecture, or of a variant of one, that model/transformer.py does not compute."""


OTHERS = (
    "Other causal language models of transformers are opened by upweight.model.language_model.load, which is slower"
)

SUPPORTED = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "MistralForCausalLM")


def from_hub_config(fields: Mapping[str, Any], *, where: str) -> ModelConfig:
    """The config that `fields` (a parsed config.json) describes; UserError names what is not supported."""
    architectures = fields.get("architectures") or []
    if not isinstance(architectures, list):
        raise UserError(f"{where} is no model's config: its architectures are {architectures!r}, not a list")
    known = [name for name in architectures if name in SUPPORTED]
    if not known:
        raise UnsupportedModel(
            f"{where} is of the architecture {', '.join(architectures) or 'none'}; supported: {', '.join(SUPPORTED)}. "
            f"{OTHERS}"
        )
    architecture = known[0]
    try:
        _refuse_unsupported(fields, architecture, where)
        heads = int(fields["num_attention_heads"])
        base, scaling = _rope(fields, where)
        return ModelConfig(
            vocab_size=int(fields["vocab_size"]),
            width=int(fields["hidden_size"]),
            layers=int(fields["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(fields.get("num_key_value_heads") or heads),
            ffn=int(fields["intermediate_size"]),
            head_size=int(fields.get("head_dim") or 0) or (128 if architecture == "Qwen3ForCausalLM" else 0),
            rope_base=base,
            max_context=int(fields.get("max_position_embeddings", 4096)),
            rope_scaling=scaling,
            norm_epsilon=float(fields.get("rms_norm_eps", 1e-6)),
            tied=bool(fields.get("tie_word_embeddings", False)),
            qkv_bias=architecture == "Qwen2ForCausalLM",
            qk_norm=architecture == "Qwen3ForCausalLM",
        )
    except KeyError as error:
        raise UserError(
            f"{where} lacks the field {error.args[0]}: it is no complete config of {architecture}"
        ) from error
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{where} has a field of the wrong kind ({error}): no config of {architecture}") from error


def to_hub_config(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The config.json under which transformers and vLLM open the weights of `config`."""
    if config.qkv_bias and config.qk_norm:
        raise UserError("no architecture of transformers has query/key/value biases and query/key norms: drop one")
    name = "Qwen2" if config.qkv_bias else "Qwen3" if config.qk_norm else "Llama"
    scaling = _scaling_fields(config.rope_scaling)
    return {
        "architectures": [f"{name}ForCausalLM"],
        "model_type": name.lower(),
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "intermediate_size": config.ffn,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_context,
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rope_base,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_theta": config.rope_base, **(scaling or {"rope_type": "default"})},
        "tie_word_embeddings": config.tied,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        # without these transformers takes tokens 1 and 2; the tokenizer's generation_config.json says where texts end
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def _refuse_unsupported(fields: Mapping[str, Any], architecture: str, where: str) -> None:
    window = fields.get("sliding_window")
    windowed = window is not None and (architecture == "MistralForCausalLM" or fields.get("use_sliding_window"))
    problems = {
        "quantized weights (quantization_config)": fields.get("quantization_config") is not None,
        f"sliding-window attention over {window}": windowed and window < fields.get("max_position_embeddings", 0),
        f"the activation {fields.get('hidden_act')}": fields.get("hidden_act", "silu") != "silu",
        "biases of the attention projections": bool(fields.get("attention_bias")),
        "biases of the feed-forward network": bool(fields.get("mlp_bias")),
    }
    found = [problem for problem, present in problems.items() if present]
    if found:
        raise UnsupportedModel(
            f"{where} ({architecture}) asks for {' and '.join(found)}, which is not supported here. {OTHERS}"
        )


def _rope(fields: Mapping[str, Any], where: str) -> tuple[float, RopeScaling | None]:
    """Base and scaling; transformers 5 writes both into rope_parameters, earlier versions into two fields."""
    settings = dict(fields.get("rope_scaling") or {}) | dict(fields.get("rope_parameters") or {})
    base = float(settings.get("rope_theta", fields.get("rope_theta", 10_000.0)))
    kind = settings.get("rope_type", settings.get("type", "default"))
    if float(settings.get("partial_rotary_factor", fields.get("partial_rotary_factor", 1.0))) != 1.0:
        raise UnsupportedModel(f"{where} rotates only a part of each head, which is not supported here. {OTHERS}")
    if kind == "default":
        return base, None
    if kind not in ("linear", "llama3", "yarn"):
        raise UnsupportedModel(f'{where} scales RoPE by "{kind}"; supported: linear, llama3, yarn. {OTHERS}')
    trained_at = settings.get("original_max_position_embeddings", fields.get("max_position_embeddings", 8192))
    attention_factor = settings.get("attention_factor")
    if any(settings.get(name) for name in ("mscale", "mscale_all_dim")) or settings.get("truncate") is False:
        raise UnsupportedModel(f"{where} asks for a variant of yarn (mscale, truncate) not supported here. {OTHERS}")
    scaling = RopeScaling(
        kind=kind,
        factor=float(settings["factor"]),
        original_context=int(trained_at),
        low_frequency=float(settings.get("low_freq_factor", 1.0)),
        high_frequency=float(settings.get("high_freq_factor", 4.0)),
        beta_fast=float(settings.get("beta_fast") or 32.0),
        beta_slow=float(settings.get("beta_slow") or 1.0),
        attention_factor=None if attention_factor is None else float(attention_factor),
    )
    return base, scaling


def _scaling_fields(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    fields: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind != "linear":
        fields["original_max_position_embeddings"] = scaling.original_context
    if scaling.kind == "llama3":
        fields |= {"low_freq_factor": scaling.low_frequency, "high_freq_factor": scaling.high_frequency}
    if scaling.kind == "yarn":
        fields |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
        if scaling.attention_factor is not None:
            fields["attention_factor"] = scaling.attention_factor
    return fields
