"""`mlp.hook_in` and `mlp.hook_out` are the MLP module's own input and output, in every room, on either kind of model.

A HookedTransformer has no such hook points, so what is expected there is found with torch's own module hooks.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest
import torch
from torch import Tensor
from transformer_lens import HookedTransformer

from tests.attribution.helpers import assert_engines_agree
from tests.interventions.edges import assert_edges_are_effects
from tests.models import Model, random_tokens, snapshot, tiny_clt
from tests.training.conftest import config
from tl_clt import (
    CLTTrainingRunner,
    CrossLayerTranscoder,
    Intervention,
    NodeKind,
    attach,
    attribute,
    evaluate,
    intervene,
    intervention_hooks,
    validate,
)
from tl_clt.errors import ModelUnsupported
from tl_clt.lens import mlp_hook_points

TOKENS = torch.tensor([0, 7, 19, 4, 33, 50, 21])
PLACES = [("mlp.hook_in", "hook_mlp_out"), ("mlp.hook_in", "mlp.hook_out")]
IDS = ["in to hook_mlp_out", "in to out"]
CLOSE = {"rtol": 1e-9, "atol": 1e-9}
"""float64 sums of a few hundred terms, in another order: 1e-13; bridges' norms keep some of float32's rounding."""

Edit = Callable[[Tensor, int], Tensor]


def unchanged(acts: Tensor, layer: int) -> Tensor:
    return acts


def set_feature(acts: Tensor, layer: int) -> Tensor:
    if layer != 1:
        return acts
    acts = acts.clone()
    acts[..., 3] = 5.0
    return acts


class ByHand:
    """Inputs and outputs of every MLP, and logits of the replacement model, by module hooks."""

    def __init__(self, model: Model, clt: CrossLayerTranscoder) -> None:
        self.model, self.clt = model, clt
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []

    @contextmanager
    def watching(self, write: Callable[[int], Tensor] | None = None) -> Iterator[None]:
        """Note every MLP's input and what it puts at the CLT's output hook; put `write(layer)` there instead."""
        self.inputs, self.outputs = [], []
        post = self.clt.cfg.output_hook == "hook_mlp_out"

        def output(out: Tensor) -> Tensor:
            self.outputs.append(out)
            return out if write is None else write(len(self.outputs) - 1)

        with ExitStack() as undo:
            fwd_hooks = []
            for t in range(self.model.cfg.n_layers):
                if isinstance(self.model, HookedTransformer):
                    mlp = self.model.blocks[t].mlp
                    read = mlp.register_forward_pre_hook(lambda _, args: self.inputs.append(args[0]))
                    undo.callback(read.remove)
                    if not post:
                        undo.callback(mlp.register_forward_hook(lambda _, args, out: output(out)).remove)
                else:
                    fwd_hooks.append((f"blocks.{t}.mlp.hook_in", lambda x, hook: self.inputs.append(x)))
                    if not post:
                        fwd_hooks.append((f"blocks.{t}.mlp.hook_out", lambda x, hook: output(x)))
                if post:
                    fwd_hooks.append((f"blocks.{t}.hook_mlp_out", lambda x, hook: output(x)))
            undo.enter_context(self.model.hooks(fwd_hooks=fwd_hooks))
            yield

    @torch.no_grad()
    def clean(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, inputs and outputs [batch, pos, n_layers, d_model] of the model as it is."""
        with self.watching():
            logits = self.model(tokens)
        return logits, torch.stack(self.inputs, dim=-2), torch.stack(self.outputs, dim=-2)

    @torch.no_grad()
    def replaced(self, tokens: Tensor, errors: Tensor | None = None, edit: Edit = unchanged) -> Tensor:
        """Logits with `decode(edit(encode(inputs))) + errors` in place of what the MLPs put there."""

        def write(layer: int) -> Tensor:
            x = torch.zeros(*tokens.shape, self.clt.cfg.n_layers, self.clt.cfg.d_model, dtype=torch.float64)
            x[..., : layer + 1, :] = torch.stack(self.inputs, dim=-2)
            acts = self.clt.encode(x)
            acts = torch.stack([edit(acts[..., s, :], s) for s in self.clt.layers], dim=-2)
            recons = self.clt.decode(acts, x)[..., layer, :]
            return recons if errors is None else recons + errors[..., layer, :]

        with self.watching(write):
            return self.model(tokens)


