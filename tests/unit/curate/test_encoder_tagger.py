import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.unit.curate.test_tagger import CODE, PROSE, SPAM, annotated
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from upweight.app.tagging import train_transformer
from upweight.core.errors import UserError
from upweight.core.work import Estimate, Machine, Silent, Work
from upweight.curate.encoder_tagger import EncoderTagger, ScoreHeads, expected, laid, open_tagger, token_ids
from upweight.curate.encoder_training import Tuning, fine_tuned, train_encoder
from upweight.curate.forest import Growth
from upweight.curate.tagger import Tagger
from upweight.curate.tagger_training import Training
from upweight.stages import tag

TRAINING = Training(forests=1, folds=3, growth=Growth(rounds=5, rate=0.5, leaves=4))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of 16 features, new, and a tokenizer of the words that the texts hold."""
    path = tmp_path_factory.mktemp("encoder")
    words = sorted(set(" ".join([PROSE, SPAM, CODE]).split()))
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", *words])}
    model = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    model.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=model, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(path)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(path)
    return path


def tuning(encoder: Path, save_every_steps: int = 50) -> Tuning:
    return Tuning(
        str(encoder),
        head_epochs=2,
        head_rate=0.01,
        documents_a_step=8,
        learning_rate=0.01,
        longest=32,
        save_every_steps=save_every_steps,
        training=TRAINING,
    )


@pytest.fixture(scope="module")
def trained(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "tagger"
    tagger = train_encoder(annotated(80), tuning(encoder), out, Machine(), Silent())
    assert tagger.figures["spearman"] > 0.9
    assert tagger.figures["encoder"] == str(encoder)
    assert tagger.figures["trained_on"] + tagger.figures["held_back"] == 80
    assert not list(out.parent.glob(".*"))
    with pytest.raises(UserError, match="is not empty"):
        train_encoder(annotated(80), tuning(encoder), out, Machine(), Silent())
    return out


def test_padding_and_order_change_nothing(encoder: Path) -> None:
    model = ScoreHeads(BertModel.from_pretrained(encoder)).eval()
    torch.nn.init.normal_(model.score.weight)
    rows = [[5, 6, 7], [8], [5, 6, 7, 9, 10, 11]]
    alone = torch.cat([model(laid([row])) for row in rows])
    assert alone.shape == (3, 20, 10)
    torch.testing.assert_close(model(laid(rows)), alone)
    shares = alone.softmax(-1).detach().numpy()
    np.testing.assert_allclose(expected(model, rows), shares @ np.arange(10), atol=1e-5)


def test_the_encoder_alone_learns_what_tells_texts_apart(trained: Path) -> None:
    tagger = EncoderTagger.load(trained)
    alone = expected(tagger.model, [tagger.tokenizer(text)["input_ids"][:32] for text in (PROSE, SPAM)])
    assert (alone[0] > alone[1] + 3).all()  # 8 and 2 throughout


def test_its_scores_are_shared_with_the_ngram_tagger(trained: Path) -> None:
    tagger = EncoderTagger.load(trained)
    tokens = tagger.tokenizer([PROSE, CODE])["input_ids"]
    encoded = expected(tagger.model, [row[:32] for row in tokens])
    counted = Tagger.load(trained / "ngrams.npz").expect([PROSE, CODE])
    np.testing.assert_allclose(tagger.expect([PROSE, CODE]), (encoded + counted) / 2, atol=1e-5)
    assert tagger.score([]).shape == (0, 20)


def test_a_run_that_was_killed_goes_on(encoder: Path, trained: Path, tmp_path: Path) -> None:
    """Of 80 documents, 8 a step: stopped at step 37 of 40 of what is kept, the heads and the first part done."""

    class Stops(Silent):
        def record(self, **metrics: object) -> None:
            if metrics["step"] == 37:
                raise KeyboardInterrupt
            super().record(**metrics)

    with pytest.raises(KeyboardInterrupt):
        train_encoder(annotated(80), tuning(encoder, 10), tmp_path / "tagger", Machine(), Stops())
    assert json.loads((tmp_path / ".tagger.building" / "figures.json").read_text())["held_back"]
    again = Silent()
    train_encoder(annotated(80), tuning(encoder, 10), tmp_path / "tagger", Machine(), again)
    assert [row["step"] for row in again.rows] == list(range(31, 41))
    texts = [PROSE, SPAM, CODE]
    whole = EncoderTagger.load(trained).expect(texts)
    np.testing.assert_array_equal(EncoderTagger.load(tmp_path / "tagger").expect(texts), whole)


def test_what_a_killed_run_left_of_other_labels_is_not_gone_on_with(
    encoder: Path, trained: Path, tmp_path: Path
) -> None:
    class Stops(Silent):
        def record(self, **metrics: object) -> None:
            raise KeyboardInterrupt

    documents = annotated(80)
    wrong = replace(documents, scores=9 - documents.scores)
    with pytest.raises(KeyboardInterrupt):
        train_encoder(wrong, replace(tuning(encoder, 5), epochs=0), tmp_path / "tagger", Machine(), Stops())
    left = tmp_path / ".tagger.building"
    (left / "figures.json").write_text('{"spearman": 1.0, "held_back": 3}')
    tagger = train_encoder(documents, replace(tuning(encoder, 5), epochs=0), tmp_path / "tagger", Machine(), Silent())
    assert tagger.figures["trained_on"] + tagger.figures["held_back"] == 80
    assert not left.exists()


def test_an_encoder_may_stay_as_it_came(encoder: Path) -> None:
    held_still = replace(tuning(encoder), epochs=0)
    model, tokenizer = fine_tuned(annotated(80), np.arange(80), held_still, None, Machine(), Silent())
    new = BertModel.from_pretrained(encoder).state_dict()
    assert all(torch.equal(value, new[name]) for name, value in model.encoder.state_dict().items())
    assert (np.diff(expected(model, token_ids(tokenizer, [SPAM, PROSE], 32)), axis=0) > 0.5).all()  # from 4.5 each


def test_the_stage_takes_its_directory(trained: Path, tmp_path: Path) -> None:
    from tests.unit.stages.test_stage_tag import TEXTS, write

    work = Work(tmp_path / "out", {"documents": write(tmp_path / "in", TEXTS)})
    work.out.mkdir()
    summary = tag.run(tag.Config(str(trained)), work)
    assert summary["documents"] == len(TEXTS)
    assert summary["tagger"]["encoder"]


def test_the_command_trains_and_says_how_good_it_is(
    encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    documents = annotated(80)
    rows = zip(documents.ids, documents.texts, documents.scores.tolist(), strict=True)
    file = tmp_path / "annotated.jsonl"
    file.write_text("\n".join(json.dumps({"id": name, "text": text, "scores": row}) for name, text, row in rows))
    chosen = replace(tuning(encoder), epochs=0)
    train_transformer(file, tmp_path / "tagger", chosen, Machine(threads=torch.get_num_threads()))
    assert "| safety |" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["annotated.jsonl", "tagger"]
    small = tag.estimate(tag.Config(), {"documents": Estimate(disk_bytes=1e6)})
    large = tag.estimate(tag.Config(str(tmp_path / "tagger")), {"documents": Estimate(disk_bytes=1e6)})
    assert small.flops == 0 < large.flops


def test_what_is_no_tagger_is_named(encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no transformer tagger"):
        open_tagger(encoder)
    with pytest.raises(UserError, match="cannot be opened"):
        train_encoder(annotated(80), Tuning(str(tmp_path)), tmp_path / "out", Machine(), Silent())
    with pytest.raises(UserError, match="reads 64"):
        train_encoder(annotated(80), Tuning(str(encoder)), tmp_path / "out", Machine(), Silent())
    with pytest.raises(UserError, match="a share"):
        Tuning(str(encoder), part=1.5)
