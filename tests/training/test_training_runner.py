"""Whole runs on a tiny model, with SAELens's own trainer."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import sae_lens
import torch
from sae_lens.training import sae_trainer
from sae_lens.training.activations_store import ActivationsStore
from transformers import GPT2Config, GPT2LMHeadModel

from tl_clt.errors import ConfigError, DatasetError, FormatError, HookNotFound, OutputNotEmpty
from tl_clt.training import CLTTrainingRunner, CLTTrainingRunnerConfig, TrainingProgress
from tl_clt.training.data import batches
from tl_clt.training.run import runner
from tl_clt.training.run.trainer import CLTTrainer
from tl_clt.transcoder import CrossLayerTranscoder


def layer_io(model, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    _, cache = model.run_with_cache(tokens)
    x, y = (
        torch.stack([cache[f"blocks.{layer}.{hook}"] for layer in range(3)], dim=-2).flatten(0, 1)
        for hook in ("hook_resid_mid", "hook_mlp_out")
    )
    return x, y


def test_store_is_saelens_own_and_the_trainer_but_for_its_step() -> None:
    assert batches.ActivationsStore is ActivationsStore
    assert runner.CLTTrainer.__mro__[1] is sae_trainer.SAETrainer
    own = {name for name in vars(CLTTrainer) if callable(getattr(CLTTrainer, name))}
    assert own & set(vars(sae_trainer.SAETrainer)) == {"__init__", "_train_step", "_checkpoint_if_needed"}
    assert {name for name, value in vars(CLTTrainer).items() if isinstance(value, property)} == {
        "dead_neurons",
        "controller",
    }


@pytest.mark.parametrize(
    ("activation", "span", "changes"),
    [
        ("topk", 3, {}),
        ("topk", 3, {"topk_across": "all_layers"}),
        ("batchtopk", 3, {"k_start": 20, "k_anneal_steps": 25}),
        ("batchtopk", 3, {"topk_across": "all_layers", "far_rank": 4}),
        ("jumprelu", 3, {"skip": True}),
        ("jumprelu", 1, {"straight_through": "threshold"}),
        ("relu", 2, {}),
    ],
)
def test_training_learns_the_mlps(model, tokens, make_config, activation: str, span: int, changes: dict) -> None:
    seen: list[TrainingProgress] = []
    cfg = make_config(
        **changes,
        activation=activation,
        span=span,
        training_tokens=64 * 100,
        lr_decay_steps=25,
        **({} if "topk" in activation else {"sparsity_coefficient": 0.1}),
    )
    run = CLTTrainingRunner(cfg, model=model, dataset=tokens, on_progress=seen.append)
    clt = run.run()
    assert [p.step for p in seen] == list(range(10, 101, 10))
    assert seen[-1].tokens == 64 * 100 and seen[-1].n_steps == 100
    assert seen[-1].losses["mse_loss"] < 0.5 * seen[0].losses["mse_loss"]
    assert ("sparsity_loss" in seen[0].losses) == ("topk" not in activation)
    metrics = run.record.metrics
    assert metrics.explained_variance > 0.6
    if cfg.k is not None:
        # Thresholds are set on 11 tokens here, and L0 is counted on 10.
        assert metrics.l0_mean_per_layer == pytest.approx(6, rel=0.3)
    by_score = activation == "batchtopk" or "topk_across" in changes
    assert clt.cfg.span == span and clt.cfg.activation == ("jumprelu" if by_score else activation)
    # The record is that of the CLT handed out, on raw activations.
    x, y = layer_io(model, tokens)
    error = (clt(x) - y).square().sum(dim=(0, 2)) / (y - y.mean(dim=0)).square().sum(dim=(0, 2))
    assert (1 - error).tolist() == pytest.approx(metrics.explained_variance_per_layer, abs=0.15)
    # One definition, here and in evaluations: each layer counts alike.
    assert metrics.explained_variance == pytest.approx(sum(metrics.explained_variance_per_layer) / 3, abs=1e-12)
    l0 = (clt.encode(x) > 0).double().sum(dim=-1).mean(dim=0)
    # The metrics are of 10 tokens where thresholds were set, and else of 21; here are all 480.
    assert float(l0.sum()) == pytest.approx(metrics.l0_sum_over_layers, rel=0.3 if by_score else 0.15)
    assert metrics.l0_mean_per_layer == pytest.approx(metrics.l0_sum_over_layers / 3)


def test_bridge_and_hooked_transformer_train_alike(tokens, make_config, tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = {"n_layer": 3, "n_embd": 16, "n_head": 2, "n_positions": 8, "vocab_size": 30}
    GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0)).save_pretrained(tmp_path / "gpt2")
    clts = [
        CLTTrainingRunner(
            make_config(model_name=str(tmp_path / "gpt2"), backend=backend, training_tokens=64 * 5),
            dataset=tokens,
        ).run()
        for backend in ("hooked", "bridge")
    ]
    for name, value in clts[0].state_dict().items():
        torch.testing.assert_close(clts[1].state_dict()[name], value, rtol=1e-2, atol=1e-2)


def test_sparsity_coefficient_lowers_l0(model, tokens, make_config) -> None:
    l0 = []
    for coefficient in (0.0, 3.0):
        cfg = make_config(activation="jumprelu", sparsity_coefficient=coefficient, training_tokens=64 * 150)
        run = CLTTrainingRunner(cfg, model=model, dataset=tokens)
        run.run()
        l0.append(run.record.metrics.l0_sum_over_layers)
    assert l0[1] < 0.6 * l0[0]


def test_l0_is_what_was_asked_for(model, tokens, make_config) -> None:
    cfg = make_config(activation="jumprelu", target_l0=5.0, training_tokens=64 * 250, lr_decay_steps=50)
    many = torch.randint(0, 30, (800, 8), generator=torch.Generator().manual_seed(7))
    run = CLTTrainingRunner(replace(cfg, n_eval_prompts=50), model=model, dataset=many)
    run.run()
    metrics = run.record.metrics
    # Thresholds are set on half of the held-out tokens, and L0 is counted on the other half, 175 tokens.
    assert metrics.l0_per_layer == pytest.approx([5.0] * 3, rel=0.1)
    assert len(metrics.l0_before_thresholds) == 3
    assert run.record.coefficients["sparsity"] not in (0.0, cfg.sparsity_coefficient)


def test_same_seed_gives_the_same_weights_and_leaves_random_numbers_alone(model, tokens, make_config) -> None:
    def train(seed: int) -> CrossLayerTranscoder:
        torch.rand(seed + 1)
        return CLTTrainingRunner(make_config(activation="jumprelu", seed=seed), model=model, dataset=tokens).run()

    one, again, other = train(1), train(1), train(2)
    for name, value in one.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    assert not torch.equal(one.W_enc, other.W_enc)
    state = torch.get_rng_state()
    CLTTrainingRunner(make_config(training_tokens=64), model=model, dataset=tokens).run()
    assert torch.equal(torch.get_rng_state(), state)


def test_output_is_a_native_clt_with_a_record(model, tokens, make_config, tmp_path: Path) -> None:
    cfg = make_config(output_path=str(tmp_path / "clt"), model_name="tiny", exclude_special_tokens=(3,))
    clt = CLTTrainingRunner(cfg, model=model, dataset=tokens).run()
    loaded = CrossLayerTranscoder.from_pretrained(tmp_path / "clt")
    assert loaded.cfg == clt.cfg
    assert (loaded.cfg.model_name, loaded.cfg.input_hook) == ("tiny", "hook_resid_mid")
    assert len(loaded.cfg.input_scale) == len(loaded.cfg.output_scale) == 3
    for name, value in clt.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    record = json.loads((tmp_path / "clt" / "training.json").read_text())
    assert CLTTrainingRunnerConfig.from_dict({**record["config"], "output_path": cfg.output_path}) == cfg
    assert str(tmp_path) not in json.dumps(record)
    assert record["tokens_seen"] == cfg.training_tokens
    assert record["sae_lens_version"] == sae_lens.__version__
    metrics = record["metrics"]
    assert metrics["l0_sum_over_layers"] == pytest.approx(sum(metrics["l0_per_layer"]))
    assert 0 <= metrics["dead_share"] <= 1 and metrics["dead_window_steps"] == 5 and metrics["n_tokens"] == 21
    assert list(tmp_path.iterdir()) == [tmp_path / "clt"]


@pytest.mark.parametrize("activation", ["jumprelu", "topk"])
@pytest.mark.parametrize(
    "precision",
    [{"dtype": "float64"}, {"autocast": True}, {"dtype": "bfloat16"}],
    ids=["float64", "autocast", "bfloat16"],
)
def test_every_precision_trains(model, tokens, make_config, activation: str, precision: dict) -> None:
    sparsity = {} if activation == "topk" else {"sparsity_coefficient": 0.1}
    cfg = make_config(activation=activation, training_tokens=64 * 100, **sparsity, **precision)
    run = CLTTrainingRunner(cfg, model=model, dataset=tokens)
    assert run.run().W_enc.dtype == getattr(torch, cfg.dtype)
    assert run.record.metrics.explained_variance > 0.5


@pytest.mark.parametrize("which", ["output_path", "checkpoint_path"])
def test_folder_with_something_in_it_is_refused_before_any_work(
    tokens, make_config, tmp_path: Path, which: str, monkeypatch
) -> None:
    def no_work(*args: object, **kwargs: object) -> None:
        pytest.fail("the model was loaded")

    monkeypatch.setattr(runner, "load_model", no_work)
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(OutputNotEmpty, match="is not empty"):
        CLTTrainingRunner(make_config(model_name="tiny", **{which: str(tmp_path)}), dataset=tokens).run()
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_nothing_is_written_when_training_breaks_off(model, tokens, make_config, tmp_path: Path, error: type) -> None:
    def stop(progress: TrainingProgress) -> None:
        raise error

    cfg = make_config(output_path=str(tmp_path / "clt"))
    with pytest.raises(error):
        CLTTrainingRunner(cfg, model=model, dataset=tokens, on_progress=stop).run()
    assert not list(tmp_path.iterdir())


def test_nothing_is_written_when_saving_breaks_off(model, tokens, make_config, tmp_path: Path, monkeypatch) -> None:
    def full(*args: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(runner.json, "dumps", full)
    monkeypatch.setattr(runner.tempfile, "gettempdir", lambda: str(tmp_path))
    with pytest.raises(OSError, match="no space left"):
        CLTTrainingRunner(make_config(output_path=str(tmp_path / "clt")), model=model, dataset=tokens).run()
    assert not list(tmp_path.iterdir())


def test_bad_runs_are_refused_before_anything_is_written(model, tokens, make_config, tmp_path: Path) -> None:
    output = str(tmp_path / "clt")
    with pytest.raises(HookNotFound, match="Nearest"):
        cfg = make_config(input_hook="hook_resid_midd", output_path=output)
        CLTTrainingRunner(cfg, model=model, dataset=tokens).run()
    with pytest.raises(DatasetError, match="does not exist"):
        cfg = make_config(dataset_path="/no/such/text.txt", output_path=output)
        CLTTrainingRunner(cfg, model=model).run()
    with pytest.raises(ConfigError, match="there is no model"):
        CLTTrainingRunner(make_config(), dataset=tokens)
    with pytest.raises(ConfigError, match="there is no dataset"):
        CLTTrainingRunner(make_config(), model=model)
    assert not list(tmp_path.iterdir())


def test_saelens_lambda_ramp_ends_at_the_coefficient(model, tokens, make_config, monkeypatch) -> None:
    trainers = []

    class Spy(CLTTrainer):
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **kwargs)
            trainers.append((self, self.get_coefficients()["sparsity"]))

    monkeypatch.setattr(runner, "CLTTrainer", Spy)
    cfg = make_config(activation="relu", sparsity_coefficient=0.7)
    CLTTrainingRunner(cfg, model=model, dataset=tokens).run()
    trainer, at_start = trainers[0]
    assert at_start == 0 and trainer.get_coefficients()["sparsity"] == pytest.approx(0.7)
    assert trainer.cfg.total_training_steps == trainer.n_training_steps == 40


def test_dead_share_counts_features_silent_for_the_window(model, tokens, make_config) -> None:
    # k = 1 of 60 at a learning rate of almost nothing: what never wins stays silent.
    cfg = make_config(k=1, lr=1e-9, d_transcoder=60)
    run = CLTTrainingRunner(cfg, model=model, dataset=tokens)
    clt = run.run()
    x, _ = layer_io(model, tokens)
    never = (clt.encode(x) > 0).flatten(1).sum(dim=0) == 0
    assert run.record.metrics.dead_share_in_training == pytest.approx(float(never.double().mean()), abs=0.02)
    assert run.record.metrics.dead_share >= run.record.metrics.dead_share_in_training > 0


@pytest.mark.parametrize("activation", ["relu", "jumprelu", "topk", "batchtopk"])
def test_a_run_begins_with_a_clt(model, tokens, make_config, tmp_path: Path, activation: str, monkeypatch) -> None:
    cfg = make_config(activation=activation, dtype="float64", output_path=str(tmp_path / "first"))
    first = CLTTrainingRunner(cfg, model=model, dataset=tokens)
    clt = first.run()
    # On other data, whose scales are others.
    cfg = replace(cfg, output_path=None, init_from=str(tmp_path / "first"), seqpos_slice=(4, None), lr_warm_up_steps=3)
    with monkeypatch.context() as patched:
        patched.setattr(CLTTrainer, "fit", lambda self: None)
        begun = CLTTrainingRunner(cfg, model=model, dataset=tokens).run()
    for name, value in clt.state_dict().items():
        torch.testing.assert_close(begun.state_dict()[name], value, rtol=1e-12, atol=1e-14, msg=name)
    second = CLTTrainingRunner(replace(cfg, seqpos_slice=(None,)), model=model, dataset=tokens)
    trained = second.run()
    assert not torch.allclose(trained.W_enc, clt.W_enc, rtol=1e-3)
    assert second.record.metrics.explained_variance > first.record.metrics.explained_variance - 0.05
    assert second.record.config["init_from"] == str(tmp_path / "first")
    with pytest.raises(ConfigError, match="which has d_transcoder 24, but this run has 25: give d_transcoder=24"):
        CLTTrainingRunner(replace(cfg, d_transcoder=25), model=model, dataset=tokens).run()
    with pytest.raises(FormatError, match="nowhere"):
        CLTTrainingRunner(replace(cfg, init_from=str(tmp_path / "nowhere")), model=model, dataset=tokens).run()
