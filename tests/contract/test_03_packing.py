"""Contract 3: no attention across packed documents; positions restart with each."""

import pytest
import torch

from upweight.core.batches import PADDING
from upweight.core.packing import branches, lay
from upweight.model.config import ModelConfig
from upweight.model.rope import RopeTable
from upweight.model.transformer import make_model

LENGTHS = ((70, 1, 59, 120), (130, 64), (250,))
TIME = 256


def packed() -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor, torch.Tensor]:
    """The documents alone, and rows of tokens, positions and segments that hold them, with padding at the end."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.zeros(len(LENGTHS), TIME, dtype=torch.int64)
    positions = torch.zeros_like(tokens)
    segments = torch.full_like(tokens, PADDING)
    documents = []
    for row, lengths in enumerate(LENGTHS):
        at = 0
        for length in lengths:
            document = torch.randint(0, 97, (1, length), generator=generator)
            place = slice(at, at + length)
            tokens[row, place], positions[row, place], segments[row, place] = (
                document,
                torch.arange(length),
                len(documents),
            )
            documents.append(document)
            at += length
    return documents, tokens, positions, segments


@pytest.mark.parametrize("given_positions", [True, False])
def test_a_document_is_read_in_a_pack_as_it_is_alone(given_positions: bool) -> None:
    model = make_model(ModelConfig(vocab_size=97, width=32, layers=3, heads=4, kv_heads=2, ffn=64), 0)
    documents, tokens, positions, segments = packed()
    hidden = model(tokens, positions if given_positions else None, segments)
    for number, document in enumerate(documents):
        torch.testing.assert_close(hidden[segments == number], model(document)[0], rtol=1e-4, atol=1e-5)


def test_no_gradient_flows_between_documents() -> None:
    model = make_model(ModelConfig(vocab_size=97, width=32, layers=3, heads=4, kv_heads=2, ffn=64), 0)
    _, tokens, positions, segments = packed()
    read: list[torch.Tensor] = []
    model.embedding.register_forward_hook(lambda module, inputs, output: read.append(output))
    hidden = model(tokens, positions, segments)
    (gradient,) = torch.autograd.grad(hidden[segments == 2].square().sum(), read[0])
    touched = gradient.abs().sum(-1) > 0
    assert touched[segments == 2].all()
    assert not touched[segments != 2].any()


def test_positions_restart_with_each_document(monkeypatch: pytest.MonkeyPatch) -> None:
    # rotary attention depends on differences of positions alone, so outputs do not show where counting began
    model = make_model(ModelConfig(vocab_size=97, width=32, layers=1, heads=4, kv_heads=2, ffn=64), 0)
    _, tokens, positions, segments = packed()
    seen: list[torch.Tensor] = []
    rotations = RopeTable.rotations

    def remember(self: RopeTable, positions: torch.Tensor, longest: int) -> torch.Tensor:
        seen.append(positions)
        return rotations(self, positions, longest)

    monkeypatch.setattr(RopeTable, "rotations", remember)
    model(tokens, None, segments)
    assert torch.equal(seen[0][segments != PADDING], positions[segments != PADDING])


def test_continuations_share_a_prompt_and_do_not_see_each_other() -> None:
    model = make_model(ModelConfig(vocab_size=97, width=32, layers=3, heads=4, kv_heads=2, ffn=64), 0)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, 97, (length,), generator=generator).tolist() for length in (70, 2)]
    answers = [torch.randint(0, 97, (length,), generator=generator).tolist() for length in (5, 80, 1, 30, 66)]
    groups = [branches(prompts[0], [(answer, [1.0] * len(answer)) for answer in answers[:3]])]
    groups += [branches(prompts[1], [(answer, [1.0] * len(answer)) for answer in answers[3:]])]
    follows = {1: 0, 2: 0, 3: 0, 5: 4, 6: 4}
    batch = lay([*groups[0], *groups[1]], [range(7)], follows=follows)
    hidden = model(batch.tokens, batch.positions, batch.segments, prefixes=batch.prefixes)
    for segment, (prompt, answer) in zip(
        (1, 2, 3, 5, 6), zip([prompts[0]] * 3 + [prompts[1]] * 2, answers, strict=True), strict=True
    ):
        alone = model(torch.tensor([prompt + answer]))[0, len(prompt) - 1 :]
        torch.testing.assert_close(hidden[batch.segments == segment], alone, rtol=1e-4, atol=1e-5)
        assert batch.positions[batch.segments == segment].tolist() == list(
            range(len(prompt) - 1, len(prompt) + len(answer))
        )
        assert batch.targets[batch.segments == segment][:-1].tolist() == answer
    read: list[torch.Tensor] = []
    model.embedding.register_forward_hook(lambda module, inputs, output: read.append(output))
    hidden = model(batch.tokens, batch.positions, batch.segments, prefixes=batch.prefixes)
    (gradient,) = torch.autograd.grad(hidden[batch.segments == 2].square().sum(), read[0])
    touched = gradient.abs().sum(-1) > 0
    assert touched[(batch.segments == 0) | (batch.segments == 2)].all()
    assert not touched[(batch.segments != 0) & (batch.segments != 2)].any()
