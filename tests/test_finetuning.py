"""`finetune`: its terms against finite differences and by hand, and what it leaves alone."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerConfig

from tests.models import COMMON, Model, random_tokens, randomise, snapshot, tiny_clt, tiny_hooked
from tl_clt import CrossLayerTranscoder, CrossLayerTranscoderConfig, attach, evaluate, feature_acts, finetune
from tl_clt.benchmark.hops import neurons_as_transcoder
from tl_clt.errors import AlreadyAttached, CLTMismatch, ConfigError, DatasetError, NotFinite, PromptError
from tl_clt.finetuning import (
    FinetuningInterrupted,
    FinetuningStep,
    LiveTranscoder,
    TermWeights,
    _Terms,
    counted,
    loss_terms,
    run_clean,
    start_from,
)
from tl_clt.lens import block_hook
from tl_clt.organisms import load_circuit
from tl_clt.replacement import replaced
from tl_clt.training.clt import TrainingCLT
from tl_clt.training.data.batches import ActivationScale
from tl_clt.transcoder.decoders import DenseDecoders

ADDED = ("kl", "downstream", "jacobian", "across")
PLAIN = {"sparsity": 0.0, "dead_feature": 0.0}


def relu_model(normalization: str | None) -> HookedTransformer:
    """A random model of plain ReLU neurons in float64."""
    settings = {**COMMON, "act_fn": "relu", "normalization_type": normalization, "dtype": torch.float64, "seed": 0}
    model = HookedTransformer(HookedTransformerConfig(**settings))
    randomise(model, 0)
    return model.eval()


def neurons(model: HookedTransformer, input_hook: str) -> CrossLayerTranscoder:
    """The model's neurons as a per-layer transcoder, which is exact."""
    cfg = CrossLayerTranscoderConfig(
        n_layers=model.cfg.n_layers,
        d_model=model.cfg.d_model,
        d_transcoder=model.cfg.d_mlp,
        span=1,
        activation="relu",
        input_hook=input_hook,
        dtype="float64",
    )
    mlps = [block.mlp for block in model.blocks]
    clt = CrossLayerTranscoder(cfg, DenseDecoders([mlp.W_out.detach()[:, None].clone() for mlp in mlps]))
    with torch.no_grad():
        clt.W_enc.copy_(torch.stack([mlp.W_in for mlp in mlps]))
        clt.b_enc.copy_(torch.stack([mlp.b_in for mlp in mlps]))
        clt.b_dec.copy_(torch.stack([mlp.b_out for mlp in mlps]))
    return clt.requires_grad_(False)


def ranked_alike(clt: CrossLayerTranscoder) -> CrossLayerTranscoder:
    """The same with decoders of norm 1 and no scaling, as a topk CLT comes out of training."""
    with torch.no_grad():
        for source in clt.layers:
            clt.W_dec[source].div_(clt.W_dec[source].flatten(1).norm(dim=1)[:, None, None])
    ones = (1.0,) * clt.cfg.n_layers
    clt.cfg = replace(clt.cfg, input_scale=ones, output_scale=ones)
    return clt


def clt_of(model: Model, activation: str, **settings) -> CrossLayerTranscoder:
    clt = tiny_clt(model, activation=activation, **settings)
    return ranked_alike(clt) if activation == "topk" else clt


def measured(
    model: Model, clt: CrossLayerTranscoder, tokens: Tensor, *, pos: int | None = None, seed: int = 0, n: int = 1
) -> dict[str, float]:
    """Every term of a CLT's loss, with weight 1."""
    trained = start_from(model, clt, list(tokens), len(tokens), pos)
    weights, generator = TermWeights(1.0, 1.0, 1.0, 1.0), torch.Generator().manual_seed(seed)
    losses, _ = loss_terms(model, trained, tokens, weights, pos, PLAIN, n, generator)
    return {name.removesuffix("_loss"): value.item() for name, value in losses.items()}


# -- what the terms are


