"""`evaluate` against the same numbers written out by hand."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from importlib import import_module

import pytest
import torch
from rich.console import Console

from tests.models import Model, random_tokens, tiny_bridge, tiny_clt, tiny_hooked
from tl_clt import attach, evaluate
from tl_clt.errors import (
    AlreadyAttached,
    CLTMismatch,
    ConfigError,
    DatasetError,
    HookNotFound,
    LocalModelMismatch,
    MemoryLimit,
    ModelUnsupported,
    PromptError,
)
from tl_clt.evaluation import EvaluationReport, replaced
from tl_clt.evaluation.tradeoff import compare
from tl_clt.transcoder import CrossLayerTranscoder
from tl_clt.viewer.tables import evaluation_table

MODULE = import_module("tl_clt.evaluation.evaluate")
"""Where `evaluate` is; its name in the package is the function's."""
PROMPTS = [torch.tensor([0, 5, 9, 40, 2]), torch.tensor([0, 33, 12]), torch.tensor([0, 8, 8, 61, 30])]
N_TOKENS, N_NEXT = 10, 7


@pytest.fixture(scope="module")
def model():
    return tiny_hooked("llama", dtype=torch.float64)


@pytest.fixture(scope="module")
def clt(model):
    return tiny_clt(model)


@pytest.fixture(scope="module")
def report(model, clt):
    return evaluate(model, clt, PROMPTS, n_graphs=0)


class ByHand:
    """Inputs, outputs, activations and reconstructions of all tokens but the first of each prompt."""

    def __init__(self, model: Model, clt: CrossLayerTranscoder) -> None:
        inputs, outputs = [], []
        for prompt in PROMPTS:
            _, cache = model.run_with_cache(prompt[None])
            at = range(model.cfg.n_layers)
            inputs.append(torch.stack([cache[f"blocks.{t}.hook_resid_mid"][0, 1:] for t in at], dim=1))
            outputs.append(torch.stack([cache[f"blocks.{t}.hook_mlp_out"][0, 1:] for t in at], dim=1))
        x, self.y = torch.cat(inputs), torch.cat(outputs)
        self.acts, self.recons = clt.encode(x), clt(x)


@pytest.fixture(scope="module")
def by_hand(model, clt):
    return ByHand(model, clt)


def test_reconstruction(model, report, by_hand):
    y, error = by_hand.y, (by_hand.y - by_hand.recons).square().sum(dim=(0, 2))
    explained = 1 - error / (y - y.mean(dim=0)).square().sum(dim=(0, 2))
    assert report.explained_variance_per_layer == pytest.approx(explained.tolist())
    assert report.explained_variance == pytest.approx(float(explained.mean()))
    nmse = error / y.square().sum(dim=(0, 2))
    assert report.nmse_per_layer == pytest.approx(nmse.tolist())
    assert report.nmse == pytest.approx(float(nmse.mean()))


def test_sparsity(model, report, by_hand):
    active = by_hand.acts != 0
    assert report.l0_per_layer == pytest.approx(active.sum(dim=-1).double().mean(dim=0).tolist())
    assert report.l0_sum_over_layers == pytest.approx(report.l0_mean_per_layer * model.cfg.n_layers)
    assert (report.n_prompts, report.n_tokens) == (len(PROMPTS), N_TOKENS)
    dead = ~active.any(dim=0)
    assert 0 < report.dead_share == pytest.approx(float(dead.double().mean()))
    assert report.dead_share_per_layer == pytest.approx(dead.double().mean(dim=-1).tolist())
    density = active.double().mean(dim=0)
    for layer, counts in enumerate(report.density_counts):
        bins = zip(report.density_edges, report.density_edges[1:], strict=False)
        wanted = [int(((density[layer] >= low) & (density[layer] < high)).sum()) for low, high in bins]
        wanted[-1] += int((density[layer] == 1).sum())
        assert counts == wanted
        assert sum(counts) == int((~dead[layer]).sum())


