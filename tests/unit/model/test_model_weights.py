"""Model directories: what is written, what is read, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from upweight.core.errors import UserError
from upweight.model import weights
from upweight.model.config import ModelConfig
from upweight.model.heads import ScalarHead
from upweight.model.hub_config import from_hub_config, to_hub_config
from upweight.model.rope import RopeScaling
from upweight.model.transformer import Transformer, make_model

SHAPE = ModelConfig(vocab_size=29, width=16, layers=2, heads=4, kv_heads=2, ffn=24, max_context=64)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    weights.save(make_model(SHAPE, 0), tmp_path)
    return tmp_path


def edit_config(directory: Path, **changes: object) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_weights(directory: Path, **changes: torch.Tensor | None) -> None:
    file = directory / "model.safetensors"
    tensors = load_file(file) | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file)


@pytest.mark.parametrize(
    "shape",
    [
        SHAPE,
        ModelConfig(vocab_size=29, width=16, layers=1, heads=4, kv_heads=1, ffn=24, tied=False, head_size=6),
        ModelConfig(vocab_size=29, width=16, layers=1, heads=4, kv_heads=4, ffn=24, qkv_bias=True),
        ModelConfig(vocab_size=29, width=16, layers=1, heads=4, kv_heads=2, ffn=24, qk_norm=True, rope_base=5e5),
        ModelConfig(
            vocab_size=29, width=16, layers=1, heads=2, kv_heads=2, ffn=24, rope_scaling=RopeScaling("llama3", 8.0)
        ),
    ],
)
def test_a_model_comes_back_bit_for_bit(tmp_path: Path, shape: ModelConfig) -> None:
    model = make_model(shape, 3)
    for parameter in model.parameters():  # norms and biases too must not be all alike
        parameter.data.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    weights.save(model, tmp_path)
    loaded, config = weights.load(tmp_path)
    assert config == shape
    assert loaded.config == shape
    assert weights.fingerprint(loaded) == weights.fingerprint(model)


def test_the_fingerprint_tells_models_apart() -> None:
    one, other = make_model(SHAPE, 0), make_model(SHAPE, 0)
    assert weights.fingerprint(one) == weights.fingerprint(other)
    assert len(weights.fingerprint(one)) == 16
    with torch.no_grad():
        other.layers[1].down.weight[0, 0] += 1e-6  # type: ignore[union-attr, index]
    assert weights.fingerprint(one) != weights.fingerprint(other)


def test_shards_are_written_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "SHARD_BYTES", 4000)
    model = make_model(SHAPE, 0)
    weights.save(model, tmp_path)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert weights.fingerprint(weights.load(tmp_path)[0]) == weights.fingerprint(model)
    (tmp_path / files[1]).unlink()
    with pytest.raises(UserError, match=f"{files[1]} is missing"):
        weights.load(tmp_path)


def test_another_dtype_is_stored_and_read(tmp_path: Path) -> None:
    weights.save(make_model(SHAPE, 0), tmp_path, dtype=torch.bfloat16)
    assert all(tensor.dtype == torch.bfloat16 for tensor in load_file(tmp_path / "model.safetensors").values())
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert weights.load(tmp_path)[0].embedding.weight.dtype == torch.float32
    assert weights.load(tmp_path, dtype=torch.bfloat16)[0].embedding.weight.dtype == torch.bfloat16


def test_a_truncated_file_is_refused(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(UserError, match="cut off or damaged"):
        weights.load(directory)


def test_a_missing_tensor_is_named(directory: Path) -> None:
    edit_weights(directory, **{"model.layers.1.mlp.up_proj.weight": None})
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        weights.load(directory)


def test_a_misshaped_tensor_is_named(directory: Path) -> None:
    edit_weights(directory, **{"model.layers.1.mlp.down_proj.weight": torch.zeros(16, 23)})
    with pytest.raises(UserError, match=r"layers\.1\.down\.weight.*\(16, 23\).*\(16, 24\)"):
        weights.load(directory)


def test_a_config_of_another_model_is_refused(directory: Path) -> None:
    edit_config(directory, num_attention_heads=8)
    with pytest.raises(UserError, match="different models"):
        weights.load(directory)


def test_a_tensor_without_a_place_is_refused(directory: Path) -> None:
    edit_weights(directory, **{"model.layers.0.self_attn.q_proj.bias": torch.zeros(16)})
    with pytest.raises(UserError, match=r"no place for.*q_proj\.bias"):
        weights.load(directory)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel; supported: LlamaForCausalLM, Qwen2ForCausalLM"),
        ({"architectures": None}, "architecture none"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
        ({"attention_bias": True}, "biases of the attention"),
        ({"hidden_act": "gelu"}, "activation gelu"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 32}, "sliding-window attention over 32"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "longrope"),
        ({"partial_rotary_factor": 0.5}, "part of each head"),
    ],
)
def test_what_is_not_understood_is_refused(directory: Path, changes: dict[str, object], message: str) -> None:
    edit_config(directory, **changes)
    with pytest.raises(UserError, match=message):
        weights.load(directory)


@pytest.mark.parametrize("config", ["[]", '{"architectures": "LlamaForCausalLM"}'])
def test_what_is_no_config_is_refused(directory: Path, config: str) -> None:
    (directory / "config.json").write_text(config)
    with pytest.raises(UserError, match=r"config\.json is no model's config"):
        weights.load(directory)


def test_a_field_of_the_wrong_kind_is_refused(directory: Path) -> None:
    edit_config(directory, num_attention_heads="four")
    with pytest.raises(UserError, match=r"a field of the wrong kind .*'four'"):
        weights.load(directory)


def test_whole_numbers_are_no_weights(directory: Path) -> None:
    edit_weights(directory, **{"model.norm.weight": torch.ones(16, dtype=torch.int32)})
    with pytest.raises(UserError, match=r"norm\.weight are stored as int32"):
        weights.load(directory)


def test_a_damaged_index_is_refused(directory: Path) -> None:
    (directory / "model.safetensors.index.json").write_text('{"weight_map": ["model.safetensors"]}')
    with pytest.raises(UserError, match=r"index\.json is damaged"):
        weights.load(directory)


def test_a_missing_field_is_named(directory: Path) -> None:
    file = directory / "config.json"
    fields = json.loads(file.read_text())
    del fields["intermediate_size"]
    file.write_text(json.dumps(fields))
    with pytest.raises(UserError, match="intermediate_size"):
        weights.load(directory)


def test_no_directory_and_no_config(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a directory nor a name on the hub"):
        weights.load(tmp_path / "absent" / "model")
    with pytest.raises(UserError, match=r"config\.json is not readable"):
        weights.load(tmp_path)


def test_the_rope_of_earlier_versions_is_read() -> None:
    # transformers 4 wrote rope_theta and rope_scaling beside each other
    fields = to_hub_config(SHAPE, torch.float32)
    del fields["rope_parameters"]
    fields |= {
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    }
    config = from_hub_config(fields, where="config.json")
    assert config.rope_base == 500000.0
    assert config.rope_scaling == RopeScaling("llama3", 32.0, original_context=8192)


def test_nanbeige4_is_a_llama_that_is_read() -> None:
    fields = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 2560,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "intermediate_size": 10_496,
        "vocab_size": 166_144,
        "max_position_embeddings": 65_536,
        "rope_theta": 70_000_000,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
    config = from_hub_config(fields, where="config.json")
    # 2 166,144 2560 for both embeddings; a layer: 2560 128 (20 + 8 + 20) + 3 2560 10,496 + 2 2560; the last norm
    layer = 2560 * 128 * 48 + 3 * 2560 * 10_496 + 2 * 2560
    assert config.parameter_count() == 2 * 166_144 * 2560 + 32 * layer + 2560 == 3_933_637_120
    assert (config.head_size, config.rope_base, config.tied) == (128, 7e7, False)


def test_biases_and_norms_together_have_no_name() -> None:
    shape = ModelConfig(vocab_size=29, width=16, layers=1, heads=2, kv_heads=2, ffn=24, qkv_bias=True, qk_norm=True)
    with pytest.raises(UserError, match="drop one"):
        to_hub_config(shape, torch.float32)


def test_a_reward_model_reads_the_last_token_of_each_sequence(tmp_path: Path) -> None:
    body: Transformer = make_model(SHAPE, 0)
    model = ScalarHead(body)
    torch.nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(0))
    first, second, third = (
        torch.randint(0, 29, (1, length), generator=torch.Generator().manual_seed(length)) for length in (5, 3, 6)
    )
    alone = torch.cat([model(part) for part in (first, second, third)])
    # two rows: sequences 0 and 2 of 5 and 3 tokens, then sequence 1 of 6 and two places of padding
    rows = torch.cat([torch.cat([first, second], 1), torch.cat([third, torch.zeros(1, 2, dtype=torch.int64)], 1)])
    segments = torch.tensor([[0] * 5 + [2] * 3, [1] * 6 + [-1] * 2])
    torch.testing.assert_close(model(rows, None, segments), alone[[0, 2, 1]])
    model.save(tmp_path)
    torch.testing.assert_close(ScalarHead.load(tmp_path)(rows, None, segments), alone[[0, 2, 1]])
    (tmp_path / "scalar_head.safetensors").unlink()
    with pytest.raises(UserError, match="no reward model"):
        ScalarHead.load(tmp_path)
