import pytest

from moesaic.data.config import BpeTokenizer, PythonData


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 1}, "seq_len: 1 is below 2"),
        ({"eval_fraction": 0.0}, r"eval_fraction: 0\.0 is not between"),
        ({"eval_fraction": 1.0}, r"eval_fraction: 1\.0 is not between"),
        ({"workers": 0}, "workers: 0 is not positive"),
    ],
)
def test_fields_out_of_range(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PythonData(**options)  # pyright: ignore[reportArgumentType]


def test_vocab_holds_every_byte_and_the_mark() -> None:
    with pytest.raises(ValueError, match="vocab: 256 is below 257"):
        BpeTokenizer(vocab=256)
    assert BpeTokenizer(vocab=257).vocab == 257
