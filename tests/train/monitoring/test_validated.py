"""The validated depth range of a trained model, from measured losses."""

import json
import math

import pytest

from open_mythos.train.monitoring.validated import depth_record, depths_to_validate


def rows(losses: dict[int, float | None]) -> list[dict]:
    return [{"depth": depth, "loss": loss} for depth, loss in losses.items()]


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ({1: 3.0, 2: 2.06, 4: 2.0, 8: 2.02, 16: 2.05, 32: 2.051}, (4, 16)),
        ({1: 2.0, 4: 2.0, 8: 2.0}, (1, 8)),
        ({4: 2.0}, (4, 4)),
        # a depth that fails ends the range, although a later one is good again
        ({1: 2.0, 2: 2.5, 4: 2.0, 8: 2.5, 16: 2.0}, (4, 4)),
        ({1: 2.0, 2: 2.0, 4: None, 8: 2.0, 16: 2.0}, (1, 2)),
        ({4: 2.0, 8: math.nan, 16: math.inf}, (4, 4)),
        # the mean depth exceeds the tolerance: the range contains the best depth
        ({1: 3.0, 4: 2.5, 8: 2.0, 16: 2.01}, (8, 16)),
        ({3: 2.0, 6: 2.0}, (3, 6)),
    ],
)
def test_range_around_the_mean(losses, expected):
    for given in (losses, dict(reversed(losses.items()))):
        record = depth_record(rows(given), mean_depth=4)
        assert (record["low"], record["high"]) == expected


def test_no_finite_loss_gives_no_range():
    record = depth_record(rows({1: math.nan, 2: None, 4: math.inf}), mean_depth=2)
    assert record is not None
    found = [record[name] for name in ("low", "high", "best_depth", "holds_at_twice_the_mean")]
    assert found == [None, None, None, False]
    json.dumps(record, allow_nan=False)


def test_the_record_is_json_and_keeps_the_measured_losses():
    record = depth_record(rows({1: 3.0, 4: 2.0, 8: 2.04, 16: math.nan}), mean_depth=4.2)
    assert json.loads(json.dumps(record, allow_nan=False)) == {
        "low": 4, "high": 8, "best_depth": 4, "best_loss": 2.0, "mean_depth": 4.2,
        "tolerance": 0.05, "holds_at_twice_the_mean": True,
        "rows": [
            {"depth": 1, "loss": 3.0}, {"depth": 4, "loss": 2.0}, {"depth": 8, "loss": 2.04},
            {"depth": 16, "loss": None},
        ],
    }  # fmt: skip


@pytest.mark.parametrize(("loss", "holds"), [(2.049, True), (2.051, False)])
def test_twice_the_mean(loss, holds):
    record = depth_record(rows({4: 2.0, 8: loss}), mean_depth=4)
    assert record["holds_at_twice_the_mean"] is holds
    assert depth_record(rows({4: 2.0}), mean_depth=4)["holds_at_twice_the_mean"] is None


def test_a_dense_model_has_no_record():
    assert depth_record([{"depth": None, "loss": 2.0}], mean_depth=1) is None


@pytest.mark.parametrize("mean", [1, 2, 3.4, 5, 8, 12.0, 33])
def test_measured_depths_include_the_mean_and_twice_the_mean(mean):
    depths = depths_to_validate(mean)
    assert depths == sorted(set(depths))
    assert {1, round(mean), 2 * round(mean), 4 * round(mean)} <= set(depths)
    assert depths[-1] == 4 * round(mean)
    assert len(depths) <= 2 * math.log2(4 * mean) + 4
    assert depths_to_validate(4) == [1, 2, 3, 4, 6, 8, 12, 16]