@pytest.fixture(params=PLACES, ids=IDS)
def places(request: pytest.FixtureRequest) -> dict[str, str]:
    return dict(zip(("input_hook", "output_hook"), request.param, strict=True))


def test_the_points_are_the_modules_own_input_and_output(model: Model, tokens: Tensor):
    by_hand = ByHand(model, tiny_clt(model, input_hook="mlp.hook_in", output_hook="mlp.hook_out"))
    _, inputs, outputs = by_hand.clean(tokens)
    with mlp_hook_points(model), mlp_hook_points(model):
        _, cache = model.run_with_cache(tokens)
    for t in range(model.cfg.n_layers):
        assert torch.equal(cache[f"blocks.{t}.mlp.hook_in"], inputs[..., t, :])
        assert torch.equal(cache[f"blocks.{t}.mlp.hook_out"], outputs[..., t, :])
        if f"blocks.{t}.ln2.hook_normalized" in cache:
            # Before gain and bias: another tensor.
            assert (cache[f"blocks.{t}.ln2.hook_normalized"] - inputs[..., t, :]).abs().max() > 1e-2


@pytest.mark.parametrize("options", [{}, {"span": 1, "skip": True}], ids=str)
def test_attach_as_by_hand_and_leaving_no_trace(model: Model, tokens: Tensor, places: dict, options: dict):
    clt = tiny_clt(model, **places, **options)
    by_hand = ByHand(model, clt)
    logits, inputs, outputs = by_hand.clean(tokens)
    errors = outputs - clt(inputs)
    before = snapshot(model)
    edit = [("blocks.1.clt.hook_acts_post", lambda acts, hook: set_feature(acts, 1))]
    with torch.no_grad():
        with attach(model, clt, "observe"):
            seen, cache = model.run_with_cache(tokens)
        with attach(model, clt, "replace"):
            replaced = model(tokens)
        with attach(model, clt, "replace_with_error"):
            same = model(tokens)
            edited = model.run_with_hooks(tokens, fwd_hooks=edit)
    assert snapshot(model) == before
    # Promised to the bit: attaching changes nothing that the model computes.
    assert torch.equal(seen, logits) and torch.equal(same, logits)
    for t in clt.layers:
        torch.testing.assert_close(cache[f"blocks.{t}.clt.hook_in"], inputs[..., t, :], **CLOSE)
        torch.testing.assert_close(cache[f"blocks.{t}.clt.hook_error"], errors[..., t, :], **CLOSE)
    torch.testing.assert_close(replaced, by_hand.replaced(tokens), **CLOSE)
    torch.testing.assert_close(edited, by_hand.replaced(tokens, errors, set_feature), **CLOSE)
    assert (edited - logits).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("engine", "bos", "options"),
    [
        # Of one engine each: that the two agree is tested below.
        ("sweep", "error", {}),
        ("autograd", "features", {"span": 2, "skip": True}),
    ],
    ids=str,
)
def test_in_edges_sum_to_pre_activation_and_logit(model: Model, places: dict, bos: str, options: dict, engine: str):
    clt = tiny_clt(model, **places, **options)
    graph = attribute(model, clt, TOKENS, bos=bos, engine=engine)
    assert graph.info["engine"] == engine
    logits, inputs, _ = ByHand(model, clt).clean(TOKENS[None])
    nodes, sums = graph.nodes, graph.adjacency.sum(dim=1)
    features, ends = nodes.where(NodeKind.FEATURE), nodes.where(NodeKind.LOGIT)
    assert len(features) > 20
    x = inputs[0, nodes.pos[features], nodes.layer[features]]
    wanted = (x * clt.W_enc[nodes.layer[features], :, nodes.index[features]]).sum(dim=-1)
    torch.testing.assert_close(sums[features], wanted, **CLOSE)
    last = logits[0, -1]
    torch.testing.assert_close(sums[ends], last[nodes.index[ends]] - last.mean(), **CLOSE)


def test_the_sweep_gives_what_autograd_gives(model: Model, places: dict):
    for options, bos in (({}, "drop"), ({"skip": True}, "error"), ({"span": 1, "skip": True}, "features")):
        assert_engines_agree(model, tiny_clt(model, **places, **options), bos=bos)


@pytest.mark.parametrize("skip", [False, True])
def test_doubling_any_node_moves_every_other_by_its_edge(model: Model, places: dict, skip: bool):
    clt = tiny_clt(model, **places, skip=skip)
    assert_edges_are_effects(model, clt, attribute(model, clt, TOKENS))


