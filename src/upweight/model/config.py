"""The shape of a model of the Llama family, in plain values."""

from dataclasses import dataclass

from upweight.core.errors import UserError
from upweight.model.rope import RopeScaling

USUAL_ROPE_BASE = 10_000.0


def usual_width(parameters: float | int) -> float:
    """The width of a model of so many parameters, as models usually are: about twenty times as wide as they are deep,
    so that 12 x layers x width^2 is 0.6 x width^3. 118 for 1M, 607 for 135M, 2,370 for 8B."""
    return float((max(1.0, parameters) / 0.6) ** (1 / 3))


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder of the Llama family.

    Attributes:
        width: features of the residual stream.
        heads, kv_heads: query heads, and the key/value heads that they share in groups.
        ffn: inner width of the gated feed-forward network.
        head_size: features of a head; 0 takes width / heads.
        rope_base: base of the rotary frequencies (ABF raises it).
        max_context: the longest sequence in tokens that the checkpoint stands for.
        tied: whether the embedding is also the unembedding.
        qkv_bias: biases of the query, key and value projections (Qwen2).
        qk_norm: RMSNorm over each query and key head (Qwen3).
    """

    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    head_size: int = 0
    rope_base: float = USUAL_ROPE_BASE
    max_context: int = 4096
    rope_scaling: RopeScaling | None = None
    norm_epsilon: float = 1e-6
    tied: bool = True
    qkv_bias: bool = False
    qk_norm: bool = False

    def __post_init__(self) -> None:
        if self.head_size == 0:
            if self.width % self.heads:
                raise UserError(f"width {self.width} does not divide by {self.heads} heads: give head_size")
            object.__setattr__(self, "head_size", self.width // self.heads)
        if self.heads % self.kv_heads:
            raise UserError(f"{self.heads} query heads do not divide by {self.kv_heads} key/value heads")
        if self.head_size % 2:
            raise UserError(f"a head of {self.head_size} features has no pairs to rotate: make head_size even")
        for name in ("vocab_size", "width", "layers", "heads", "kv_heads", "ffn", "max_context"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: a model needs at least one")

    @property
    def group(self) -> int:
        """Query heads that share one key/value head."""
        return self.heads // self.kv_heads

    def parameter_count(self) -> int:
        """All parameters, the embedding counted once where it is tied."""
        slots = self.heads + 2 * self.kv_heads
        attention = self.width * self.head_size * (slots + self.heads)
        attention += self.head_size * (slots * self.qkv_bias + 2 * self.qk_norm)
        layer = attention + 3 * self.width * self.ffn + 2 * self.width
        return (2 - self.tied) * self.vocab_size * self.width + self.layers * layer + self.width

    def activation_bytes_per_token(self) -> float:
        """What training keeps of one token for the gradient, in float32: of each layer about 14 vectors of the model's
        width and three of the feed-forward's, and what goes into the first."""
        return 4.0 * (self.layers * (14 * self.width + 3 * self.ffn) + self.width)

    def held_values_per_token(self) -> int:
        """Keys and values that decoding keeps of one token."""
        return 2 * self.layers * self.kv_heads * self.head_size

    def flops_per_token(self, context: int) -> float:
        """Floating-point operations of reading one token forwards, causal attention over `context` tokens included.

        Training costs three times as much. Norms and other work that is linear in the width are left out.
        """
        slots = 2 * (self.heads + self.kv_heads)
        matrices = self.layers * self.width * (slots * self.head_size + 3 * self.ffn) + self.vocab_size * self.width
        return 2.0 * matrices + 2.0 * self.layers * self.heads * self.head_size * context