def test_densities_below_the_first_edge_are_counted(monkeypatch):
    module = sys.modules["tl_clt.evaluation.evaluate"]
    monkeypatch.setattr(module, "DENSITY_EDGES", [0.5, 0.75, 1.0])
    counts = module._histogram(torch.tensor([0.1, 0.5, 0.74, 0.75, 1.0], dtype=torch.float64))
    assert counts == [3, 2]


def test_how_far_ahead_features_write(model, clt, report, by_hand):
    size = by_hand.y.square().sum(dim=-1).mean(dim=0).sqrt()
    norms, written = [[], [], []], [0.0, 0.0, 0.0]
    for source in range(3):
        mean_act = by_hand.acts[:, source].abs().mean(dim=0)
        for target in range(source, 3):
            norm = clt.W_dec[source][:, target - source].norm(dim=-1)
            norms[target - source].append(norm)
            written[target - source] += float((mean_act * norm).sum() / size[target])
    assert report.decoder_norm_by_distance == pytest.approx([float(torch.cat(n).mean()) for n in norms])
    assert report.written_share_by_distance == pytest.approx([w / sum(written) for w in written])


@torch.no_grad()
def replaced_by_hand(model, clt, tokens):
    """All MLPs replaced but at position 0, layer by layer, by hooks written out."""
    x = torch.zeros(len(tokens), model.cfg.n_layers, model.cfg.d_model, dtype=torch.float64)

    def read(tensor, hook):
        x[:, hook.layer()] = tensor[0]

    def write(tensor, hook):
        replaced_out = clt(x)[:, hook.layer()]
        return torch.cat([tensor[0, :1], replaced_out[1:]])[None]

    ends = (lambda n: n.endswith("hook_resid_mid"), lambda n: n.endswith("hook_mlp_out"))
    return model.run_with_hooks(tokens[None], fwd_hooks=[(ends[0], read), (ends[1], write)])[0]


@torch.no_grad()
def ablated_by_hand(model, tokens):
    def silence(tensor, hook):
        tensor[:, 1:] = 0
        return tensor

    return model.run_with_hooks(tokens[None], fwd_hooks=[(lambda n: n.endswith("hook_mlp_out"), silence)])[0]


@torch.no_grad()
@pytest.mark.parametrize("at_once", [1, 2**22])
def test_predictions(model, clt, monkeypatch, at_once):
    """Logits compared one row at a time or all at once."""
    monkeypatch.setattr(MODULE, "COMPARED_AT_ONCE", at_once)
    prompts = [tokens.clone() for tokens in PROMPTS]
    for tokens in prompts:  # let the model be right about two tokens of each prompt
        for pos in (1, 2)[: len(tokens) - 2]:
            tokens[pos + 1] = model(tokens[None])[0, pos].argmax()
    same, kl, n_uncertain, found, n_sure, losses = 0, 0.0, 0, 0, 0, torch.zeros(3)
    for tokens in prompts:
        wanted = replaced_by_hand(model, clt, tokens)
        with replaced(model, clt):
            torch.testing.assert_close(model(tokens[None])[0], wanted)
        p, q, none = (x.log_softmax(-1) for x in (model(tokens[None])[0], wanted, ablated_by_hand(model, tokens)))
        for pos in range(1, len(tokens)):
            same += int(p[pos].argmax() == q[pos].argmax())
            kl += float((p[pos].exp() * (p[pos] - q[pos])).sum())
            if pos + 1 < len(tokens):
                then = tokens[pos + 1]
                losses -= torch.stack([x[pos, then] for x in (p, q, none)])
                right, unsure = p[pos].argmax() == then, p[pos, then].exp() < 0.8
                n_uncertain += int(right & unsure)
                n_sure += int(right & ~unsure)
                found += int(right & unsure & (q[pos].argmax() == then))
    assert n_uncertain > 0 and n_sure > 0
    report = evaluate(model, clt, prompts, n_graphs=0)
    assert report.top1_agreement == pytest.approx(same / N_TOKENS)
    assert report.kl_divergence == pytest.approx(kl / N_TOKENS)
    assert (report.n_predicted, report.n_uncertain) == (N_NEXT, n_uncertain)
    assert report.top1_agreement_uncertain == pytest.approx(found / n_uncertain)
    model_loss, replaced_loss, ablated_loss = (losses / N_NEXT).tolist()
    assert report.cross_entropy == pytest.approx(model_loss)
    assert report.cross_entropy_replaced == pytest.approx(replaced_loss)
    assert report.cross_entropy_ablated == pytest.approx(ablated_loss)
    recovered = (ablated_loss - replaced_loss) / (ablated_loss - model_loss)
    assert report.cross_entropy_recovered == pytest.approx(recovered)


