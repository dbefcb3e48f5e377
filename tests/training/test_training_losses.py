"""Each term of the loss against plain loops in float64, values and gradients."""

from __future__ import annotations

import math

import pytest
import torch

from tl_clt.training.losses import dead_feature_loss, far_write_loss, mse_loss, sparsity_loss, tanh_count

BATCH, N_LAYERS, F, D = 3, 2, 4, 5


def rand(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def decoders() -> list[torch.Tensor]:
    return [rand(F, (N_LAYERS - s) * D, seed=10 + s) for s in range(N_LAYERS)]


def loop_norm(W_dec: torch.Tensor, feature: int) -> float:
    return math.sqrt(sum(float(v) ** 2 for v in W_dec[feature]))


def norms_of(W_dec: list[torch.Tensor]) -> list[torch.Tensor]:
    return [W.norm(dim=1) for W in W_dec]


def tanh_loss(acts: list[torch.Tensor], norms: list[torch.Tensor], c: float) -> torch.Tensor:
    counts = [tanh_count(a, norm, c) for a, norm in zip(acts, norms, strict=True)]
    return sparsity_loss(torch.stack(counts), "tanh", torch.ones(len(counts), dtype=torch.float64))


def test_mse_sums_over_layers_and_coordinates_and_averages_over_tokens() -> None:
    recons, outputs = rand(BATCH, N_LAYERS, D, seed=0), rand(BATCH, N_LAYERS, D, seed=1)
    want = sum(
        float(recons[b, layer, i] - outputs[b, layer, i]) ** 2
        for b in range(BATCH)
        for layer in range(N_LAYERS)
        for i in range(D)
    )
    assert float(mse_loss(recons, outputs)) == pytest.approx(want / BATCH, rel=1e-12)


def test_sparsity_is_tanh_of_norm_times_activation() -> None:
    W_dec, acts, c = decoders(), [rand(BATCH, F, seed=s).relu() for s in range(N_LAYERS)], 4.0
    want = sum(
        math.tanh(c * loop_norm(W_dec[layer], i) * float(acts[layer][b, i]))
        for b in range(BATCH)
        for layer in range(N_LAYERS)
        for i in range(F)
    )
    assert float(tanh_loss(acts, norms_of(W_dec), c)) == pytest.approx(want / BATCH, rel=1e-12)


def test_quadratic_loss_is_the_squared_distance_of_each_layers_count_from_the_target() -> None:
    counts = torch.tensor([[3.0, 5.0, 4.0], [4.0, 6.0, 2.0]], dtype=torch.float64)
    shares = torch.tensor([1.0, 0.5], dtype=torch.float64)
    squares = (1 / 16 + 1 / 16) / 3 + 0.5 * (1 / 4 + 1 / 4) / 3
    assert float(sparsity_loss(counts, "quadratic_l0", shares, 4.0)) == pytest.approx(squares)
    assert float(sparsity_loss(counts, "l0", shares)) == pytest.approx(4.0 + 0.5 * 4.0)


def test_dead_feature_loss_is_distance_below_threshold_times_norm() -> None:
    W_dec = decoders()
    hidden_pre = [rand(BATCH, F, seed=s) for s in range(N_LAYERS)]
    thresholds = [rand(F, seed=20 + s).abs() for s in range(N_LAYERS)]
    want = sum(
        max(float(thresholds[layer][i] - hidden_pre[layer][b, i]), 0.0) * loop_norm(W_dec[layer], i)
        for b in range(BATCH)
        for layer in range(N_LAYERS)
        for i in range(F)
    )
    got = dead_feature_loss(hidden_pre, thresholds, norms_of(W_dec))
    assert float(got) == pytest.approx(want / BATCH, rel=1e-12)


def test_far_write_loss_is_activation_times_norm_times_distance() -> None:
    W_dec = decoders()
    acts = [rand(BATCH, F, seed=s).abs() for s in range(N_LAYERS)]
    blocks = [W.unflatten(1, (N_LAYERS - s, -1)) for s, W in enumerate(W_dec)]
    want = sum(
        float(acts[s][b, i] * blocks[s][i, distance].norm()) * distance
        for b in range(BATCH)
        for s in range(N_LAYERS)
        for i in range(F)
        for distance in range(N_LAYERS - s)
    )
    weights = [sum(d * block[:, d].norm(dim=1) for d in range(block.shape[1])) for block in blocks]
    assert float(far_write_loss(acts, [w + torch.zeros(F) for w in weights])) == pytest.approx(want / BATCH, rel=1e-12)


def test_gradients_equal_finite_differences() -> None:
    W_dec = [w.requires_grad_() for w in decoders()]
    acts = [(rand(BATCH, F, seed=s).abs() * 0.1).requires_grad_() for s in range(N_LAYERS)]
    hidden_pre = [rand(BATCH, F, seed=5 + s).requires_grad_() for s in range(N_LAYERS)]
    thresholds = [rand(F, seed=20 + s).abs().requires_grad_() for s in range(N_LAYERS)]

    def total(*tensors: torch.Tensor) -> torch.Tensor:
        w, a, h, t = (tensors[i : i + N_LAYERS] for i in range(0, 4 * N_LAYERS, N_LAYERS))
        norms = norms_of(w)
        return tanh_loss(list(a), norms, 4.0) + dead_feature_loss(h, t, norms)

    assert torch.autograd.gradcheck(total, (*W_dec, *acts, *hidden_pre, *thresholds))
