"""Each product and its gradients against plain autograd in float64: without a `.grad` to add to, and with one."""

from __future__ import annotations

import pytest
import torch

from tl_clt.training.fast.products import (
    decode,
    decode_places,
    decode_rows,
    encode,
    encode_places,
    encode_rows,
    row_norms,
    set_gradients_aside,
    sum_by_target,
    support_above,
    zero_gradients_aside,
)

BATCH, F, D, WIDTH = 5, 7, 4, 12


def rand(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


ACTS = torch.relu(rand(BATCH, F, seed=0))
ROWS = torch.tensor([5, 0, 2])
PLACES = support_above(ACTS, torch.zeros(1, 1))
X = rand(BATCH, D, seed=1)


def leaves() -> dict[str, torch.Tensor]:
    values = {
        "acts": ACTS.clone(),
        "values": PLACES.gather(ACTS),
        "W_enc": rand(F, D, seed=2),
        "b_enc": rand(F, seed=3),
        "W_dec": rand(F, WIDTH, seed=4),
        "b_dec": rand(3, D, seed=5),
    }
    return {name: value.requires_grad_() for name, value in values.items()}


def empty() -> torch.Tensor:
    return torch.empty(BATCH, F, dtype=torch.float64)


def by_target(t: dict) -> torch.Tensor:
    """Sources 0, 1, 2 write 3, 2, 1 layers, spelled out with zeros below the source."""
    whole = t["acts"] @ t["W_dec"]
    parts = [whole, 2 * whole[:, :8], 3 * whole[:, :4]]
    padded = [torch.cat([whole.new_zeros(BATCH, WIDTH - p.shape[1]), p], dim=1) for p in parts]
    return t["b_dec"] + sum(padded).unflatten(1, (3, D))


def by_target_fast(t: dict) -> torch.Tensor:
    whole = decode(t["acts"], t["W_dec"])
    return t["b_dec"] + sum_by_target([whole, 2 * whole[:, :8], 3 * whole[:, :4]], (3, D))


CASES = {
    "encode": (
        lambda t: encode(X, t["W_enc"], t["b_enc"], empty()),
        lambda t: X @ t["W_enc"].T + t["b_enc"],
    ),
    "encode_places": (
        lambda t: encode_places(X @ t["W_enc"].detach().T + t["b_enc"].detach(), X, t["W_enc"], t["b_enc"], PLACES),
        lambda t: PLACES.gather(X @ t["W_enc"].T + t["b_enc"]),
    ),
    "encode_rows": (
        lambda t: encode_rows(X @ t["W_enc"].detach().T + t["b_enc"].detach(), X, t["W_enc"], t["b_enc"], ROWS),
        lambda t: (X @ t["W_enc"].T + t["b_enc"])[:, ROWS],
    ),
    "decode": (lambda t: decode(t["acts"], t["W_dec"]), lambda t: t["acts"] @ t["W_dec"]),
    "decode, sparse": (lambda t: decode(t["acts"], t["W_dec"], PLACES), lambda t: t["acts"] @ t["W_dec"]),
    "decode_places": (
        lambda t: decode_places(t["values"], t["W_dec"], PLACES),
        lambda t: PLACES.to_dense(t["values"]) @ t["W_dec"],
    ),
    "decode_rows": (
        lambda t: decode_rows(t["acts"][:, ROWS], t["W_dec"], ROWS),
        lambda t: t["acts"][:, ROWS] @ t["W_dec"][ROWS],
    ),
    "row_norms": (lambda t: row_norms(t["W_dec"]), lambda t: t["W_dec"].norm(dim=1)),
    "sum_by_target": (by_target_fast, by_target),
}


@pytest.mark.parametrize("held", [False, True], ids=["fresh", "added to .grad"])
@pytest.mark.parametrize("name", CASES)
def test_product_and_gradients_are_the_plain_ones(name: str, held: bool) -> None:
    ours, plain = CASES[name]
    mine, theirs = leaves(), leaves()
    for tensors in (mine, theirs):
        for i, tensor in enumerate(tensors.values()):
            tensor.grad = rand(*tensor.shape, seed=20 + i) if held else None
    got, want = ours(mine), plain(theirs)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    upstream = rand(*want.shape, seed=9)
    got.backward(upstream)
    want.backward(upstream)
    for key, tensor in theirs.items():
        assert (mine[key].grad is None) == (tensor.grad is None), key
        if tensor.grad is not None:
            torch.testing.assert_close(mine[key].grad, tensor.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_gradients_set_aside_are_written_over(name: str) -> None:
    ours, plain = CASES[name]
    mine, theirs = leaves(), leaves()
    for tensor in mine.values():
        tensor.grad = torch.full_like(tensor, torch.nan)
    set_gradients_aside(mine.values())
    got, want = ours(mine), plain(theirs)
    assert all(tensor.grad is None for tensor in mine.values())
    upstream = rand(*want.shape, seed=9)
    got.backward(upstream)
    want.backward(upstream)
    zero_gradients_aside(mine.values())
    for key, tensor in theirs.items():
        grad = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
        torch.testing.assert_close(mine[key].grad, grad, rtol=1e-12, atol=1e-12)


def test_a_held_gradient_keeps_its_memory() -> None:
    W_dec = leaves()["W_dec"]
    W_dec.grad = torch.zeros_like(W_dec)
    before = W_dec.grad.data_ptr()
    decode(ACTS, W_dec).sum().backward()
    assert W_dec.grad.data_ptr() == before and W_dec.grad.abs().sum() > 0


@pytest.mark.parametrize("name", CASES)
def test_autograd_grad_gets_the_gradient_and_leaves_held_ones_alone(name: str) -> None:
    ours, plain = CASES[name]
    mine, theirs = leaves(), leaves()
    for tensor in mine.values():
        tensor.grad = torch.ones_like(tensor)
    got, want = ours(mine), plain(theirs)
    upstream = rand(*want.shape, seed=9)
    expected = torch.autograd.grad(want, list(theirs.values()), upstream, allow_unused=True)
    for key, tensor in zip(theirs, expected, strict=True):
        if tensor is not None:
            (grad,) = torch.autograd.grad(got, mine[key], upstream, retain_graph=True)
            torch.testing.assert_close(grad, tensor, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(tensor.grad, torch.ones_like(tensor)) for tensor in mine.values())


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
@pytest.mark.parametrize("name", CASES)
def test_hooks_of_weights_see_their_gradients(name: str, register: str) -> None:
    ours, plain = CASES[name]
    mine, theirs = leaves(), leaves()
    seen: dict[str, torch.Tensor] = {}
    for key, tensor in mine.items():
        tensor.grad = torch.zeros_like(tensor)

        def see(grad: torch.Tensor, key: str = key) -> None:
            seen[key] = grad if register == "register_hook" else grad.grad.clone()

        getattr(tensor, register)(see)
    got, want = ours(mine), plain(theirs)
    upstream = rand(*want.shape, seed=9)
    got.backward(upstream)
    want.backward(upstream)
    for key, tensor in theirs.items():
        if tensor.grad is not None:
            torch.testing.assert_close(seen[key], tensor.grad, rtol=1e-12, atol=1e-12)


def test_a_row_of_zeros_has_norm_and_gradient_zero() -> None:
    W = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    row_norms(W).sum().backward()
    assert torch.equal(W.grad, torch.zeros_like(W))


@pytest.mark.parametrize("name", ["encode", "decode", "decode, sparse", "decode_places", "decode_rows"])
@pytest.mark.parametrize("how", ["autocast", "weights"])
def test_lower_precision_is_the_product_up_to_rounding(name: str, how: str) -> None:
    ours, plain = CASES[name]
    mine = {k: v.detach().float() for k, v in leaves().items()}
    if how == "weights":
        mine |= {k: v.bfloat16() for k, v in mine.items() if k.startswith(("W", "b"))}
    mine = {k: v.requires_grad_() for k, v in mine.items()}
    theirs = leaves()
    if name == "encode":
        out = torch.empty(BATCH, F)

        def ours(t: dict) -> torch.Tensor:
            return encode(X.float(), t["W_enc"], t["b_enc"], out)

    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        got = ours(mine)
    want = plain(theirs)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=0.03, atol=0.06)
    upstream = rand(*want.shape, seed=9)
    got.backward(upstream.float())
    want.backward(upstream)
    for key, tensor in theirs.items():
        if tensor.grad is not None:
            assert mine[key].grad.dtype == mine[key].dtype
            torch.testing.assert_close(mine[key].grad.double(), tensor.grad, rtol=0.03, atol=0.1)