@pytest.mark.parametrize(("normalization", "input_hook"), [(None, "hook_resid_mid"), ("LN", "mlp.hook_in")])
def test_terms_are_0_for_a_transcoder_that_is_the_mlps(normalization, input_hook):
    model = relu_model(normalization)
    tokens = random_tokens(model, batch=3)
    exact, chance = measured(model, neurons(model, input_hook), tokens), measured(model, tiny_clt(model), tokens)
    # KL is rounding, the others squares of it.
    assert abs(exact["kl"]) < 1e-13
    assert all(exact[name] < 1e-20 for name in ("mse", "downstream", "jacobian", "across"))
    assert all(chance[name] > 1e-2 for name in ("mse", *ADDED))


def test_terms_are_0_for_the_neurons_of_a_known_circuit():
    circuit = load_circuit("parity")
    with torch.no_grad():
        # Compiled neurons lie on their kinks, where rounding decides what a derivative is: off them.
        for block in circuit.model.blocks:
            block.mlp.b_in += 0.01
    found = measured(circuit.model, neurons_as_transcoder(circuit), circuit.prompts, pos=circuit.answer_position)
    assert all(abs(found[name]) < 1e-8 for name in ADDED)


def test_kl_is_that_of_evaluate_and_downstream_the_error_of_a_replaced_run(one_of_each):
    model = one_of_each
    clt, tokens = tiny_clt(model), random_tokens(model, batch=2, pos=6)
    trained = start_from(model, clt, list(tokens), 2, None)
    found = measured(model, clt, tokens)
    assert found["kl"] == pytest.approx(evaluate(model, clt, tokens, n_graphs=0, progress=False).kl_divergence)
    written = {}
    last = clt.cfg.n_layers - 1
    outputs = [block_hook(layer, "hook_mlp_out") for layer in clt.layers]
    _, clean = model.run_with_cache(tokens, names_filter=lambda name: name in outputs)
    with torch.no_grad(), replaced(model, clt):
        _, cache = model.run_with_cache(tokens, names_filter=lambda name: name.endswith("clt.hook_recons"))
        written = {layer: cache[f"blocks.{layer}.clt.hook_recons"] for layer in range(last + 1)}
    expected = 0.0
    for layer, name in enumerate(outputs):
        error = (written[layer] - clean[name])[:, 1:] * trained.cfg.output_scale[layer]
        expected += float(error.square().sum(dim=-1).mean())
    assert found["downstream"] == pytest.approx(expected)


def test_jacobian_terms_are_finite_differences_of_whole_runs(one_of_each):
    """What MLPs, and the CLT, write where the inputs of a layer are moved a little, against the model and against the
    local replacement model, both run with hooks alone."""
    model, step = one_of_each, 1e-6
    # A bridge's attention takes its softmax in float32, whose rounding a small step makes large.
    close = 1e-5 if isinstance(model, HookedTransformer) else 2e-3
    clt, tokens = tiny_clt(model, activation="relu"), random_tokens(model, batch=2, pos=5)
    trained, layers = start_from(model, clt, list(tokens), 2, None), range(3)
    terms, directions = terms_of(model, trained, tokens), []
    draw = terms._direction
    terms._direction = lambda *args: directions.append(draw(*args)) or directions[-1]  # type: ignore[method-assign]

    def written(layer: int, v: Tensor, size: float, mode: str | None) -> list[Tensor]:
        hooks = [(block_hook(layer, clt.cfg.input_hook), lambda x, hook: x + size * v)]
        name = "hook_mlp_out" if mode is None else "clt.hook_recons"
        found: dict[int, Tensor] = {}
        hooks += [(block_hook(t, name), lambda x, hook, t=t: found.__setitem__(t, x.detach())) for t in layers]
        if mode is None:
            model.run_with_hooks(tokens, fwd_hooks=hooks)
        else:
            with attach(model, clt, mode):
                model.run_with_hooks(tokens, fwd_hooks=hooks)
        return [found[t] for t in layers]

    def change(layer: int, v: Tensor, mode: str | None) -> list[Tensor]:
        up, down = written(layer, v, step, mode), written(layer, v, -step, mode)
        return [(a - b) / (2 * step) for a, b in zip(up, down, strict=True)]

    def error(t: int, one: Tensor, other: Tensor) -> float:
        return float(((one - other)[:, 1:] * trained.cfg.output_scale[t]).square().sum(dim=-1).mean())

    with torch.no_grad():
        same = float(terms.jacobian(torch.Generator().manual_seed(1)))
        moved = [(change(s, v, None)[s], change(s, v, "observe")[s]) for s, v in enumerate(directions)]
        # Observed, features of layer s alone are moved, so that the sum of writes into it changes by their own.
        assert same == pytest.approx(sum(error(s, *pair) for s, pair in enumerate(moved)), rel=1e-5)
        directions.clear()
        across = float(terms.across(torch.Generator().manual_seed(3)))
        layer = int(torch.randint(2, (), generator=torch.Generator().manual_seed(3)))
        truth, found = (change(layer, directions[0], mode) for mode in (None, "replace_with_error"))
        assert across == pytest.approx(sum(error(t, truth[t], found[t]) for t in layers[layer + 1 :]), rel=close)


