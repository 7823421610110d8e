"""teach and distill: a teacher on disk or behind an endpoint against the live one, other tokenizers, refusals."""

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from small_models import work

from upweight.core.errors import UserError
from upweight.core.records import Completion, Message, Pair, Problem
from upweight.core.work import Silent
from upweight.model import weights
from upweight.model.precision import multiplied_in
from upweight.model.transformer import ModelConfig, Transformer, make_model
from upweight.objectives.dpd import Dpd, EncodedPair, TeacherError, pair_batch
from upweight.stages import collect, distill, teach
from upweight.store.jsonl import write_jsonl
from upweight.store.signal import Signal
from upweight.synthesize.encoded import encode_pair, referenced
from upweight.synthesize.roles import Endpoint
from upweight.text.chat import CHATML
from upweight.text.tokenizer import Tokenizer
from upweight.train.optimizer import OptimizerConfig

WORDS = ["what is 12 + 30? it is 42. sure, the tool says so; high medium\n"] * 20
OTHER_WORDS = ["so the sum is 42, is it not? what a tool: it says medium high sure\n"] * 20


def checkpoint(directory: Path, seed: int, *, words: list[str] = WORDS, width: int = 16, padding: int = 0) -> Path:
    tokenizer = Tokenizer.train(words, 290).with_template(CHATML)
    shape = ModelConfig(
        vocab_size=tokenizer.vocab_size + padding, width=width, layers=1, heads=2, kv_heads=1, ffn=24, max_context=128
    )
    model = make_model(shape, seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    weights.save(model, directory / "model")
    tokenizer.save(directory / "model")
    return directory


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    folder = tmp_path / "pairs"
    folder.mkdir()
    texts = [("it is 42.", "it is 30, sure."), ("sure, 42", "medium"), ("the tool says so", "so the tool says 12")]
    write_jsonl(
        folder / "pairs.jsonl",
        [
            Pair(
                Problem(f"p{number}", (Message("user", f"what is {number} + 30?"),)),
                Completion((), (), good, "end", "given"),
                Completion((), (), bad, "end", "given"),
            )
            for number, (good, bad) in enumerate(texts)
        ],
    )
    return folder


@pytest.fixture
def student(tmp_path: Path) -> Path:
    return checkpoint(tmp_path / "student", 0)


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    return checkpoint(tmp_path / "teacher", 5, width=24)


def distilled(tmp_path: Path, name: str, inputs: dict[str, Path], **changes: Any) -> dict[str, Any]:
    config = distill.Config(
        epochs=2, pairs_a_step=3, learning_rate=1e-3, optimizer=OptimizerConfig(kind="adamw"), **changes
    )
    return dict(distill.run(config, work(tmp_path / name, inputs)))


def test_a_stored_teacher_teaches_what_the_live_one_does(
    tmp_path: Path, pairs: Path, student: Path, teacher: Path
) -> None:
    inputs = {"model": student, "teacher": teacher, "pairs": pairs}
    stored = work(tmp_path / "signal", inputs)
    told = teach.run(teach.Config(kept=200, block=2), stored)
    assert (told["pairs"], told["responses"], told["taught_share"]) == (3, 6, 1.0)
    # 200 of 290 tokens: what is left out is little, and is said
    assert 0 < told["tail_mean"] < 0.3
    error = told["truncation"]
    assert error["mean_error"] <= error["mean_divergence"] - error["mean_stored_divergence"] + 1e-3
    assert 0 < error["mean_stored_divergence"] < error["mean_divergence"]
    live = distilled(tmp_path, "live", inputs)
    cached = distilled(tmp_path, "cached", {"model": student, "pairs": pairs, "signal": stored.out})
    assert (live["teacher"], cached["teacher"]) == ("live", "stored")
    bound = error["largest_error"] + 1e-4
    for name in ("positive", "negative"):
        assert abs(live["first"][name] - cached["first"][name]) < bound
        assert live["first"][name] != cached["first"][name]  # the sparse one is no full one, and says so:
    assert abs(live["first"]["dpo"] - cached["first"]["dpo"]) < 1e-6
    assert cached["first"]["teacher_tail"] == pytest.approx(told["tail_mean"], rel=0.5)
    # almost all tokens kept: the same loss up to float16
    whole = work(tmp_path / "whole", inputs)
    assert teach.run(teach.Config(kept=289), whole)["truncation"]["largest_error"] < 2e-3
    close = distilled(tmp_path, "close", {"model": student, "pairs": pairs, "signal": whole.out})
    assert close["first"]["positive"] == pytest.approx(live["first"]["positive"], abs=2e-3)


def test_the_reference_is_taken_in_the_precision_of_the_policy(
    tmp_path: Path, pairs: Path, student: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(ModelConfig(vocab_size=300, width=64, layers=2, heads=4, kv_heads=2, ffn=96), 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    draw = Random(0)
    tokens = [tuple(draw.randrange(300) for _ in range(length)) for length in (9, 60, 60) * 4]
    encoded = [EncodedPair(*tokens[start : start + 3]) for start in range(0, len(tokens), 3)]

    def margins(reference: str) -> list[float]:
        """Before a step is taken the policy is the reference, and what margin there is, is rounding."""
        told = referenced(model, encoded, dtype=reference)
        with multiplied_in("bfloat16", "cpu"), torch.no_grad():
            terms = [Dpd(positive=0.0, negative=0.0)(model, pair_batch([pair], 256)).terms["margin"] for pair in told]
        return [abs(float(term.total)) for term in terms]

    # a pair of 120 tokens, measured: up to 1.4 nats against a reference in float32, 0.0679 against one in bfloat16
    assert max(margins("float32")) > 0.2 > 2 * max(margins("bfloat16"))

    asked: list[object] = []

    def noted(*arguments: Any, **options: Any) -> Any:
        asked.append(options.get("dtype"))
        return referenced(*arguments, **options)

    monkeypatch.setattr(distill, "referenced", noted)
    distilled(tmp_path, "dpd", {"model": student, "teacher": teacher, "pairs": pairs}, dtype="bfloat16")
    assert asked == ["bfloat16", "bfloat16"]  # of the student, and of the teacher to compare it with


def test_a_killed_teach_keeps_its_whole_parts(tmp_path: Path, pairs: Path, student: Path, teacher: Path) -> None:
    stored = work(tmp_path / "signal", {"model": student, "teacher": teacher, "pairs": pairs})
    told = teach.run(teach.Config(kept=8, block=2), stored)
    first, second = sorted((stored.out / "signal").iterdir())
    kept = (first / "tokens.bin").stat().st_mtime_ns
    (second / "meta.json").unlink()  # as a kill leaves it
    assert teach.run(teach.Config(kept=8, block=2), stored) == told
    assert (first / "tokens.bin").stat().st_mtime_ns == kept
    (first / "logprobs.bin").write_bytes(b"short")
    with pytest.raises(UserError, match="is damaged, run teach again"):
        Signal.open(stored.out / "signal")


def test_what_was_stored_for_others_is_refused(tmp_path: Path, pairs: Path, student: Path, teacher: Path) -> None:
    stored = work(tmp_path / "signal", {"model": student, "teacher": teacher, "pairs": pairs})
    teach.run(teach.Config(kept=8), stored)
    inputs = {"model": student, "pairs": pairs, "signal": stored.out}
    with pytest.raises(UserError, match=r"stored at temperature 1.* asked for at 2"):
        distilled(tmp_path, "warm", inputs, temperature=2.0)
    other = tmp_path / "other"
    other.mkdir()
    pair = Pair(
        Problem("q", (Message("user", "sure?"),)),
        Completion((), (), "so", "end", ""),
        Completion((), (), "no", "end", ""),
    )
    write_jsonl(other / "pairs.jsonl", [pair])
    with pytest.raises(UserError, match="says nothing of a response"):
        distilled(tmp_path, "others", {**inputs, "pairs": other})
    write_jsonl(other / "pairs.jsonl", [Pair(pair.problem, pair.chosen, pair.chosen)])
    with pytest.raises(UserError, match="problem q: both responses of a pair are the same"):
        distilled(tmp_path, "same", {**inputs, "pairs": other})


def test_a_teacher_of_another_tokenizer_is_refused_or_aligned(tmp_path: Path, pairs: Path, student: Path) -> None:
    foreign = checkpoint(tmp_path / "foreign", 3, words=OTHER_WORDS, width=24)
    inputs = {"model": student, "teacher": foreign, "pairs": pairs}
    with pytest.raises(UserError, match=r"different tokenizers.*alignment='spans'"):
        distilled(tmp_path, "refused", inputs)
    with pytest.raises(UserError, match=r"another tokenizer than the student.*alignment='spans'"):
        teach.run(teach.Config(kept=8), work(tmp_path / "refused", inputs))
    stored = work(tmp_path / "aligned", inputs)
    told = teach.run(teach.Config(kept=8, alignment="spans"), stored)
    assert 0.2 < told["taught_share"] < 1
    summary = distilled(tmp_path, "dpd", {"model": student, "pairs": pairs, "signal": stored.out})
    assert summary["first"]["positive"] > 0
    assert summary["first"]["taught"] == pytest.approx(told["taught_share"], abs=1e-4)
    # DPO alone asks for no teacher, whatever its tokenizer
    assert distilled(tmp_path, "dpo", inputs, positive=0.0, negative=0.0)["teacher"] == "none"


def test_an_aligned_teacher_of_the_same_tokens_says_what_the_plain_one_says(
    tmp_path: Path, pairs: Path, student: Path, teacher: Path
) -> None:
    tokenizer = Tokenizer.load(student / "model")
    model = weights.load(teacher / "model")[0]
    config = teach.Config(kept=8)
    plain, aligned = teach._Local(config, model, tokenizer), teach._Aligned(config, model, tokenizer, tokenizer)
    pair = Pair(
        Problem("p", (Message("user", "what is 12?"),)),
        Completion((), (), "it is 42, sure", "end", ""),
        Completion((), (), "so", "end", ""),
    )
    questions = teach._questions(tokenizer, pair)
    for one, other in zip(plain.along(questions), aligned.along(questions), strict=True):
        assert other.places == list(range(len(one.tokens)))
        for place in other.places:
            whole = dict(zip(one.tokens[place].tolist(), one.logprobs[place].tolist(), strict=True))
            found = dict(zip(other.tokens[place].tolist(), other.logprobs[place].tolist(), strict=True))
            # control tokens but for the end of a turn are left out: their texts are no text of the other side
            assert set(whole) - set(found) <= set(tokenizer.control_tokens.values()) - {tokenizer.end_of_turn}
            for token in set(whole) & set(found):
                assert found[token] == pytest.approx(whole[token], abs=1e-5)


def test_embeddings_padded_to_another_size_are_no_other_vocabulary(tmp_path: Path, pairs: Path, student: Path) -> None:
    wide = checkpoint(tmp_path / "wide", 5, width=24, padding=30)
    inputs = {"model": student, "teacher": wide, "pairs": pairs}
    assert distilled(tmp_path, "dpd", inputs)["first"]["positive"] > 0


class _Listening(Silent):
    """Keeps what is said."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def say(self, line: str) -> None:
        self.said.append(line)


def test_a_teacher_who_knows_the_positives_less_well_is_said_aloud(
    tmp_path: Path, pairs: Path, student: Path, teacher: Path
) -> None:
    ran = {}
    for name, learns, teaches in (("forth", student, teacher), ("back", teacher, student)):
        for terms, sequence in (("all", 1.0), ("no_dpo", 0.0)):
            inputs, heard = {"model": learns, "teacher": teaches, "pairs": pairs}, _Listening()
            config = distill.Config(sequence=sequence, learning_rate=1e-3, optimizer=OptimizerConfig(kind="adamw"))
            told = distill.run(config, replace(work(tmp_path / name / terms, inputs), monitor=heard))
            ran[name, terms] = told["positives_likely"], heard.said
    likely, said = ran["forth", "all"]
    assert likely["teacher"] != likely["student"]
    assert ran["forth", "no_dpo"] == (likely, said)
    turned, also_said = ran["back", "all"]
    assert turned == {"student": likely["teacher"], "teacher": likely["student"]}
    worse = said if likely["teacher"] < likely["student"] else also_said
    assert len(said) + len(also_said) == 1
    assert "makes the student worse" in worse[0]


class _Vllm(BaseHTTPRequestHandler):
    """Answers prompt_logprobs as vLLM does, from a model of ours."""

    model: Transformer
    tokenizer: Tokenizer
    shift = 0

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        tokens, kept = asked["prompt"], asked["prompt_logprobs"]
        with torch.no_grad():
            row = torch.tensor([tokens])
            logprobs = self.model.logits(self.model(row))[0].log_softmax(-1)
        places: list[Any] = [None]
        for place, number in enumerate(tokens[1:]):
            top = logprobs[place].topk(kept)
            known = dict(zip(top.indices.tolist(), top.values.tolist(), strict=True))
            known.setdefault(number, float(logprobs[place, number]))
            places.append(
                {
                    str(token): {"logprob": value, "decoded_token": self.tokenizer.decode([token + self.shift])}
                    for token, value in known.items()
                }
            )
        body = json.dumps({"choices": [{"text": "", "prompt_logprobs": places}]}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        return


@pytest.fixture
def endpoint(teacher: Path) -> Iterator[str]:
    _Vllm.model, _Vllm.tokenizer = weights.load(teacher / "model")[0], Tokenizer.load(teacher / "model")
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Vllm)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()


def test_an_endpoint_s_prompt_logprobs_teach_as_the_checkpoint_does(
    tmp_path: Path, pairs: Path, student: Path, teacher: Path, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    near = work(tmp_path / "near", {"model": student, "teacher": teacher, "pairs": pairs})
    far = work(tmp_path / "far", {"model": student, "pairs": pairs})
    teach.run(teach.Config(kept=12), near)
    told = teach.run(teach.Config(Endpoint(endpoint, "teacher"), kept=12), far)
    assert "not measured" in told["truncation"]
    tokenizer = Tokenizer.load(student / "model")
    records = [json.loads(line) for line in (pairs / "pairs.jsonl").read_text().splitlines()]
    assert len(records) == 3
    batches = []
    for made in (near, far):
        signal = Signal.open(made.out / "signal")
        pair = Pair(
            Problem("p0", (Message("user", "what is 0 + 30?"),)),
            Completion((), (), "it is 42.", "end", "given"),
            Completion((), (), "it is 30, sure.", "end", "given"),
        )
        batches.append(pair_batch([encode_pair(tokenizer, pair)], 64, signal))
    model = weights.load(student / "model")[0]
    losses = [float(Dpd(sequence=0.0)(model, batch).total) for batch in batches]
    assert losses[0] == pytest.approx(losses[1], abs=2e-3)
    with pytest.raises(UserError, match="at temperature 1"):
        teach.Config(Endpoint(endpoint, "teacher"), temperature=2.0)
    monkeypatch.setattr(_Vllm, "shift", 1)
    with pytest.raises(TeacherError, match="different tokenizers"):
        teach.run(teach.Config(Endpoint(endpoint, "teacher"), kept=12), work(tmp_path / "w", far.inputs))


def test_a_teacher_with_broken_weights_is_named(tmp_path: Path, pairs: Path, student: Path, teacher: Path) -> None:
    model = weights.load(teacher / "model")[0]
    with torch.no_grad():
        model.norm.weight[0] = float("nan")
    weights.save(model, teacher / "model")
    with pytest.raises(UserError, match="NaN"):
        teach.run(teach.Config(kept=8), work(tmp_path / "w", {"model": student, "teacher": teacher, "pairs": pairs}))


def test_pairs_of_one_s_own_are_collected(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    asked = {"role": "user", "content": "what?"}
    good, bad = {"role": "assistant", "content": "so"}, {"role": "assistant", "content": "no"}
    rows: list[dict[str, Any]] = [
        {"prompt": "what?", "chosen": "so", "rejected": "no"},
        {"prompt": [asked], "chosen": [good], "rejected": [bad]},
        {"chosen": [asked, good], "rejected": [asked, bad]},
    ]
    write_jsonl(file, rows)
    made = work(tmp_path / "pairs", {})
    assert collect.run(collect.Config(pairs=str(file)), made)["pairs"] == 3
    written = [json.loads(line) for line in (made.out / "pairs.jsonl").read_text().splitlines()]
    assert written[0] == written[1] == written[2]
    for row, message in [
        ({"prompt": "what?", "chosen": "so"}, "no rejected"),
        ({"prompt": "what?", "chosen": "so", "rejected": "so"}, "both responses are the same"),
        ({"prompt": "what?", "chosen": " ", "rejected": "so"}, "its chosen response is empty"),
        ({"chosen": [asked, good], "rejected": [bad, bad]}, "two answers to different questions"),
    ]:
        write_jsonl(file, [rows[0], row])
        with pytest.raises(UserError, match=rf"mine.jsonl, pair 2.*{message}"):
            collect.run(collect.Config(pairs=str(file)), made)
