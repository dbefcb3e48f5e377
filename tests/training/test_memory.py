"""The estimate counts what there is, and a run that cannot fit is refused before it begins."""

from __future__ import annotations

import pytest

from tests.training.small_clts import D, build
from tl_clt.errors import NotEnoughMemory
from tl_clt.training import CLTTrainingRunner, MemoryEstimate
from tl_clt.training.run import memory
from tl_clt.training.run.memory import estimate_memory


@pytest.mark.parametrize(("dtype", "weight", "moment"), [("float32", 4, 4), ("float64", 8, 8), ("bfloat16", 2, 4)])
def test_weights_gradients_and_moments_are_counted_exactly(make_config, dtype: str, weight: int, moment: int) -> None:
    clt = build("jumprelu", dtype=dtype)
    n = sum(p.numel() for p in clt.parameters())
    estimate = estimate_memory(clt, make_config(dtype=dtype).data)
    assert estimate[:3] == (weight * n, weight * n, 2 * moment * n)
    assert estimate.total == sum(estimate) and "weights" in str(estimate)


def test_buffer_and_activations_grow_with_what_they_hold(make_config) -> None:
    clt = build("jumprelu")
    small = estimate_memory(clt, make_config().data)
    assert estimate_memory(clt, make_config(n_batches_in_buffer=64).data).buffer > 2 * small.buffer
    assert estimate_memory(clt, make_config(train_batch_size_tokens=128).data).activations == 2 * small.activations
    assert estimate_memory(clt, make_config(seqpos_slice=(4, None)).data).buffer < small.buffer


def test_the_float64_copies_of_the_start_are_counted_where_they_are_more_than_what_comes_later(make_config) -> None:
    clt = build("topk")
    small = estimate_memory(clt, make_config().data)
    assert small.start == 0 and small.total > small.weights
    # Many first tokens for a small CLT: they are held scaled twice, and each layer's inputs in float64.
    n = 64 * 10_000
    many = estimate_memory(clt, make_config(n_batches_for_scale=10_000).data)
    in_float64 = n * D * 8
    assert many.start > 2 * in_float64 and many.total == sum(many)


def test_what_cannot_fit_is_refused_with_the_parts_before_any_activations(
    model, tokens, make_config, monkeypatch, tmp_path
) -> None:
    told: list[MemoryEstimate] = []
    monkeypatch.setattr(memory, "free_memory", lambda device: 1000)
    cfg = make_config(output_path=str(tmp_path / "clt"))
    monkeypatch.setattr("tl_clt.training.run.runner.ActivationBatches", lambda *_: pytest.fail("activations were made"))
    with pytest.raises(NotEnoughMemory, match=r"needs about .* GiB \(weights .* moments .* buffer .*Lower d_trans"):
        CLTTrainingRunner(cfg, model=model, dataset=tokens, on_start=told.append).run()
    assert len(told) == 1 and not list(tmp_path.iterdir())


def test_the_run_tells_its_estimate(model, tokens, make_config) -> None:
    told: list[MemoryEstimate] = []
    CLTTrainingRunner(make_config(training_tokens=64), model=model, dataset=tokens, on_start=told.append).run()
    assert told[0].weights == 4 * (3 * (24 * 16 + 24) + 24 * 16 * 6 + 3 * 16)
