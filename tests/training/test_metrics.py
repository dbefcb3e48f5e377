"""What the record of a run says: as `evaluate` says it, on text that training did not see."""

from __future__ import annotations

from contextlib import closing

import pytest
import torch

from tests.training.conftest import N_CTX, batches_of, opened
from tests.training.small_clts import BATCH, N_LAYERS, D, F, build
from tl_clt.evaluation import evaluate
from tl_clt.training import CLTTrainingRunner, TrainingProgress
from tl_clt.training.clt import define_step, init_encoder_biases, init_from_tokens
from tl_clt.training.data.batches import DataCounts
from tl_clt.training.run import runner
from tl_clt.training.run.metrics import Metrics, cut_alike, fit_thresholds, measure

ROUNDING = 1e-4
"""Of float32 sums over some thousand terms, twice."""


@pytest.mark.parametrize("kind", [{"activation": "topk"}, {"activation": "jumprelu", "sparsity_coefficient": 0.1}])
def test_the_record_is_what_evaluate_finds_on_the_prompts_kept_out(model, tokens, make_config, kind: dict) -> None:
    cfg = make_config(**kind, training_tokens=64 * 30)
    run = CLTTrainingRunner(cfg, model=model, dataset=tokens)
    clt = run.run()
    metrics, report = run.record.metrics, evaluate(model, clt, tokens[15::16], n_graphs=0, progress=False)
    assert metrics.held_out and metrics.n_tokens == report.n_tokens == 3 * (N_CTX - 1)
    assert metrics.explained_variance_per_layer == pytest.approx(report.explained_variance_per_layer, abs=ROUNDING)
    assert (metrics.explained_variance, metrics.nmse) == pytest.approx(
        (report.explained_variance, report.nmse), abs=ROUNDING
    )
    assert metrics.l0_per_layer == pytest.approx(report.l0_per_layer, abs=ROUNDING)
    assert metrics.dead_share == pytest.approx(report.dead_share, abs=ROUNDING)


def test_prompts_kept_out_are_never_trained_on(model, tokens, make_config) -> None:
    cfg = make_config(training_tokens=64 * 20)
    rows = model.run_with_cache(tokens)[1]["blocks.0.hook_resid_mid"][15::16]
    kept_out = rows[:, 2:].flatten(0, 1)  # what two prompts have in common is at their beginning
    with closing(batches_of(model, opened(tokens, model, cfg), cfg)) as batches:
        seen = torch.cat([next(batches)[:, 0, 0] for _ in range(20)])
        with batches.paused():
            held = batches.held_out()
            found = torch.cat([b[:, 0, 0] for b in held.batches])
    assert torch.cdist(seen, kept_out).min() > 1e-3
    assert (held.n_tokens, held.kept_out) == (3 * (N_CTX - 1), True)
    torch.testing.assert_close(found, rows[:, 1:].flatten(0, 1))


def test_a_dataset_too_short_to_spare_any_says_so(model, tokens, make_config) -> None:
    run = CLTTrainingRunner(make_config(training_tokens=64 * 4), model=model, dataset=tokens[:12])
    run.run()
    assert (run.record.metrics.held_out, run.record.metrics.n_tokens) == (False, 8 * (N_CTX - 1))


def batches(n: int = 40, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(n * BATCH, 2, N_LAYERS, D, dtype=torch.float64, generator=generator).split(BATCH))


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ({"activation": "batchtopk"}, 3.0),
        ({"activation": "batchtopk", "topk_across": "all_layers"}, 3.0),
        ({"activation": "topk", "topk_across": "all_layers"}, 3.0),
        ({"activation": "jumprelu", "target_l0": 2.5}, 2.5),
        ({"activation": "jumprelu", "target_l0": 0.7}, 0.7),
    ],
)
def test_thresholds_give_the_l0_that_was_asked_for(kind: dict, wanted: float) -> None:
    clt = build(**kind)
    init_encoder_biases(clt, torch.cat(batches())[:, 0])
    before = fit_thresholds(clt, batches(), define_step)
    metrics = measure(
        clt,
        batches(),
        define_step,
        dead_share_in_training=0.0,
        dead_window_steps=1,
        l0_before_thresholds=before,
    )
    one_token = 1 / (40 * BATCH)  # a count is whole
    if "topk_across" in kind:
        assert metrics.l0_mean_per_layer == pytest.approx(wanted, abs=one_token)
    else:
        assert metrics.l0_per_layer == pytest.approx([wanted] * N_LAYERS, abs=one_token)
    assert len(before) == N_LAYERS and max(abs(b - wanted) for b in before) > 0.1