def terms_of(model: Model, trained: TrainingCLT, tokens: Tensor) -> _Terms:
    scale = ActivationScale(trained.cfg.input_scale, trained.cfg.output_scale)
    clean = run_clean(model, trained, tokens)
    return _Terms(model, LiveTranscoder(trained), tokens, clean, counted(tokens.shape[1], None), scale)


@pytest.mark.parametrize(
    ("activation", "term"), [*(("relu", term) for term in ADDED), ("topk", "kl"), ("topk", "jacobian")]
)
def test_gradients_are_finite_differences(activation, term):
    model, step = tiny_hooked("gpt2"), 1e-6
    clt, tokens = clt_of(model, activation, d_transcoder=10), random_tokens(model, pos=5)
    trained = start_from(model, clt, list(tokens), 1, None)
    weights = TermWeights(**{term: 1.0})

    def loss() -> Tensor:
        found, _ = loss_terms(model, trained, tokens, weights, None, PLAIN, 2, torch.Generator().manual_seed(0))
        return found[f"{term}_loss"]

    kinds: dict[str, list[Tensor]] = {}
    for name, parameter in trained.named_parameters():
        kinds.setdefault(name.split(".")[0], []).append(parameter)
    together = [parameter for some in kinds.values() for parameter in some]
    gradients = dict(zip(together, torch.autograd.grad(loss(), together, allow_unused=True), strict=True))
    drawn = torch.Generator().manual_seed(5)
    for name, some in kinds.items():
        directions = [torch.randn(p.shape, generator=drawn, dtype=p.dtype) for p in some]
        values = []
        with torch.no_grad():
            for size in (step, -2 * step, step):
                for p, direction in zip(some, directions, strict=True):
                    p.add_(direction, alpha=size)
                values.append(float(loss()))
        pairs = [(gradients[p], d) for p, d in zip(some, directions, strict=True) if gradients[p] is not None]
        found = sum(float((gradient * d).sum()) for gradient, d in pairs)
        # The loss is of the order of 100, so that its differences round at 1e-8.
        assert found == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-4, abs=1e-6), name


# -- what training with them does


@pytest.mark.parametrize("term", ADDED)
def test_each_term_falls(term):
    model = tiny_hooked("gpt2", torch.float32)
    clt, tokens = clt_of(model, "topk", dtype=torch.float32), random_tokens(model, batch=4, pos=6)
    tuned = finetune(model, clt, tokens, **{term: 1.0}, n_steps=8, lr=2e-2, progress=False)
    before, after = measured(model, clt, tokens, n=4), measured(model, tuned, tokens, n=4)
    assert after[term] < 0.8 * before[term] and after["mse"] < before["mse"]


