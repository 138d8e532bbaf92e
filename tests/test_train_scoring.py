"""Log-likelihoods equal those of one plain forward pass over each text alone, however texts are batched and cut."""

from dataclasses import replace

import pytest
import torch

from moesaic.data.tokenizer import Bytes
from moesaic.models.transformer import Transformer
from moesaic.moe import MoE, TopKRouter
from moesaic.train.scoring import Scorer, windows

CONFIG = Transformer.Config(
    dim=16, layers=2, heads=2, ffn=MoE.Config(num_experts=4, hidden=8, router=TopKRouter.Config(k=2))
)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4}


def scorer_of(dtype: torch.dtype, *, seq_len: int = 16, batch_tokens: int = 64) -> Scorer:
    model = Transformer(CONFIG, 257, seed=3).to(dtype)
    return Scorer(model=model, tokenizer=Bytes(), seq_len=seq_len, batch_tokens=batch_tokens, dtype=dtype)


def log_likelihoods(model: Transformer, tokens: list[int]) -> torch.Tensor:
    """Of each token but the first, given all before it, by one forward pass."""
    dtype = model.embedding.dtype
    logits = model(torch.tensor([tokens[:-1]]), mode="eval", dtype=dtype).logits
    assert logits is not None
    return logits[0].log_softmax(-1)[torch.arange(len(tokens) - 1), tokens[1:]]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("batch_tokens", [1, 20, 10_000])
@torch.no_grad()
def test_scores_equal_plain_forward_passes(dtype: torch.dtype, batch_tokens: int):
    scorer = scorer_of(dtype, batch_tokens=batch_tokens)
    texts = [
        ("", "a"),
        ("The cat", " sat"),
        ("x", "y" * 14),
        ("Question: 1?", " no"),
        ("q", "r"),
        ("", "abc"),
    ]
    requests = [(scorer.encode(before + after), len(after)) for before, after in texts]
    for (tokens, n), score in zip(requests, scorer.score(requests), strict=True):
        expected = log_likelihoods(scorer.model, tokens)[-n:].double().sum().item()
        assert score.log_likelihood == pytest.approx(expected, abs=TOLERANCE[dtype])


@torch.no_grad()
def test_a_long_context_is_cut_on_the_left():
    scorer = scorer_of(torch.float64, seq_len=8)
    tokens = scorer.encode("a context that does not fit; the end")
    (score,) = scorer.score([(tokens, 3)])
    expected = log_likelihoods(scorer.model, tokens[-9:])[-3:].sum().item()
    assert score.log_likelihood == pytest.approx(expected, abs=1e-12)


@torch.no_grad()
def test_a_long_text_is_scored_in_windows():
    scorer = scorer_of(torch.float64, seq_len=8, batch_tokens=17)
    tokens = scorer.encode("twenty-one characters")  # windows predict 8, 8 and 5
    (score,) = scorer.score([(tokens, 21)])
    parts = [(tokens[0:9], 8), (tokens[8:17], 8), (tokens[13:22], 5)]
    expected = sum(log_likelihoods(scorer.model, part)[-n:].sum().item() for part, n in parts)
    assert score.log_likelihood == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("length", [2, 3, 8, 9, 10, 17, 40])
@pytest.mark.parametrize("seq_len", [1, 2, 8])
def test_windows_predict_each_token_once(length: int, seq_len: int):
    tokens = list(range(length))
    for scored in range(length):
        parts = list(windows(tokens, scored, seq_len))
        assert [token for part in parts for token in part.tokens[-part.scored :]] == tokens[length - scored :]
        assert all(1 <= len(part.tokens) - 1 <= seq_len and part.scored < len(part.tokens) for part in parts)


def test_nothing_to_score_is_certain():
    (score,) = scorer_of(torch.float32).score([([256, 1], 0)])
    assert (score.log_likelihood, score.greedy) == (0.0, True)


@torch.no_grad()
def test_greedy_means_the_likeliest_tokens():
    scorer = scorer_of(torch.float64, seq_len=32)
    text = scorer.encode("ab")
    for _ in range(5):
        logits = scorer.model(torch.tensor([text]), mode="eval", dtype=torch.float64).logits
        assert logits is not None
        text.append(int(logits[0, -1].argmax()))
    other = [*text[:-1], (text[-1] + 1) % 256]
    assert [score.greedy for score in scorer.score([(text, 5), (other, 5), (text, 1)])] == [True, False, True]


@torch.no_grad()
def test_what_is_written_is_the_likeliest_text():
    scorer = scorer_of(torch.float64, seq_len=12)
    plain = scorer.encode("ab")
    expected = []
    for _ in range(20):  # where 12 tokens are full, the last 6 go on
        logits = scorer.model(torch.tensor([plain]), mode="eval", dtype=torch.float64).logits
        assert logits is not None
        expected.append(int(logits[0, -1].argmax()))
        plain = [*plain, expected[-1]]
        if len(plain) > 12:
            plain = plain[-6:]
    assert 256 not in expected
    text = scorer.tokenizer.decode(expected)
    assert scorer.write("ab", stops=[], max_tokens=20) == text
    stop = text[7:9]
    assert scorer.write("ab", stops=["never", stop], max_tokens=20) == text[: text.index(stop)]
    assert scorer.write("ab", stops=[], max_tokens=3) == scorer.tokenizer.decode(expected[:3])
    assert scorer.write("a" * 99, stops=[], max_tokens=2) == replace(scorer).write(
        "a" * 11 + "a", stops=[], max_tokens=2
    )
