"""Pairs as a student reads them: prompt and responses as tokens, and what the reference thinks of the responses."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from upweight.core.errors import UserError
from upweight.core.records import Pair
from upweight.core.work import Monitor, Silent
from upweight.model.language_model import LanguageModel
from upweight.model.logprobs import token_logprobs
from upweight.model.precision import multiplied_in
from upweight.objectives.dpd import EncodedPair, pair_batch
from upweight.text.chat import render, reply_tokens
from upweight.text.tokenizer import Tokenizer


def encode_pair(tokenizer: Tokenizer, pair: Pair) -> EncodedPair:
    """The pair as tokens, of its text where the records hold none.

    Raises UserError, naming the problem, where a response is empty and where both are the same.
    """
    prompt = render(tokenizer, pair.problem.messages)
    chosen, rejected = (tuple(reply_tokens(tokenizer, prompt, member)) for member in (pair.chosen, pair.rejected))
    for name, member, tokens in (("chosen", pair.chosen, chosen), ("rejected", pair.rejected, rejected)):
        if not member.tokens and not member.text.strip():
            raise UserError(f"problem {pair.problem.id}: the {name} response of a pair is empty: drop the pair")
        if max(tokens, default=0) >= tokenizer.vocab_size:
            raise UserError(
                f"problem {pair.problem.id}: the {name} response holds token {max(tokens)}, the tokenizer has "
                f"{tokenizer.vocab_size:,}: the pair was sampled with another tokenizer; remove its tokens, so that "
                "its text is read"
            )
    try:
        return EncodedPair(tuple(prompt), chosen, rejected)
    except UserError as error:
        raise UserError(f"problem {pair.problem.id}: {error}") from None


def referenced(
    model: LanguageModel,
    pairs: Sequence[EncodedPair],
    *,
    row_tokens: int = 2048,
    pairs_a_batch: int = 8,
    dtype: str = "float32",
    monitor: Monitor | None = None,
) -> list[EncodedPair]:
    """The pairs with the log-probabilities of their responses under `model` as it is now: it becomes the reference.

    Args:
        dtype: of the matrix products: the one that the policy is trained in, or else the two differ before a step is
            taken, by what rounding adds up to over a response.
    """
    done: list[EncodedPair] = []
    device = next(model.parameters()).device
    with (
        (monitor or Silent()).track("reference", total=len(pairs), unit="pairs") as bar,
        torch.no_grad(),
        multiplied_in(dtype, device),
    ):
        for start in range(0, len(pairs), pairs_a_batch):
            part = pairs[start : start + pairs_a_batch]
            batch = pair_batch(part, row_tokens).to(device)
            sequences = batch.sequences
            response = sequences.weights > 0
            hidden = sequences.read_by(model)[response]
            logprobs = token_logprobs(hidden, model.unembedding, sequences.targets[response])
            sums = logprobs.new_zeros(len(batch.reference)).index_add(0, sequences.segments[response], logprobs)
            done += [
                replace(pair, reference_chosen=one, reference_rejected=other)
                for pair, one, other in zip(
                    part, sums[batch.chosen].tolist(), sums[batch.rejected].tolist(), strict=True
                )
            ]
            bar.advance(len(part))
    return done