def test_batches_change_nothing_and_a_bridge_gives_the_same(tmp_path, clt):
    bridge = tiny_bridge("llama", tmp_path, exact=True)
    own = tiny_clt(bridge)
    prompts = random_tokens(bridge, batch=3, pos=6)
    together = evaluate(bridge, own, prompts, n_graphs=0)
    apart = [evaluate(bridge, own, [tokens], n_graphs=0) for tokens in prompts]
    for name in ("top1_agreement", "kl_divergence", "cross_entropy_replaced"):
        assert getattr(together, name) == pytest.approx(sum(getattr(r, name) for r in apart) / 3)
    assert together.n_tokens == sum(r.n_tokens for r in apart) == 15


def test_two_tokens_have_no_next_one(model, clt):
    report = evaluate(model, clt, [[0, 5], [0, 6]], n_graphs=0)
    assert (report.n_tokens, report.n_predicted) == (2, 0)
    assert report.cross_entropy is None and report.cross_entropy_recovered is None
    assert report.top1_agreement_uncertain is None


def test_the_text_is_read_no_further_than_max_tokens(model, clt):
    prompts = random_tokens(model, batch=20, pos=5)
    assert evaluate(model, clt, prompts, max_tokens=9, n_graphs=0).n_tokens == 12
    assert evaluate(model, clt, prompts, max_tokens=None, n_graphs=0).n_tokens == 80


ERRORS = [MemoryLimit, LocalModelMismatch, ModelUnsupported, MemoryError, torch.OutOfMemoryError]


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("n_traced", [0, 1])
def test_what_was_measured_is_kept_where_prompts_cannot_be_traced(
    model, clt, report, tmp_path, monkeypatch, error, n_traced
):
    traced, attribute = [], MODULE.attribute

    def until_it_fails(*args, **kwargs):
        if len(traced) == n_traced:
            raise error("This does not fit in [1 GiB].")
        traced.append(attribute(*args, **kwargs))
        return traced[-1]

    monkeypatch.setattr(MODULE, "attribute", until_it_fails)
    with pytest.warns(UserWarning, match="Graph scores will be missing, and all else is measured") as warned:
        found = evaluate(model, clt, PROMPTS, n_graphs=3)
    why = f"{n_traced} of 3 prompts were traced, then {error.__name__}: This does not fit in [1 GiB]."
    assert found.graphs_missing == why and why in str(warned[0].message) and len(found.graphs) == n_traced
    assert_alike(replace(found, graphs=[], graphs_missing=None), report)
    found.save(tmp_path / "out")
    assert EvaluationReport.from_json((tmp_path / "out" / "report.json").read_text()) == found
    assert (tmp_path / "out" / "graphs.png").exists() == bool(n_traced)
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(evaluation_table(found))
    assert why in console.export_text()
    traced.clear()
    with pytest.warns(UserWarning, match="Graph scores will be missing"):
        row = compare(model, PROMPTS, {"a": clt}, n_graphs=3).table.iloc[0]
    assert row["nmse"] == pytest.approx(report.nmse) and row[["replacement", "n_nodes"]].isna().all()


