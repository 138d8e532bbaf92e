"""Mixtures: whose turn it is, that parts are read as they would be alone, one tokenizer, and each error."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.data.build import Draft
from moesaic.data.config import (
    BpeTokenizer,
    ByteTokenizer,
    MixtureData,
    Part,
    TextCorpus,
    TextData,
    TokensCorpus,
)
from moesaic.data.errors import DataError
from moesaic.data.loader import Loader
from moesaic.data.mixture import PERIOD, MixtureLoader, open_loader, quota_order, shares
from moesaic.data.prepare import prepare, vocab_of


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ({"b": 0.7, "a": 0.3}, {"a": 3, "b": 7}),
        ({"a": 7, "b": 3}, {"a": 7, "b": 3}),
        ({"a": 5.0}, {"a": 1}),
        ({"a": 0.125, "b": 1e-3, "c": 2}, {"a": 125, "b": 1, "c": 2000}),
    ],
)
def test_shares_are_the_smallest_whole_numbers(weights: dict[str, float], expected: dict[str, int]) -> None:
    assert shares(weights) == expected
    assert list(shares(weights)) == sorted(weights)


@given(st.dictionaries(st.text("abc", min_size=1), st.floats(1e-12, 1e12), min_size=1, max_size=8))
def test_any_weights_fit_the_period(weights: dict[str, float]) -> None:
    found = shares(weights)
    total, room = sum(weights.values()), sum(found.values())
    assert min(found.values()) >= 1
    assert room <= PERIOD
    for name, weight in weights.items():
        assert abs(found[name] / room - weight / total) <= 2 * len(weights) / PERIOD


@given(st.lists(st.integers(1, 60), min_size=1, max_size=7))
@settings(max_examples=60, deadline=None)
def test_every_beginning_has_each_part_within_one_of_its_share(turns: list[int]) -> None:
    parts, ranks = quota_order(tuple(turns))
    taken = np.eye(len(turns), dtype=int)[parts].cumsum(0)  # (N, P)
    quota = np.arange(1, len(parts) + 1)[:, None] * np.array(turns) / len(parts)
    assert (np.abs(taken - quota) < 1).all()
    assert taken[-1].tolist() == turns
    assert (ranks == taken[np.arange(len(parts)), parts] - 1).all()


@pytest.fixture
def config(tmp_path: Path) -> MixtureData:
    for name, count in (("words", 40), ("digits", 25)):
        (tmp_path / name).mkdir()
        for i in range(count):
            text = " ".join(f"word{i * j % 31}" if name == "words" else str(i * j * j) for j in range(40 + i))
            (tmp_path / name / f"{i:02}.txt").write_text(text)
    return MixtureData(
        parts={
            "words": Part(weight=0.7, data=TextCorpus(path=str(tmp_path / "words"))),
            "digits": Part(weight=0.3, data=TextCorpus(path=str(tmp_path / "digits"))),
        },
        seq_len=16,
        tokenizer=ByteTokenizer(),
        eval_fraction=0.1,
        cache=str(tmp_path / "cache"),
        workers=1,
    )


def loader(config: MixtureData, **options: Any) -> MixtureLoader:
    made = open_loader(prepare(config), seq_len=16, **{"sequences": 10, "seed": 5} | options)
    assert isinstance(made, MixtureLoader)
    return made


def test_each_part_is_read_as_it_would_be_alone(config: MixtureData) -> None:
    mixture, mixed = prepare(config), loader(config)
    alone = {
        name: Loader(part.train, mark=256, seq_len=16, sequences=1, seed=5)
        for name, part in mixture.parts.items()
    }
    seen = dict.fromkeys(alone, 0)
    for step in range(150):  # more than an epoch of both
        batch, (parts, samples) = mixed.batch(step), mixed.place(np.arange(step * 10, step * 10 + 10))
        for row, part in enumerate(parts):
            name = ["digits", "words"][part]
            assert samples[row] == seen[name]
            assert torch.equal(batch.tokens[row], alone[name].batch(seen[name]).tokens[0])
            seen[name] += 1
        assert len({*batch.samples.tolist()}) == 10 or step > 20
    assert seen == {"words": 1050, "digits": 450}
    assert mixed.epoch(150) > 1


@pytest.mark.parametrize("ranks", [2, 3, 10])
def test_ranks_share_the_rows(config: MixtureData, ranks: int) -> None:
    whole = loader(config)
    shared = [loader(config, rank=rank, ranks=ranks) for rank in range(ranks)]
    for step in (0, 7, 10**7):
        rows = [each.batch(step) for each in shared]
        for field in ("tokens", "targets", "documents", "rows", "samples"):
            together = torch.cat([getattr(batch, field) for batch in rows])
            assert torch.equal(together, getattr(whole.batch(step), field))


def test_the_state_says_what_decides_the_order(config: MixtureData) -> None:
    state = loader(config).state(4)
    assert state["parts"]["words"]["share"] == 7
    assert state["step"] == 4
    other = replace(config, parts=config.parts | {"words": replace(config.parts["words"], weight=0.6)})
    assert loader(other).state(4) != state
    turned = replace(config, parts=dict(reversed(config.parts.items())))
    assert loader(turned).state(4) == state


def test_parts_with_a_given_tokenizer_are_the_corpora_alone(config: MixtureData) -> None:
    mixture = prepare(config)
    for name, part in config.parts.items():
        assert isinstance(part.data, TextCorpus)
        alone = TextData(
            path=part.data.path, tokenizer=ByteTokenizer(), eval_fraction=0.1, cache=config.cache, workers=1
        )
        assert prepare(alone).folder == mixture.parts[name].folder
    summary = mixture.summary()
    assert summary["documents"] == 65
    assert summary["parts"]["words"]["weight"] == 0.7
    assert summary["splits"]["train"]["domains"]["digits"]["documents"] > 15
    assert len(mixture.manifest["streams"]["train"]["sha256"]) == 64


def test_one_bpe_is_trained_on_all_parts(config: MixtureData, tmp_path: Path) -> None:
    config = replace(config, tokenizer=BpeTokenizer(vocab=300))
    stages: list[str] = []
    mixture = prepare(config, report=lambda stage, done, total: stages.append(stage))
    assert {part.tokenizer.digest for part in mixture.parts.values()} == {mixture.tokenizer.digest}
    assert vocab_of(config) == mixture.tokenizer.vocab == 300
    assert {"words: read", "digits: read", "tokenizer", "words: encode"} <= set(stages)
    assert len(mixture.tokenizer.encode("word1 word2")) < 8
    assert not list((tmp_path / "cache").glob("*.work"))
    again: list[str] = []
    assert prepare(config, report=lambda stage, done, total: again.append(stage)).manifest == mixture.manifest
    assert {stage.split(": ")[-1] for stage in again} <= {"hash"}


def test_the_bpe_of_a_mixture_follows_the_weights(
    config: MixtureData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moesaic.data.prepare.SAMPLE", 1000)
    sampled: list[int] = []
    original = Draft.sample

    def spy(draft: Draft, limit: int) -> Iterator[str]:
        texts = list(original(draft, limit))
        sampled.append(sum(len(text) for text in texts))
        return iter(texts)

    monkeypatch.setattr(Draft, "sample", spy)
    config = replace(config, tokenizer=BpeTokenizer(vocab=300))
    first = prepare(config)
    heavier = replace(config, parts=config.parts | {"words": replace(config.parts["words"], weight=2.7)})
    assert prepare(heavier).tokenizer.digest != first.tokenizer.digest
    assert sampled == [300, 700, 100, 900]


def test_an_interrupted_preparation_reads_nothing_twice(
    config: MixtureData, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(config, tokenizer=BpeTokenizer(vocab=300))
    expected = prepare(replace(config, cache=f"{config.cache}-other")).manifest

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("moesaic.data.build.encode_shard", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare(config)
    monkeypatch.setattr("moesaic.data.build.read_shard", pytest.fail)
    monkeypatch.setattr("moesaic.data.prepare.train_bpe", pytest.fail)
    assert prepare(config).manifest == expected


def tokens(tmp_path: Path, mark: int = 256, vocab: int | None = None) -> Part:
    np.tile(np.r_[mark, np.arange(97, 120)], 99).astype(np.uint16).tofile(tmp_path / "ids.bin")
    return Part(weight=1, data=TokensCorpus(path=str(tmp_path / "ids.bin"), mark=mark, vocab=vocab))


def test_text_and_tokens(config: MixtureData, tmp_path: Path) -> None:
    mixture = prepare(replace(config, parts=config.parts | {"ids": tokens(tmp_path)}))
    assert mixture.summary()["parts"]["ids"]["bytes"] == 99 * 23
    only = replace(config, tokenizer=None, parts={"ids": tokens(tmp_path, vocab=300)})
    assert vocab_of(only) == 300
    assert prepare(only).summary()["bytes"] is None


def test_parts_that_do_not_fit_each_other(config: MixtureData, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.mark: 9, but documents of data\.tokenizer start with 256"):
        prepare(replace(config, parts=config.parts | {"ids": tokens(tmp_path, mark=9)}))
    parts = {"ids": tokens(tmp_path, vocab=300), "more": tokens(tmp_path, vocab=301)}
    with pytest.raises(DataError, match=r"vocabularies of different sizes \(ids 300, more 301\)"):
        vocab_of(replace(config, tokenizer=None, parts=parts))


def test_errors_say_which_part(config: MixtureData, tmp_path: Path) -> None:
    def with_path(path: Path) -> MixtureData:
        return replace(config, parts=config.parts | {"bad": Part(weight=1, data=TextCorpus(path=str(path)))})

    with pytest.raises(DataError, match=r"data\.parts\.bad: data\.path: .*: no such file or folder"):
        prepare(with_path(tmp_path / "none"))
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(DataError, match=r"data\.parts\.bad: data: the corpus is empty"):
        prepare(with_path(tmp_path / "empty.txt"))
    (tmp_path / "short.txt").write_text("short text")
    with pytest.raises(DataError, match=r"data\.parts\.bad: data\.seq_len: 16 needs 17 tokens"):
        loader(with_path(tmp_path / "short.txt"))


@pytest.mark.parametrize("weight", [0, -1.0, float("nan")])
def test_weights_are_positive(weight: float) -> None:
    with pytest.raises(ValueError, match=r"weight: .* is not positive"):
        Part(weight=weight, data=TextCorpus(path="x"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parts": {}}, "parts: names no part"),
        ({"parts": {"a/b": Part(weight=1, data=TextCorpus(path="x"))}}, "'a/b' is no name of a part"),
        ({"tokenizer": None}, "tokenizer: missing, and part a is text"),
        ({"parts": {"t": Part(weight=1, data=TokensCorpus(path="x", mark=1))}}, "tokenizer: bpe would be"),
        (
            {"parts": {"t": Part(weight=1, data=TokensCorpus(path="x", mark=1))}, "tokenizer": None},
            r"parts\.t\.data\.vocab: missing",
        ),
    ],
)
def test_fields_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"parts": {"a": Part(weight=1, data=TextCorpus(path="x"))}} | options
    with pytest.raises(ValueError, match=message):
        MixtureData(**given)