def test_plain_hooks_anywhere_do_what_the_attached_clt_does(model: Model, tokens: Tensor, places: dict):
    clt = tiny_clt(model, **places)
    _, inputs, outputs = ByHand(model, clt).clean(tokens)
    expected = ByHand(model, clt).replaced(tokens, outputs - clt(inputs), set_feature)
    change = [Intervention(layer=1, pos=None, feature=3, value=5.0)]
    hooks = intervention_hooks(model, clt, tokens, change, freeze="none")
    before = snapshot(model)
    with torch.no_grad():
        steered = model.run_with_hooks(tokens, fwd_hooks=hooks)
        with attach(model, clt, "replace_with_error"):
            inside = intervention_hooks(model, clt, tokens, change, freeze="none")
            within = model.run_with_hooks(tokens, fwd_hooks=inside)
    del inside
    gc.collect()
    assert {k: v for k, v in snapshot(model).items() if k != "attributes"} == {
        k: v for k, v in before.items() if k != "attributes"
    }
    torch.testing.assert_close(steered, expected, **CLOSE)
    torch.testing.assert_close(within, expected, **CLOSE)
    for kind in ({}, {"through_layer": 1}, {"through_layer": 2, "freeze": "all"}):
        hooks = intervention_hooks(model, clt, tokens, change, **kind)
        with torch.no_grad():
            plain = model.run_with_hooks(tokens, fwd_hooks=hooks)
        torch.testing.assert_close(plain, intervene(model, clt, tokens, change, **kind).logits, **CLOSE)


def test_contrast_adds_up_or_is_refused(model: Model, places: dict):
    clt = tiny_clt(model, **places)
    other = torch.tensor([0, 7, 19, 5, 33, 50, 21])
    behind = "blocks.0.ln2_post.hook_scale" in model.hook_dict
    if behind and places["output_hook"] == "mlp.hook_out":
        with pytest.raises(ModelUnsupported, match="contrast"):
            attribute(model, clt, TOKENS, contrast=other)
        return
    graph = attribute(model, clt, TOKENS, contrast=other)
    ends = graph.nodes.where(NodeKind.LOGIT)
    logits, others = (ByHand(model, clt).clean(t[None])[0][0, -1] for t in (TOKENS, other))
    change = logits - logits.mean() - (others - others.mean())
    torch.testing.assert_close(graph.adjacency.sum(dim=1)[ends], change[graph.nodes.index[ends]], **CLOSE)


def test_evaluation_and_validation(one_of_each: Model, places: dict):
    clt = tiny_clt(one_of_each, **places)
    prompts = [t for t in random_tokens(one_of_each, batch=3)]
    report = evaluate(one_of_each, clt, prompts, n_graphs=1)
    _, x, y = ByHand(one_of_each, clt).clean(torch.stack(prompts))
    x, y = x[:, 1:].flatten(0, 1), y[:, 1:].flatten(0, 1)
    nmse = (y - clt(x)).square().sum(dim=(0, 2)) / y.square().sum(dim=(0, 2))
    assert report.nmse_per_layer == pytest.approx(nmse.tolist())
    assert len(validate(attribute(one_of_each, clt, TOKENS), one_of_each, clt, n_features=4).summary) > 0


@pytest.mark.parametrize("kind", ["hooked-gemma", "bridge-gemma3", "hooked-neox"])
def test_training_reads_and_writes_there(session_models, kind: str, places: dict):
    model = session_models(kind)
    tokens = random_tokens(model, batch=64, pos=8)
    before = snapshot(model)
    cfg = config(**places, training_tokens=64 * 30, dtype="float64")
    clt = CLTTrainingRunner(cfg, model=model, dataset=tokens).run()
    after = snapshot(model)
    assert all(after[key] == before[key] for key in ("hook_dict", "mod_dict", "modules", "state_dict", "forward hooks"))
    assert (clt.cfg.input_hook, clt.cfg.output_hook) == tuple(places.values())
    _, x, y = ByHand(model, clt).clean(tokens)
    x, y = x[:, 1:].flatten(0, 1), y[:, 1:].flatten(0, 1)
    explained = 1 - (y - clt(x)).square().sum() / (y - y.mean(dim=0)).square().sum()
    # Better than the mean, on what the module itself is given and returns.
    assert explained > 0.3