@pytest.mark.parametrize("span", [1, 2, 3])
@pytest.mark.parametrize("activation", ["relu", "jumprelu", "topk", "batchtopk"])
def test_no_steps_give_the_same_clt(activation, span):
    model = tiny_hooked("llama")
    clt = clt_of(model, activation, span=span, skip=span == 2)
    tuned = finetune(model, clt, random_tokens(model, batch=4), n_steps=0)
    assert tuned.cfg == clt.cfg and tuned is not clt
    for (name, one), (_, other) in zip(tuned.named_parameters(), clt.named_parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12, check_dtype=True, msg=name)


def test_active_features_stay_as_many_or_become_fewer_with_a_penalty():
    model = tiny_hooked("gpt2", torch.float32)
    tokens, options = random_tokens(model, batch=16, pos=8), {"lr": 2e-2, "progress": False}
    # A random CLT writes so much at random that fewer features are always better: some training goes before.
    start = tiny_clt(model, activation="batchtopk", span=1, dtype=torch.float32)
    clt = finetune(model, start, tokens, sparsity=0.3, n_steps=60, **options)
    clt.cfg = replace(clt.cfg, scan="a database of other features")
    held = finetune(model, clt, tokens, kl=10.0, n_steps=40, **options)
    fewer = finetune(model, clt, tokens, sparsity=30.0, n_steps=20, **options)
    assert held.cfg == fewer.cfg == replace(clt.cfg, scan=None)
    before, after, penalised = (evaluate(model, one, tokens, n_graphs=0, progress=False) for one in (clt, held, fewer))
    assert after.kl_divergence < before.kl_divergence
    assert after.l0_per_layer == pytest.approx(before.l0_per_layer, rel=0.15)
    assert sum(penalised.l0_per_layer) < 0.8 * sum(before.l0_per_layer)
    assert not torch.equal(held.threshold, clt.threshold)


def test_topk_keeps_its_k():
    model = tiny_hooked("gpt2", torch.float32)
    clt, tokens = clt_of(model, "topk", span=1, dtype=torch.float32), random_tokens(model, batch=8, pos=8)
    tuned = finetune(model, clt, tokens, kl=10.0, n_steps=10, lr=1e-2, progress=False)
    assert tuned.cfg == clt.cfg and tuned.cfg.k == 4
    assert int((feature_acts(model, tuned, tokens) != 0).sum(dim=-1).max()) == 4


def test_one_position_alone_counts():
    model = tiny_hooked("gpt2")
    clt, tokens = clt_of(model, "topk"), random_tokens(model, batch=4, pos=6)
    changed = tokens.clone()
    changed[:, 4:] = 5
    at_3 = [finetune(model, clt, t, kl=1.0, jacobian=1.0, pos=3, n_steps=3) for t in (tokens, changed)]
    torch.testing.assert_close(at_3[0].W_enc, at_3[1].W_enc, rtol=1e-9, atol=1e-9)
    last = finetune(model, clt, tokens, kl=1.0, jacobian=1.0, pos=-1, n_steps=3)
    assert not torch.allclose(at_3[0].W_enc, last.W_enc, rtol=1e-6, atol=1e-6)
    assert counted(4, None).tolist() == [1, 2, 3] and counted(4, -1).tolist() == [3]
    assert [counted(4, pos).tolist() for pos in (0, -4, 4, -5)] == [[], [], [], []]


# -- what it leaves alone


def test_model_and_clt_are_as_before(model):
    clt, tokens = tiny_clt(model), random_tokens(model, batch=2, pos=5)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    own = {name: p.clone() for name, p in clt.named_parameters()}
    with torch.no_grad():
        model(tokens)
        before = snapshot(model)
        tuned = finetune(model, clt, tokens, kl=1.0, downstream=1.0, jacobian=1.0, across=1.0, n_steps=1)
        after = snapshot(model)
    for key in before:
        assert after[key] == before[key], key
    assert all(torch.equal(p, weights[name]) and p.grad is None for name, p in model.named_parameters())
    assert all(torch.equal(p, own[name]) and not p.requires_grad for name, p in clt.named_parameters())
    assert not torch.equal(tuned.W_enc, clt.W_enc)