@pytest.mark.parametrize(("off_by", "stays"), [(0.05, True), (0.1, False)])
def test_thresholds_that_give_nearly_what_was_asked_for_stay_as_training_left_them(off_by: float, stays: bool) -> None:
    first = build("jumprelu", target_l0=2.5)
    init_encoder_biases(first, torch.cat(batches())[:, 0])
    fit_thresholds(first, batches(), define_step)
    clt = build("jumprelu", target_l0=2.5 * (1 + off_by))
    clt.load_state_dict(first.state_dict())
    fit_thresholds(clt, batches(), define_step)
    assert all(torch.equal(*pair) == stays for pair in zip(first.log_threshold, clt.log_threshold, strict=True))


def test_thresholds_never_let_a_negative_preactivation_fire() -> None:
    """More are asked for than are positive: these fire, and no others."""
    clt = build("jumprelu", target_l0=9.9)
    fit_thresholds(clt, batches(), define_step)
    for batch in batches():
        h = define_step_of(clt, batch)
        acts = clt.encode(batch[:, 0]).unflatten(1, (N_LAYERS, F))
        assert torch.equal(acts > 0, h > 0)


def define_step_of(clt, batch: torch.Tensor) -> torch.Tensor:
    _, hidden_pre = clt.encode_with_hidden_pre(batch[:, 0])
    return hidden_pre.unflatten(1, (N_LAYERS, F))


def test_batches_are_cut_alike_and_lose_nothing() -> None:
    sizes = [3, 0, 10, 1, 4]
    whole = torch.arange(18.0).view(18, 1, 1, 1)
    cut = list(cut_alike(iter(whole.split(sizes)), 5))
    assert [len(c) for c in cut] == [5, 5, 5, 3] and torch.equal(torch.cat(cut), whole)


