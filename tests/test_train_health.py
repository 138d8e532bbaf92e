"""Router health: numbers by hand, and a watch that neither misses a collapse nor repeats itself."""

import math

import pytest
import torch

from moesaic.train.health import CollapseWatch, LayerLoad, health_record, imbalance


def load(*counts: int, k: int = 1, layer: int = 0, entropy: float = math.nan) -> LayerLoad:
    return LayerLoad(layer=layer, counts=torch.tensor(counts), tokens=sum(counts) // k, entropy=entropy)


def test_numbers_by_hand():
    uneven = load(6, 2, 0, 0, k=2)  # 4 tokens, 8 rows, mean 2
    assert uneven.load == [0.75, 0.25, 0.0, 0.0]
    assert uneven.max_over_mean == 3.0
    assert uneven.max_vio == 2.0
    assert uneven.dead == [2, 3]
    assert uneven.busiest == 0
    assert uneven.busiest_share == 1.5
    expected = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(4)
    assert uneven.load_entropy == pytest.approx(expected, rel=1e-12)


def test_balance_and_its_opposite():
    even, single = load(5, 5, 5, 5, 5), load(0, 0, 9)
    assert (even.max_vio, even.dead) == (pytest.approx(0.0, abs=1e-12), [])
    assert even.load_entropy == pytest.approx(1.0, rel=1e-12)
    assert (single.max_vio, single.load_entropy, single.busiest) == (2.0, 0.0, 2)
    assert load(7).load_entropy == 1.0


def test_no_rows_is_nan_not_an_error():
    empty = load(0, 0, 0)
    assert math.isnan(empty.max_vio)
    assert math.isnan(empty.load_entropy)
    assert math.isnan(empty.busiest_share)
    assert empty.dead == [0, 1, 2]
    assert imbalance([empty]) is None
    assert health_record([empty]) == {}


def test_counts_beyond_float32_stay_exact():
    counts = torch.tensor([2**24 + 1, 2**24])
    exact = LayerLoad(layer=0, counts=counts, tokens=2**25 + 1)
    assert exact.load[0] > exact.load[1]


def test_record_names_the_worst_and_every_layer():
    record = health_record([load(4, 4, layer=1, entropy=0.5), load(6, 2, 0, 0, layer=12)])
    assert record["experts/max_vio"] == 2.0
    assert record["experts/dead"] == 2
    assert record["experts/load_entropy"] == record["layer_12/load_entropy"]
    assert record["layer_01/router_entropy"] == 0.5
    assert record["layer_12/load"] == [0.75, 0.25, 0.0, 0.0]
    assert health_record([]) == {}
    assert imbalance([load(4, 4), load(6, 2, 0, 0)]) == 3.0


GOOD = (100, 110, 90, 100)
BAD = (380, 20, 0, 0)


def test_watch_warns_once_and_again_after_recovery():
    watch = CollapseWatch(windows=3)

    def warnings(counts: tuple[int, ...], windows: int) -> int:
        return sum(len(watch.update([load(*counts)])) for _ in range(windows))

    assert warnings(BAD, 2) == 0
    assert warnings(GOOD, 1) == 0  # the row is broken
    assert warnings(BAD, 2) == 0
    assert warnings(BAD, 1) == 1
    assert warnings(BAD, 10) == 0
    assert warnings(GOOD, 2) == 0  # too short to count as recovery
    assert warnings(BAD, 10) == 0
    assert warnings(GOOD, 3) == 0
    assert warnings(BAD, 3) == 1


def test_watch_names_layer_numbers_and_remedies():
    (message,) = CollapseWatch(windows=1).update([load(*GOOD, layer=1), load(*BAD, layer=7)])
    assert "layer 7" in message
    assert "expert 0" in message
    assert "3.8 times the mean" in message
    assert "95% of the tokens" in message
    assert "2 of 4 experts" in message
    for remedy in ("`bias_rate`", "`coef`", "`optim.lr`"):
        assert remedy in message


@pytest.mark.parametrize(
    ("counts", "k", "warns"),
    [
        ((60, 20, 20, 20), 2, True),  # worst MaxVio is 1: half of it is too much
        ((40, 30, 30, 20), 2, False),
        ((100, 100, 100, 100), 4, False),  # K = E: balance is the only outcome
        ((500,) + (10,) * 63, 8, True),  # above the absolute bound
        ((100,) * 3 + (0,) * 5, 2, True),  # more than half are dead
        ((100,) * 4 + (0,) * 4, 2, False),
        ((9, 0, 0), 1, False),  # too few rows to judge
    ],
)
def test_watch_knows_what_is_bad(counts: tuple[int, ...], k: int, warns: bool):
    assert bool(CollapseWatch(windows=1).update([load(*counts, k=k)])) == warns