def test_users_hooks_have_no_part_and_stay():
    model = tiny_hooked("gpt2", torch.float32)
    clt, tokens = clt_of(model, "topk", dtype=torch.float32), random_tokens(model, batch=2, pos=5)
    options = {"kl": 1.0, "downstream": 1.0, "jacobian": 1.0, "across": 1.0, "n_steps": 1}
    plain = finetune(model, clt, tokens, **options)
    model.hook_dict["blocks.1.hook_mlp_out"].add_hook(lambda x, hook: 3 * x)
    hooked = finetune(model, clt, tokens, **options)
    assert torch.equal(plain.W_enc, hooked.W_enc)
    assert len(model.hook_dict["blocks.1.hook_mlp_out"].fwd_hooks) == 1


def test_the_seed_alone_decides():
    model = tiny_hooked("gpt2", torch.float32)
    clt = clt_of(model, "topk", dtype=torch.float32)
    prompts = [random_tokens(model, pos=n, seed=n)[0] for n in (4, 5, 5, 6, 7, 7)]
    options = {"kl": 1.0, "across": 1.0, "n_steps": 3, "batch_size": 2}
    one = finetune(model, clt, prompts, **options)
    torch.manual_seed(5)
    assert torch.equal(one.W_enc, finetune(model, clt, prompts, **options).W_enc)
    assert not torch.equal(one.W_enc, finetune(model, clt, prompts, **options, seed=1).W_enc)


def test_a_loss_that_is_no_number_stops_with_step_and_cause():
    model = tiny_hooked("gpt2", torch.float32)
    clt, tokens = clt_of(model, "topk", dtype=torch.float32), random_tokens(model, batch=2)
    with pytest.raises(NotFinite, match=r"step [2-9] of 20: .* is (nan|inf).*Lower lr \(now 1e\+30\)"):
        finetune(model, clt, tokens, kl=1.0, n_steps=20, lr=1e30)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"kl": -1.0}, ConfigError, "kl is -1: give 0 or more"),
        ({"jacobian": float("nan")}, ConfigError, "jacobian is nan"),
        ({"n_directions": 0}, ConfigError, "n_directions is 0"),
        ({"n_steps": -1}, ConfigError, "n_steps is -1"),
        ({"lr": 0}, ConfigError, "lr is 0"),
        ({"batch_size": 0}, ConfigError, "batch_size is 0"),
        ({"sparsity": 1.0}, ConfigError, "keeps its k: leave it out"),
        ({"pos": 0}, ConfigError, "position 0 does not count: give 1 to 6"),
        ({"pos": 7}, ConfigError, "give 1 to 6, or -1"),
        ({"seed": "x"}, ConfigError, "seed is"),
        ({"prompts": []}, DatasetError, "no prompts to train on"),
        ({"prompts": [[0, 999]]}, PromptError, "999 is out of range"),
    ],
)
def test_bad_input_is_refused_before_any_work(as_users_run_it, changes, error, message):
    model = tiny_hooked("gpt2")
    values = {"prompts": random_tokens(model, batch=2), **changes}
    with pytest.raises(error, match=message):
        finetune(model, clt_of(model, "topk"), values.pop("prompts"), **values)


def test_a_clt_of_another_model_or_one_that_cannot_be_trained_is_refused(as_users_run_it):
    model, tokens = tiny_hooked("gpt2"), random_tokens(tiny_hooked("gpt2"), batch=2)
    with pytest.raises(CLTMismatch, match="5 layers"):
        finetune(model, tiny_clt((5, 32)), tokens)
    below = tiny_clt(model)
    below.threshold.data[0, 0] = -1.0
    with pytest.raises(ConfigError, match="thresholds below 0"):
        finetune(model, below, tokens)
    one = tiny_hooked("gpt2", n_layers=1)
    with pytest.raises(ConfigError, match="one layer"):
        finetune(one, tiny_clt(one), tokens, across=1.0)
    with attach(model, tiny_clt(model)), pytest.raises(AlreadyAttached):
        finetune(model, tiny_clt(model), tokens)