def test_features_begin_as_detectors_of_tokens_even_where_inputs_vary_in_few_directions() -> None:
    """Inputs whose variance differs a thousand times between directions: random encoders leave most features unused."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.logspace(0, -1.5, D, dtype=torch.float64)
    x = torch.randn(400, N_LAYERS, D, dtype=torch.float64, generator=generator) * spread
    y = torch.randn(400, N_LAYERS, D, dtype=torch.float64, generator=generator)
    clt = build("topk", k=2)
    before = [W.detach().norm(dim=1) for W in clt.W_dec]
    init_from_tokens(clt, x, y)
    hidden_pre = define_step_of(clt, torch.stack([x, y], dim=1))
    for layer in range(N_LAYERS):
        W_enc, W_dec = clt.W_enc[layer].detach(), clt.W_dec[layer].detach()
        torch.testing.assert_close(W_dec.norm(dim=1), before[layer])
        # Each feature's own token is among those at which it fires most, and it writes that token's outputs.
        outputs = (y - y.mean(dim=0))[:, layer:].flatten(1)
        like = torch.nn.functional.normalize(W_dec, dim=1) @ torch.nn.functional.normalize(outputs, dim=1).T
        token = like.argmax(dim=1)
        torch.testing.assert_close(like.max(dim=1).values, torch.ones(F, dtype=torch.float64))
        rank = (hidden_pre[:, layer] > hidden_pre[token, layer].diagonal()).double().mean(dim=0)
        assert rank.median() < 0.02  # a token near the mean stands out nowhere
        variance = ((x[:, layer] - x[:, layer].mean(dim=0)) @ W_enc.T).var(dim=0)
        assert variance.min() > 0.5 and variance.max() < 1.01
    used = (torch.stack([h.topk(2, dim=1).indices for h in hidden_pre.unbind(1)]).flatten(1)).mT
    assert all(len(used[:, layer].unique()) == F for layer in range(N_LAYERS))


def test_what_is_said_at_the_end_names_what_was_missed_and_the_mend() -> None:
    good = Metrics(
        explained_variance=0.5,
        explained_variance_per_layer=[0.25, 0.75],
        nmse=0.4,
        l0_sum_over_layers=16.0,
        l0_mean_per_layer=8.0,
        l0_per_layer=[8.1, 7.9],
        dead_share=0.125,
        dead_share_in_training=0.0,
        dead_window_steps=10,
        n_tokens=1234,
        held_out=True,
        l0_before_thresholds=None,
    )
    said = good.in_words(8.0)
    assert "On 1,234 tokens of text kept out of training, the CLT explains 50% of the variance" in said
    assert "25% in layer 0, the least" in said and "by layer 7.9 to 8.1; 8 were asked for" in said
    assert "12% of all features" in said and "missed" not in said and "silent" not in said
    assert "asked for" not in good.in_words(None)
    few = good._replace(l0_per_layer=[8.0, 6.0], held_out=False).in_words(8.0)
    assert "missed by more than a tenth in layers 1: fewer features than that are positive" in few
    assert "text that was trained on" in few
    many = good._replace(l0_per_layer=[8.0, 16.0]).in_words(8.0)
    assert "missed by more than a tenth in layers 1: the text by which thresholds were set is another" in many
    assert "worse than the mean" not in said
    bad = good._replace(explained_variance=-1.2, explained_variance_per_layer=[0.6, -3.0]).in_words(8.0)
    assert "explains -120% of" in bad and "In layers 1 it is worse than the mean output would be" in bad
    assert "give more training_tokens" in bad and "lr too high" in bad and "raise target_l0 or k" in bad
    assert "Layers 1 are silent: raise target_l0 or k" in good._replace(l0_per_layer=[8.0, 0.0]).in_words(8.0)
    assert DataCounts(prompts=2, kept=5, special_tokens=2, outliers=1).in_words() == (
        "Of 2 prompts 5 tokens were kept, and 2 special tokens, 1 of outlying norm left out."
    )
    assert DataCounts(prompts=2, kept=5).in_words() == "Of 2 prompts 5 tokens were kept."


def test_a_short_last_batch_is_told_with_the_numbers_of_the_one_before(model, tokens, make_config) -> None:
    lines: list[TrainingProgress] = []
    cfg = make_config(training_tokens=64 * 10 + 1, log_every=5)
    CLTTrainingRunner(cfg, model=model, dataset=tokens, on_progress=lines.append).run()
    assert [line.step for line in lines] == [5, 10, 11] and lines[2].tokens == 641
    assert lines[2].explained_variance == lines[1].explained_variance > -1


def test_what_fails_after_training_leaves_the_clt(model, tokens, make_config, monkeypatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("the stream broke off")

    monkeypatch.setattr(runner, "measure", fail)
    run = CLTTrainingRunner(make_config(training_tokens=64 * 4), model=model, dataset=tokens)
    with pytest.raises(OSError, match="broke off"):
        run.run()
    assert run.clt is not None and run.clt.W_enc.isfinite().all()


def test_thresholds_of_few_tokens_are_measured_on_the_same(model, make_config) -> None:
    """One token of a prompt is counted: the others are position 0, and what is left out."""
    prompts = torch.full((15, N_CTX), 5)
    prompts[:, 0], prompts[:, -1] = torch.arange(15) + 6, torch.arange(15) + 7
    options = {"exclude_special_tokens": (5,), "n_eval_prompts": 1, "n_batches_in_buffer": 64}
    cfg = make_config(activation="batchtopk", training_tokens=64 * 2, **options)
    run = CLTTrainingRunner(cfg, model=model, dataset=prompts)
    run.run()
    assert run.record.metrics.n_tokens == 1 and run.record.metrics.l0_before_thresholds is not None
    assert run.record.metrics.l0_mean_per_layer == pytest.approx(6.0)


def test_inputs_that_never_vary_give_weights_that_are_finite() -> None:
    clt = build("topk")
    x, y = torch.ones(20, N_LAYERS, D, dtype=torch.float64), torch.zeros(20, N_LAYERS, D, dtype=torch.float64)
    init_from_tokens(clt, x, y)
    assert all(parameter.isfinite().all() for parameter in clt.parameters())
