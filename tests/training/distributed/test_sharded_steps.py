"""A step, and several, on a grid of processes against one process, in float64."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from tests.training.distributed import cases
from tests.training.distributed.cases import KINDS, MAX_NORM, StepResult, Trained
from tests.training.distributed.processes import Processes
from tl_clt.training.fast import step as step_module

GRIDS = {"2 x 1": (2, 1), "1 x 2": (2, 2), "2 x 2": (4, 2), "4 x 1": (4, 1)}
"""Feature shards x data parallel, as (processes, n_data_parallel)."""

STEP_GRIDS = [("dense", "2 x 1"), ("dense", "1 x 2"), ("dense", "2 x 2"), ("sparse", "2 x 2"), ("sparse", "4 x 1")]


@pytest.fixture(autouse=True)
def density_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put back after each test: `cases.step` sets it."""
    monkeypatch.setitem(step_module.SPARSE_BELOW, "cpu", step_module.SPARSE_BELOW["cpu"])


def assert_close(got: Any, want: Any, name: str) -> None:
    np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12, err_msg=name)


@pytest.mark.parametrize(("kind", "products_and_grid"), product(KINDS, STEP_GRIDS), ids=str)
def test_step_is_that_of_one_process(processes: Processes, kind: str, products_and_grid: tuple[str, str]) -> None:
    products, grid = products_and_grid
    n, n_data_parallel = GRIDS[grid]
    want: StepResult = cases.step(kind, products)
    assert want.norm > MAX_NORM
    assert "auxk_loss" in want.losses
    for got in processes.run(n, cases.step, kind, products, n_data_parallel):
        assert_close(got.recons, want.recons, "recons")
        assert np.array_equal(got.fired, want.fired)
        assert got.losses == pytest.approx(want.losses, rel=1e-10)
        assert got.norm == pytest.approx(want.norm, rel=1e-10)
        assert got.gradients.keys() == want.gradients.keys()
        for name in want.gradients:
            assert np.abs(want.gradients[name]).max() > 0, name
            assert_close(got.gradients[name], want.gradients[name], name)
            assert_close(got.clipped[name], want.clipped[name], name)


@pytest.mark.parametrize(("kind", "grid"), product(KINDS, ["2 x 1", "1 x 2", "2 x 2"]))
def test_weights_and_counts_after_several_steps_are_those_of_one_process(
    processes: Processes, kind: str, grid: str
) -> None:
    n, n_data_parallel = GRIDS[grid]
    want: Trained = cases.train(kind)
    start = cases.fresh_weights(kind)
    assert want.counts["dead_neurons"].any() or "dead_feature_density" not in KINDS[kind]
    for got in processes.run(n, cases.train, kind, n_data_parallel):
        for name, value in want.weights.items():
            assert name not in start or np.abs(value - start[name]).max() > 1e-3, name
            assert_close(got.weights[name], value, name)
        for name, value in want.counts.items():
            assert np.array_equal(got.counts[name], value), name
        assert got.last_losses == pytest.approx(want.last_losses, rel=1e-9)


@pytest.mark.parametrize("kind", ["jumprelu, all", "batchtopk"])
def test_logs_are_those_of_one_process(processes: Processes, kind: str) -> None:
    rows, norms = cases.logs(kind)
    assert len(rows) == 2 and rows[0]["metrics/l0"] > 0
    for got_rows, got_norms in processes.run(4, cases.logs, kind, 2):
        for got, want in zip(got_rows, rows, strict=True):
            assert got == pytest.approx(want, rel=1e-5)
        np.testing.assert_allclose(got_norms, norms, rtol=1e-6)


def test_copies_of_weights_in_bfloat16_stay_equal(processes: Processes) -> None:
    results = processes.run(4, cases.train, "jumprelu, all", 2, {"dtype": "bfloat16"})
    for got in results[1:]:
        for name, value in results[0].weights.items():
            assert np.array_equal(got.weights[name], value), name


@pytest.mark.parametrize("grid", GRIDS)
def test_the_same_seed_gives_the_same_fresh_clt_on_any_grid(processes: Processes, grid: str) -> None:
    n, n_data_parallel = GRIDS[grid]
    want = cases.fresh_weights("jumprelu, all")
    for got in processes.run(n, cases.fresh_weights, "jumprelu, all", n_data_parallel):
        assert all(np.array_equal(got[name], value) for name, value in want.items())


@pytest.mark.parametrize("grid", ["4 x 1", "2 x 2"])
def test_whole_clt_is_put_together_on_the_main_rank_only(processes: Processes, grid: str) -> None:
    n, n_data_parallel = GRIDS[grid]
    want = cases.fresh_weights("jumprelu, all")
    main, *others = processes.run(n, cases.gathered, "jumprelu, all", n_data_parallel)
    assert main[0] == "cpu" and main[1].keys() == want.keys()
    assert all(np.array_equal(main[1][name], value) for name, value in want.items())
    assert all(device == "meta" for device, _ in others)


@pytest.mark.parametrize(("n", "k"), product([2, 4], [1, 3, 7, 12]))
def test_topk_over_ranks_keeps_the_k_largest_of_all(processes: Processes, n: int, k: int) -> None:
    h = torch.randn(6, 12, dtype=torch.float64).numpy()
    kept = sorted(place for share in processes.run(n, cases.kept_by_topk, h, k) for place in share)
    assert kept == sorted((t, int(f)) for t in range(6) for f in np.argsort(-h[t])[:k])


@pytest.mark.parametrize("n", [2, 4])
def test_topk_over_ranks_keeps_exactly_k_of_equal_values_lower_ranks_first(processes: Processes, n: int) -> None:
    h = np.zeros((2, 12))
    h[1, 11] = 1.0
    shares = processes.run(n, cases.kept_by_topk, h, 3)
    assert [sum(t == 0 for t, _ in share) for share in shares] == [3, *[0] * (n - 1)]
    assert [sum(t == 1 for t, _ in share) for share in shares] == [2, *[0] * (n - 2), 1]


def test_grid_that_does_not_fit_is_refused_with_the_mend(processes: Processes) -> None:
    for message in processes.run(2, cases.refused, 7, 1):
        assert message == (
            "d_transcoder is 7, which 2 processes cannot share equally: give a multiple of 2,"
            " or raise n_data_parallel (now 1)."
        )
    for message in processes.run(2, cases.refused, 8, 3):
        assert "n_data_parallel is 3, and the number of processes 2: start a multiple of 3" in message
    assert processes.run(2, cases.refused, 7, 2) == ["accepted"] * 2
