"""Sums over active features are the dense products."""

from __future__ import annotations

import pytest
import torch

from tl_clt.training.fast import products
from tl_clt.training.fast.products import (
    Support,
    add_outer,
    inner_products,
    support_above,
    support_of_topk,
    weighted_rows,
)

BATCH, F, WIDTH = 5, 7, 6


def rand(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def some() -> torch.Tensor:
    """Activations with a silent token, a silent feature and one that fires at every other token."""
    acts = torch.relu(rand(BATCH, F, seed=0))
    acts[2] = 0
    acts[:, 4] = 0
    acts[[0, 1, 3, 4], 6] = 1.5
    return acts


ZERO = torch.zeros(1, 1, dtype=torch.float64)
CASES = {"some": some(), "none": torch.zeros(BATCH, F, dtype=torch.float64), "all": rand(BATCH, F, seed=1).exp()}


@pytest.fixture(params=CASES)
def acts(request: pytest.FixtureRequest) -> torch.Tensor:
    return CASES[request.param]


def test_places_are_where_the_activations_are(acts: torch.Tensor) -> None:
    places = support_above(acts, ZERO)
    assert torch.equal(torch.stack([places.tokens, places.features], dim=1), acts.nonzero())
    assert torch.equal(places.to_dense(places.gather(acts)), acts)


@pytest.mark.parametrize("n_features", [5, 12, 16, 24])
def test_places_above_one_number_or_one_for_each_token(n_features: int) -> None:
    values = rand(9, n_features, seed=8)
    values[3, 2] = torch.nan
    for low in (torch.full((1, 1), 0.3, dtype=torch.float64), rand(9, 1, seed=7)):
        places = support_above(values, low)
        got = torch.zeros(9, n_features, dtype=torch.bool)
        got[places.tokens, places.features] = True
        assert torch.equal(got, ~(values <= low)) and len(places.features) == int(got.sum())
        few = places.only(places.features % 2 == 0)
        assert torch.equal(few.tokens, places.tokens[places.features % 2 == 0])


def test_places_by_feature_are_the_same_places(acts: torch.Tensor) -> None:
    places = support_above(acts, ZERO)
    order, tokens, offsets = places.by_feature
    assert torch.equal(places.tokens[order], tokens)
    assert torch.equal(offsets.diff(), (acts > 0).sum(dim=0))
    assert torch.equal(places.features[order], torch.arange(F).repeat_interleave(offsets.diff()))


def test_weighted_rows_is_the_product_with_the_weight(acts: torch.Tensor) -> None:
    places, weight = support_above(acts, ZERO), rand(F, WIDTH, seed=2)
    torch.testing.assert_close(weighted_rows(places.gather(acts), places, weight), acts @ weight)


@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("block", [WIDTH, 2, 4])
def test_add_outer_adds_the_transposed_product_or_writes_it(
    acts: torch.Tensor, block: int, adds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(products.BLOCK_COLUMNS, "cpu", block)
    places, grad = support_above(acts, ZERO), rand(BATCH, WIDTH, seed=3)
    total = rand(F, WIDTH, seed=4)
    want = acts.T @ grad + (total if adds else 0)
    add_outer(total, places.gather(acts), places, grad, adds)
    torch.testing.assert_close(total, want)


def test_inner_products_are_the_dense_ones_at_the_places(acts: torch.Tensor, recwarn) -> None:
    places, weight, grad = support_above(acts, ZERO), rand(F, WIDTH, seed=2), rand(BATCH, WIDTH, seed=3)
    strided = rand(BATCH, 3 * WIDTH, seed=5)[:, WIDTH : 2 * WIDTH].copy_(grad)
    for g in (grad, strided):
        torch.testing.assert_close(inner_products(g, weight, places), places.gather(g @ weight.T))
    assert not recwarn.list


def test_topk_places_are_sorted_by_token() -> None:
    indices = torch.tensor([[4, 1], [0, 6], [2, 1]])
    places = support_of_topk(indices, F)
    assert isinstance(places, Support)
    assert places.tokens.tolist() == [0, 0, 1, 1, 2, 2]
    assert places.features.tolist() == [4, 1, 0, 6, 2, 1]