def test_the_command_does_not_lose_a_clt_that_cannot_be_written(tmp_path, monkeypatch):
    """The output's parent becomes a file while the CLT is trained."""
    from typer.testing import CliRunner

    from tl_clt.cli import app

    parent, spare = tmp_path / "parent", tmp_path / "spare"
    parent.mkdir(), spare.mkdir()

    def instead(model, clt, *arguments, **options):
        parent.rmdir()
        parent.write_text("in the way")
        return clt

    monkeypatch.setattr("tl_clt.finetuning.finetune", instead)
    monkeypatch.setattr("tempfile.tempdir", str(spare))
    arguments = ["finetune", "--clt", "atlas", "--dataset", "text.txt", "--output", str(parent / "tuned")]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "300", "TERM": "dumb"})
    [kept] = spare.iterdir()
    said = "".join(result.output.split())  # a long path is broken wherever the line ends
    assert result.exit_code == 1 and f"TheCLTisnotlost:itisin'{kept}'" in said
    again = CrossLayerTranscoder.from_pretrained(kept)
    assert again.fingerprint() == CrossLayerTranscoder.from_pretrained("atlas").fingerprint()
    record = json.loads((kept / "finetuning.json").read_text())
    assert record["dataset"] == "text.txt" and record["clt_fingerprint"] == again.fingerprint()
    assert record["settings"]["lr"] == 5e-4 and record["steps_done"] == 300


def test_ctrl_c_gives_what_was_trained_so_far(monkeypatch):
    model, told = tiny_hooked("gpt2", torch.float32), []
    clt, tokens = clt_of(model, "topk", dtype=torch.float32), random_tokens(model, batch=4, pos=6)

    def press_at_3(step: FinetuningStep) -> None:
        told.append(step)
        if step.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(FinetuningInterrupted, match="Ctrl-C after 3 steps") as stopped:
        finetune(model, clt, tokens, n_steps=9, lr=2e-2, progress=False, on_progress=press_at_3)
    assert stopped.value.n_done == 3 and [(one.step, one.n_steps) for one in told] == [(1, 9), (2, 9), (3, 9)]
    assert set(told[0].losses) == {"mse_loss"} and len(told[0].l0_per_layer) == model.cfg.n_layers
    assert measured(model, stopped.value.clt, tokens)["mse"] < measured(model, clt, tokens)["mse"]

    def press(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tl_clt.finetuning.loss_terms", press)
    with pytest.raises(KeyboardInterrupt) as at_once:
        finetune(model, clt, tokens, n_steps=9, progress=False)
    assert at_once.type is KeyboardInterrupt, "nothing was trained"


def test_the_command_keeps_what_was_trained_until_ctrl_c_and_how(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from tl_clt.cli import app
    from tl_clt.cli.interruption import interruption

    def stopped(model, clt, *arguments, on_progress, **options):
        on_progress(FinetuningStep(7, options["n_steps"], {"mse_loss": 2.5, "kl_loss": 0.5}, [8.0, 7.5, 8.0, 8.0]))
        raise FinetuningInterrupted(clt, 7)

    monkeypatch.setattr(interruption, "kept", interruption.kept)
    monkeypatch.setattr("tl_clt.finetuning.finetune", stopped)
    output, partial = tmp_path / "tuned", tmp_path / "tuned-interrupted"
    command = ["finetune", "--clt", "atlas", "--dataset", "text.txt", "--output", str(output), "--kl", "0.5"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code != 0 and not output.exists()
    assert interruption.kept() == f"The CLT as it was after 7 of 300 steps is in {partial}."
    assert CrossLayerTranscoder.from_pretrained(partial).cfg.d_transcoder == 256
    record = json.loads((partial / "finetuning.json").read_text())
    assert (record["model"], record["clt"], record["steps_done"]) == ("atlas", "atlas", 7)
    assert record["settings"]["kl"] == 0.5
    assert record["last_step"]["losses"] == {"mse_loss": 2.5, "kl_loss": 0.5}
    CliRunner().invoke(app, command)
    assert (tmp_path / "tuned-interrupted-2" / "finetuning.json").exists()