def test_what_is_wrong_with_text_or_tracing_is_known_before_the_long_part(model, clt, monkeypatch):
    order: list[str] = []

    def fails(*args, **kwargs):
        order.append("traced")
        raise MemoryLimit("mine")

    measuring = import_module("tl_clt.evaluation.evaluate")
    add_batch = measuring.add_batch
    monkeypatch.setattr(measuring, "add_batch", lambda *args: (order.append("measured"), add_batch(*args)))
    monkeypatch.setattr(MODULE, "attribute", fails)
    with pytest.raises(PromptError, match="out of range"):
        evaluate(model, clt, [[0, 5, 3], [0, 99]])
    assert order == []
    with pytest.warns(UserWarning, match="Graph scores will be missing"):
        evaluate(model, clt, [[0, 5, 3]], n_graphs=1)
    assert order == ["traced", "measured"]


def test_errors_that_are_not_of_memory_are_not_hidden(model, clt, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("a fault")

    monkeypatch.setattr(MODULE, "attribute", broken)
    with pytest.raises(RuntimeError, match="a fault"):
        evaluate(model, clt, PROMPTS, n_graphs=1)


def assert_alike(one: EvaluationReport, other: EvaluationReport) -> None:
    """Two evaluations need not round alike: sums of some hundred float64 terms."""
    a, b = one.to_dict(), other.to_dict()
    assert a.keys() == b.keys()
    for name, value in a.items():
        if isinstance(value, float) or (isinstance(value, list) and value and isinstance(value[0], float)):
            assert value == pytest.approx(b[name], rel=1e-9, abs=1e-12), name
        else:
            assert value == b[name], name


def test_reports_of_before_missing_graphs_were_told_are_read(report):
    values = json.loads(report.to_json())
    del values["graphs_missing"]
    assert EvaluationReport.from_json(json.dumps(values)) == report


def test_the_model_is_left_as_it_was(model, clt):
    before = model(PROMPTS[0][None])
    known = set(model.hook_dict)
    evaluate(model, clt, PROMPTS, n_graphs=1)
    assert torch.equal(model(PROMPTS[0][None]), before)
    assert set(model.hook_dict) == known


@pytest.mark.parametrize(
    ("prompts", "options", "error", "words"),
    [
        ([], {}, DatasetError, "no prompts"),
        (torch.zeros(0, 4, dtype=torch.long), {}, DatasetError, "no prompts"),
        (torch.zeros(4, dtype=torch.long), {}, DatasetError, "give ids \\[n_prompts, pos\\]"),
        ([[0]], {}, PromptError, "1 token long: give at least 2"),
        ([[0, 99]], {}, PromptError, "99 is out of range"),
        (PROMPTS, {"max_tokens": 0}, ConfigError, "max_tokens is 0"),
        (PROMPTS, {"n_graphs": -1}, ConfigError, "n_graphs is -1"),
        (PROMPTS, {"graph_tokens": 1}, ConfigError, "graph_tokens is 1"),
        (PROMPTS, {"context_size": 65}, ConfigError, "context_size is 65, but .* takes 2 to 64"),
    ],
)
def test_bad_input(model, clt, prompts, options, error, words):
    with pytest.raises(error, match=words):
        evaluate(model, clt, prompts, **options)


def test_a_clt_of_another_model_is_refused(model, clt):
    with pytest.raises(CLTMismatch, match="has 2 layers"):
        evaluate(model, tiny_clt((2, 32)), list(PROMPTS))
    with pytest.raises(HookNotFound, match="hook_mid"):
        evaluate(model, CrossLayerTranscoder(replace(clt.cfg, input_hook="hook_mid")), PROMPTS)
    with attach(model, clt), pytest.raises(AlreadyAttached):
        evaluate(model, clt, PROMPTS)
