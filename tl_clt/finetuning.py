"""`finetune`: a trained CLT trained further, for what it does in the model's place.

Training asks that a CLT write what the MLPs write, on the model's own activations. It does not ask what becomes of its
errors once later layers read them, nor how what is written changes with what is read. Terms that do are added to the
squared error and sparsity of `training.losses`, each times a weight that the user gives:

    kl_loss          KL(p || q) in nats: p the model's next-token probabilities, q those with the CLT for all MLPs
    downstream_loss  sum_t ||y_t - y'_t||^2: y_t what MLP t writes in the model, y'_t what the CLT writes there while it
                     stands in for all MLPs, so that features read a stream with the errors of all layers before
    jacobian_loss    sum_s ||J_s v_s - C_s v_s||^2: J_s the derivative of what MLP s writes with respect to what the CLT
                     reads at layer s (through the norm between, if there is one), C_s that of what the features of
                     layer s write into layer s,  C_s v = ((v @ W_enc[s]) * 1[active]) @ W_dec[s -> s] (+ v @ W_skip[s])
    across_loss      sum_{t > s} ||J_st v - C_st v||^2 for one layer s, drawn for each direction: J_st the derivative of
                     what MLP t writes with respect to what is read at layer s, at all counted positions at once, while
                     all in between reacts (attention, norms, MLPs); C_st that of the sum of what all features write
                     into layer t, in the local replacement model: the CLT in place of the MLPs, with the errors of the
                     clean run added, so that both derivatives are taken at the model's own activations

Each is a mean over the positions that count: all of a prompt but position 0, which keeps its own MLP outputs where MLPs
are replaced (`replacement.replaced`). Activations are in the units of training (each layer's inputs and outputs times
`input_scale` and `output_scale`, of median norm sqrt(d_model)), and v is normal in them: a direction as long as what is
read there. The expectation of ||J v - C v||^2 is the squared Frobenius norm of J - C. So squared errors and derivatives
have one unit, in which a CLT that writes nothing has a squared error of about n_layers * d_model.

The model's derivatives are taken in forward mode, as is C_st, whose gradient then goes back through the pass. Which
features are active is given: no gradient of the two Jacobian terms reaches thresholds. All others do as in training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.func import jvp
from tqdm.auto import tqdm

from tl_clt.arguments import as_number, as_seed, as_switch, as_whole, shown
from tl_clt.errors import ConfigError, DatasetError, NotFinite
from tl_clt.lens import FwdHook, HookedModel, block_hook, run_with_cache, run_with_hooks, user_hooks_aside
from tl_clt.replacement import attach, check_fit, replaced, require_free
from tl_clt.shapes import LayerInputs, LayerOutputs, Logits, TokenBatch, Tokens
from tl_clt.texts import HeldOut, held_out_prompts
from tl_clt.training.clt import TrainingCLT, TrainingCLTConfig, TrainStepInput, define_step
from tl_clt.training.data.batches import ActivationScale, apply_scale, estimate_scale
from tl_clt.training.export import export, fold_scaling, take_over
from tl_clt.training.losses import L0Controller, StraightThrough, jumprelu, mse_loss
from tl_clt.transcoder import CrossLayerTranscoder

BATCHES_MEASURED = 8
"""Batches that scales are estimated on where the CLT does not say them, and L0 where it is to be held."""

GAINS, MOST_PER_STEP, LAMBDAS = (8.0, 30.0), 0.1, (1e-4, 1e4)
"""Of the controllers that hold L0: K_p and K_i times the steps, the largest K_i, and least and greatest lambda."""

MAX_NORM = 1.0
"""Norm that gradients are clipped to, as in training."""


class TermWeights(NamedTuple):
    """What each added term is multiplied by; those of 0 are not computed."""

    kl: float = 0.0
    downstream: float = 0.0
    jacobian: float = 0.0
    across: float = 0.0


class FinetuningStep(NamedTuple):
    """What `on_progress` is told of a step."""

    step: int
    """Counted from 1."""

    n_steps: int
    """Of the whole run."""

    losses: dict[str, float]
    """Terms of the loss, weights included, by name ("mse_loss", "kl_loss")."""

    l0_per_layer: list[float]
    """Active features per token of each layer, in this step's batch."""


class FinetuningInterrupted(KeyboardInterrupt):
    """Ctrl-C while a CLT was trained further: what was trained so far is not lost."""

    def __init__(self, clt: CrossLayerTranscoder, n_done: int) -> None:
        super().__init__(f"Ctrl-C after {n_done} steps; the CLT that they made is in this error's `clt`")
        self.clt = clt
        """The CLT as it was then."""
        self.n_done = n_done
        """Steps made."""


def finetune(
    model: HookedModel,
    clt: CrossLayerTranscoder,
    prompts: HeldOut,
    *,
    kl: float = 0.0,
    downstream: float = 0.0,
    jacobian: float = 0.0,
    across: float = 0.0,
    n_directions: int = 1,
    sparsity: float | None = None,
    n_steps: int = 300,
    lr: float = 5e-4,
    batch_size: int = 16,
    context_size: int | None = None,
    pos: int | None = None,
    seed: int = 0,
    progress: bool = True,
    on_progress: Callable[[FinetuningStep], None] | None = None,
) -> CrossLayerTranscoder:
    """Train a CLT further, with terms in the loss that ask what it does in the place of the MLPs.

    The terms and their units stand at the head of this module. With all weights 0 it is plain training on. The model's
    weights, flags and hooks stay untouched, and hooks of the user's own are set aside. Adam's rate rises linearly over
    the first twentieth of the steps and falls to 0 over the last fifth.

    Args:
        model: a HookedTransformer or TransformerBridge.
        clt: a CLT of this model; it is not changed.
        prompts: what to train on: a list of prompts (texts or token ids) or ids [n_prompts, pos], or a text file,
            folder, hub name or `datasets` object, as for `evaluate`.
        kl, downstream, jacobian, across: weight of each term, 0 or more.
        n_directions: random directions a step for each of the Jacobian terms.
        sparsity: lambda of relu and jumprelu (batchtopk), with the tanh penalty. Where left out, each layer's is
            adjusted so that as many of its features are active as were before. topk has none, and keeps its k.
        n_steps: how long; with 0 the same CLT comes back, up to rounding.
        lr: Adam's learning rate at its highest.
        batch_size: prompts of a step at most. Prompts of one length go together, so that none is padded.
        context_size: tokens of a prompt at most, where text is read; None for 128, or the model's own where less.
        pos: the one position of each prompt that counts, negative ones from the end; None for all but position 0.
        seed: of the order of prompts, and of directions.
        progress: show a bar where it takes longer than 2 s.
        on_progress: told of each step.

    Returns:
        A new CLT of the same shape, activation, hooks and number type.

    Raises:
        CLTMismatch, HookNotFound: the CLT is of another model.
        AlreadyAttached: a CLT is attached to the model.
        DatasetError, PromptError, TokenizerMissing: nothing to train on, or a prompt that the model cannot take.
        ConfigError: an argument out of range, or thresholds below 0.
        ModelUnsupported: most of a layer's activations are zero.
        NotFinite: the loss or its gradient is infinite or no number, with the step and the term.
        FinetuningInterrupted: Ctrl-C, once a step was made; it is a KeyboardInterrupt, and has the CLT as it is then.
    """
    given = {"kl": kl, "downstream": downstream, "jacobian": jacobian, "across": across}
    weights = TermWeights(**{name: _not_negative(name, value) for name, value in given.items()})
    n_directions, n_steps = as_whole("n_directions", n_directions, 1), as_whole("n_steps", n_steps, 0)
    batch_size, lr = as_whole("batch_size", batch_size, 1), float(as_number("lr", lr, above=0))
    penalty = None if sparsity is None else _not_negative("sparsity", sparsity)
    where = as_whole("pos", pos, none="all but position 0")
    seed, progress = as_seed("seed", seed), as_switch("progress", progress)
    if on_progress is not None and not callable(on_progress):
        raise ConfigError(f"on_progress is {shown(on_progress)}: give a function, or None.")
    check_fit(model, clt)
    require_free(model)
    _check(clt, weights, penalty)
    texts = _read(model, prompts, context_size, where)
    generator = torch.Generator().manual_seed(seed)
    with user_hooks_aside(model), torch.enable_grad():
        trained = start_from(model, clt, texts, batch_size, where)
        held = [] if penalty is not None or trained.cfg.selects else _l0(model, trained, texts, batch_size, where)
        lambdas = _Lambdas(trained, penalty, held, n_steps)
        adam = torch.optim.Adam(trained.parameters(), lr=lr)
        steps = tqdm(range(n_steps), desc="Fine-tuning", unit=" steps", delay=2.0, disable=not progress)
        n_done = 0
        try:
            for step, tokens in zip(steps, _batches(texts, batch_size, generator), strict=False):
                for group in adam.param_groups:
                    group["lr"] = lr * min(1.0, (step + 1) / max(1, n_steps // 20), 5 * (n_steps - step) / n_steps)
                losses, l0 = loss_terms(model, trained, tokens, weights, where, lambdas.use(), n_directions, generator)
                _descend(adam, losses, f"Fine-tuning stopped at step {step + 1} of {n_steps}:", lr)
                n_done = step + 1
                lambdas.observe(l0)
                values = {name: x.item() for name, x in losses.items()}
                steps.set_postfix({k.removesuffix("_loss"): f"{x:.3g}" for k, x in values.items()}, refresh=False)
                if on_progress is not None:
                    on_progress(FinetuningStep(n_done, n_steps, values, l0.tolist()))
        except KeyboardInterrupt as error:
            if n_done == 0:
                raise
            raise FinetuningInterrupted(_exported(trained, clt), n_done) from error
    return _exported(trained, clt)


def _exported(trained: TrainingCLT, before: CrossLayerTranscoder) -> CrossLayerTranscoder:
    """What comes of a CLT that was trained further."""
    tuned = export(trained, before.cfg.dtype)
    # What a database says of the features before is not true of these.
    tuned.cfg = replace(before.cfg, scan=None)
    return tuned


def _not_negative(name: str, value: object) -> float:
    number = float(as_number(name, value))
    if number < 0:
        raise ConfigError(f"{name} is {number:g}: give 0 or more.")
    return number


def _check(clt: CrossLayerTranscoder, weights: TermWeights, penalty: float | None) -> None:
    """Raise where the CLT has not what is asked for."""
    if penalty is not None and clt.cfg.activation == "topk":
        raise ConfigError(f"sparsity is {penalty:g}, but this CLT is a topk one, which keeps its k: leave it out.")
    if weights.across > 0 and clt.cfg.n_layers == 1:
        raise ConfigError(f"across is {weights.across:g}, but the model has one layer, none above it: leave it out.")
    if clt.threshold is not None and bool((clt.threshold < 0).any()):
        raise ConfigError("This CLT has thresholds below 0, as training has not: it cannot be trained on.")


# -- what is trained, and on what


def _read(model: HookedModel, prompts: HeldOut, context_size: int | None, pos: int | None) -> list[Tokens]:
    """All prompts, each with a position that counts."""
    if isinstance(prompts, list | tuple | Tensor) and getattr(prompts, "ndim", 2) == 2 and len(prompts) == 0:
        raise DatasetError("There are no prompts to train on: give at least one.")
    texts = list(held_out_prompts(model, prompts, context_size))
    for number, tokens in enumerate(texts):
        if len(counted(len(tokens), pos)) == 0:
            raise ConfigError(
                f"pos is {pos}, but prompts[{number}] has {len(tokens)} tokens, of which position 0 does not count:"
                f" give 1 to {len(tokens) - 1}, or -1 for the last."
            )
    return texts


def counted(n_pos: int, pos: int | None) -> Int[Tensor, " n_counted"]:
    """Positions whose losses count: all but 0, or the one that was asked for."""
    after_first = torch.arange(1, n_pos)
    return after_first if pos is None else after_first[after_first == (pos + n_pos if pos < 0 else pos)]


def _batches(prompts: Sequence[Tokens], size: int, generator: torch.Generator) -> Iterator[TokenBatch]:
    """Batches of prompts of one length, without end: each pass over the prompts is in a new order."""
    by_length: dict[int, list[Tokens]] = {}
    for tokens in prompts:
        by_length.setdefault(len(tokens), []).append(tokens)
    while True:
        found = []
        for alike in by_length.values():
            order = torch.randperm(len(alike), generator=generator)
            found += [torch.stack([alike[i] for i in some.tolist()]) for some in order.split(size)]
        yield from (found[i] for i in torch.randperm(len(found), generator=generator).tolist())


class Clean(NamedTuple):
    """What the model does by itself."""

    inputs: LayerInputs
    """What features read, [batch, pos, n_layers, d_model]."""
    outputs: LayerOutputs
    """What MLPs write."""
    logits: Logits


def run_clean(model: HookedModel, clt: TrainingCLT, tokens: TokenBatch) -> Clean:
    """The model's own activations, in the number type of training."""
    hooks = (clt.cfg.input_hook, clt.cfg.output_hook)
    names = [[block_hook(layer, hook) for layer in range(clt.cfg.n_layers)] for hook in hooks]
    logits, cache = run_with_cache(model, tokens, lambda name: name in (*names[0], *names[1]))
    inputs, outputs = (torch.stack([cache[n] for n in of_hook], dim=2).to(clt.sum_dtype) for of_hook in names)
    return Clean(inputs, outputs, logits)


def _pairs(clean: Clean, at: Int[Tensor, " n_counted"]) -> Float[Tensor, "token 2 n_layers d_model"]:
    """Inputs and outputs at the positions that count, as a training step takes them, but not scaled."""
    return torch.stack([clean.inputs[:, at], clean.outputs[:, at]], dim=2).flatten(0, 1)


def _samples(
    model: HookedModel, clt: TrainingCLT, prompts: Sequence[Tokens], size: int, pos: int | None
) -> list[Float[Tensor, "token 2 n_layers d_model"]]:
    """Activations of some batches, the same ones each time."""
    drawn = zip(range(BATCHES_MEASURED), _batches(prompts, size, torch.Generator().manual_seed(0)), strict=False)
    return [_pairs(run_clean(model, clt, tokens), counted(tokens.shape[1], pos)) for _, tokens in drawn]


def start_from(
    model: HookedModel, clt: CrossLayerTranscoder, prompts: Sequence[Tokens], size: int, pos: int | None
) -> TrainingCLT:
    """A CLT in training with the weights of one that is trained, and its scales, or else those of the prompts."""
    cfg, dtype = clt.cfg, torch.promote_types(getattr(torch, clt.cfg.dtype), torch.float32)
    same = ("n_layers", "d_transcoder", "span", "skip", "input_hook", "output_hook", "model_name")
    values: dict[str, Any] = {
        **{name: getattr(cfg, name) for name in same},
        **{"d_in": cfg.d_model, "d_sae": cfg.n_layers * cfg.d_transcoder, "device": str(clt.W_enc.device)},
        **{"dtype": str(dtype).removeprefix("torch."), "k": cfg.k if cfg.activation == "topk" else None},
        # batchtopk compares with thresholds once it is trained, as jumprelu does.
        "activation": "jumprelu" if cfg.has_threshold else cfg.activation,
    }
    with torch.random.fork_rng():  # of the weights that are replaced at once
        trained = TrainingCLT(TrainingCLTConfig(**values))
    scale = ActivationScale(cfg.input_scale or (), cfg.output_scale or ())
    if not (scale.inputs and scale.outputs):
        scale = estimate_scale(_samples(model, trained, prompts, size, pos))
    trained.cfg.input_scale, trained.cfg.output_scale = scale
    take_over(trained, clt.weights)
    return trained


@torch.no_grad()
def _l0(model: HookedModel, trained: TrainingCLT, prompts: Sequence[Tokens], size: int, pos: int | None) -> list[float]:
    """Active features per token of each layer, on a sample."""
    inputs = torch.cat([pairs[:, 0] for pairs in _samples(model, trained, prompts, size, pos)])
    return (LiveTranscoder(trained).encode(inputs) != 0).double().sum(dim=-1).mean(dim=0).tolist()


class _Lambdas:
    """The weight of the sparsity penalty in each layer: as given, or such that its L0 stays what it was."""

    def __init__(self, trained: TrainingCLT, given: float | None, held: Sequence[float], n_steps: int) -> None:
        """Before the first step.

        Args:
            trained: what the penalty is of.
            given: lambda of all layers; None to hold L0.
            held: active features per token of each layer, to be held.
            n_steps: of the run.
        """
        self.trained, self.given = trained, given
        gains = (GAINS[0], min(GAINS[1] / max(1, n_steps), MOST_PER_STEP))
        self.controllers = [L0Controller(1, max(l0, 0.01), 1.0, 0, gains, LAMBDAS) for l0 in held]

    def use(self) -> dict[str, float]:
        """Coefficients of a step; the CLT gets the layers' shares."""
        if self.given is not None or not self.controllers:
            return {"sparsity": self.given or 0.0, "dead_feature": 0.0}
        values = torch.tensor([controller.value for controller in self.controllers])
        self.trained.sparsity_shares = (values / values.mean()).to(self.trained.device)
        return {"sparsity": float(values.mean()), "dead_feature": 0.0}

    def observe(self, l0: Float[Tensor, " n_layers"]) -> None:
        """A step's active features per token of each layer."""
        for controller, of_layer in zip(self.controllers, l0, strict=False):
            controller.observe(of_layer[None])
            controller.step()


# -- the loss


class LiveTranscoder(CrossLayerTranscoder):
    """The CLT that a CLT in training would be exported as, as a function of its weights: gradients go on to these."""

    def __init__(self, trained: TrainingCLT) -> None:
        torch.nn.Module.__init__(self)
        weights = fold_scaling(trained, trained.sum_dtype, trained.sum_dtype)
        self.cfg, self.W_dec, self._fingerprint = weights.cfg, weights.W_dec, None
        for name in ("W_enc", "b_enc", "b_dec", "threshold", "W_skip"):
            setattr(self, name, getattr(weights, name))
        self.bandwidth = trained.cfg.jumprelu_bandwidth
        self.straight_through: StraightThrough | None = trained.cfg.straight_through
        """None for phi's own derivative, in forward mode too."""

    def activate(
        self, hidden_pre: Float[Tensor, "*batch d_transcoder"], layer: int
    ) -> Float[Tensor, "*batch d_transcoder"]:
        """phi of one layer, with the gradients of training."""
        if self.threshold is None or self.straight_through is None:
            return super().activate(hidden_pre, layer)
        rows = hidden_pre.reshape(-1, hidden_pre.shape[-1])
        return jumprelu(rows, self.threshold[layer], self.bandwidth, self.straight_through).view_as(hidden_pre)


def loss_terms(
    model: HookedModel,
    trained: TrainingCLT,
    tokens: TokenBatch,
    weights: TermWeights,
    pos: int | None,
    coefficients: dict[str, float],
    n_directions: int,
    generator: torch.Generator,
) -> tuple[dict[str, Float[Tensor, ""]], Float[Tensor, " n_layers"]]:
    """The terms of the loss on a batch, weights included, and L0 of each layer.

    Args:
        model: users' hooks set aside.
        trained: gradients go to its weights.
        tokens: prompts of one length.
        weights: of the added terms.
        pos: see `counted`.
        coefficients: of the terms of training.
        n_directions, generator: of the Jacobian terms.
    """
    clean, at = run_clean(model, trained, tokens), counted(tokens.shape[1], pos)
    scale = ActivationScale(tuple(trained.cfg.input_scale or ()), tuple(trained.cfg.output_scale or ()))
    batch = apply_scale(_pairs(clean, at), scale)
    step = define_step(trained, TrainStepInput(batch, coefficients, None, 0, False))
    terms, losses = _Terms(model, LiveTranscoder(trained), tokens, clean, at, scale), dict(step.losses)
    if weights.kl > 0 or weights.downstream > 0:
        kl, downstream = terms.replaced()
        losses |= {"kl_loss": weights.kl * kl} if weights.kl > 0 else {}
        losses |= {"downstream_loss": weights.downstream * downstream} if weights.downstream > 0 else {}
    for name, weight, term in (
        ("jacobian", weights.jacobian, terms.jacobian),
        ("across", weights.across, terms.across),
    ):
        if weight > 0:
            losses[f"{name}_loss"] = weight * torch.stack([term(generator) for _ in range(n_directions)]).mean()
    return losses, trained.l0_per_layer(trained.count_firing(step), len(batch))


class _Terms:
    """The added terms on one batch, as the head of this module defines them."""

    def __init__(
        self,
        model: HookedModel,
        live: LiveTranscoder,
        tokens: TokenBatch,
        clean: Clean,
        at: Int[Tensor, " n_counted"],
        scale: ActivationScale,
    ) -> None:
        self.model, self.live, self.tokens, self.clean, self.at = model, live, tokens, clean, at
        self.s_in, self.s_out = (torch.tensor(s, dtype=live.W_enc.dtype, device=live.W_enc.device) for s in scale)
        self.n_tokens = len(tokens) * len(at)

    def replaced(self) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """kl_loss and downstream_loss, of one pass with the CLT in place of the MLPs."""
        written: dict[int, Tensor] = {}
        with replaced(self.model, self.live):
            logits = run_with_hooks(self.model, self.tokens, self._hooks("clt.hook_recons", written.__setitem__))
        wide = torch.promote_types(logits.dtype, torch.float32)
        p, q = (x[:, self.at].to(wide).log_softmax(dim=-1) for x in (self.clean.logits, logits))
        kl = (p.exp() * (p - q)).sum() / self.n_tokens
        recons = torch.stack([written[layer] for layer in self.live.layers], dim=2)
        both = ((x[:, self.at] * self.s_out[:, None]).flatten(0, 1) for x in (recons, self.clean.outputs))
        return kl, mse_loss(*both)

    def jacobian(self, generator: torch.Generator) -> Float[Tensor, ""]:
        """jacobian_loss for one direction of each layer, at each token."""
        v = torch.stack([self._direction(layer, generator) for layer in self.live.layers], dim=2)
        with torch.no_grad():
            truth = self._forward_mode({layer: v[:, :, layer] for layer in self.live.layers}, self.clean_pass)
        return torch.stack(
            [self._error(s, truth[s], self._own_response(s, v[:, :, s])) for s in self.live.layers]
        ).sum()

    def across(self, generator: torch.Generator) -> Float[Tensor, ""]:
        """across_loss for one layer and one direction at each token."""
        layer = int(torch.randint(self.live.cfg.n_layers - 1, (), generator=generator))
        v = {layer: self._direction(layer, generator)}
        with torch.no_grad():
            truth = self._forward_mode(v, self.clean_pass)
        self.live.straight_through = None
        found = self._forward_mode(v, self.local_pass)
        later = range(layer + 1, self.live.cfg.n_layers)
        return torch.stack([self._error(t, truth[t], found[t]) for t in later]).sum()

    def _direction(self, layer: int, generator: torch.Generator) -> Float[Tensor, "batch pos d_model"]:
        """Normal numbers at the positions that count, in units of what is read at a layer."""
        inputs = self.clean.inputs[:, :, layer]
        v = torch.zeros_like(inputs)
        shape = (len(inputs), len(self.at), inputs.shape[-1])
        v[:, self.at] = torch.randn(shape, generator=generator, dtype=torch.float64).to(v) / self.s_in[layer]
        return v

    def _own_response(self, layer: int, v: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """C_s v."""
        live = self.live
        active = live.encode_layer(self.clean.inputs[:, :, layer], layer).feature_acts.detach() != 0
        response = (v @ live.W_enc[layer] * active) @ live.W_dec[layer][:, 0]
        return response if live.W_skip is None else response + live.skip(v, layer)

    def _error(self, layer: int, truth: Tensor, found: Tensor) -> Float[Tensor, ""]:
        """Squared difference in the units of training, mean over tokens."""
        difference = (truth - found)[:, self.at] * self.s_out[layer]
        return difference.square().sum() / self.n_tokens

    def _hooks(self, name: str, keep: Any) -> list[FwdHook]:
        """Hooks that hand a layer's number and what passes there to `keep`, and change nothing."""

        def hand_over(x: Tensor, hook: object, layer: int) -> None:
            keep(layer, x)

        return [(block_hook(layer, name), partial(hand_over, layer=layer)) for layer in self.live.layers]

    def clean_pass(self, hooks: list[FwdHook], keep: Any) -> None:
        """The model itself; what MLPs write is kept."""
        run_with_hooks(self.model, self.tokens, [*hooks, *self._hooks(self.live.cfg.output_hook, keep)])

    def local_pass(self, hooks: list[FwdHook], keep: Any) -> None:
        """The local replacement model; what the CLT writes is kept.

        Errors carry gradients, as they do not in `replace_with_error`: so the sum of reconstruction and error, where
        derivatives are taken, has none, and what the CLT writes on the model's activations is left to other terms.
        """
        live, inputs = self.live, self.clean.inputs
        errors = self.clean.outputs - live.decode(live.encode(inputs), inputs)

        def add_error(recons: Tensor, hook: object, layer: int) -> Tensor:
            keep(layer, recons)
            return recons + errors[:, :, layer]

        added = [(block_hook(layer, "clt.hook_recons"), partial(add_error, layer=layer)) for layer in live.layers]
        with attach(self.model, live, mode="replace"):
            run_with_hooks(self.model, self.tokens, [*hooks, *added])

    def _forward_mode(self, directions: dict[int, Tensor], run: Any) -> dict[int, Tensor]:
        """How what is written at each layer changes in a pass whose inputs move along directions: at the layers named
        their inputs' own movement, if there is any, gives way to it."""

        def written(size: Tensor) -> dict[int, Tensor]:
            found: dict[int, Tensor] = {}

            def move(x: Tensor, hook: object, layer: int) -> Tensor:
                return x.detach() + size * directions[layer].to(x.dtype)

            hooks = [(block_hook(layer, self.live.cfg.input_hook), partial(move, layer=layer)) for layer in directions]
            run(hooks, found.__setitem__)
            return found

        zero = torch.zeros((), dtype=self.live.W_enc.dtype, device=self.live.W_enc.device)
        # torch.func's, because torch's own forward mode changes what a softmax's gradient needs.
        return jvp(written, (zero,), (torch.ones_like(zero),))[1]


def _descend(adam: torch.optim.Adam, losses: dict[str, Float[Tensor, ""]], stopped: str, lr: float) -> None:
    """One step of Adam along the gradient of the sum of losses, of which the model's weights get none.

    Raises:
        NotFinite: the loss or the gradient is infinite or no number; weights are as before.
    """
    weights = adam.param_groups[0]["params"]
    gradients = torch.autograd.grad(torch.stack([*losses.values()]).sum(), weights, allow_unused=True)
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad = gradient
    norm = torch.nn.utils.clip_grad_norm_(weights, MAX_NORM)
    wrong = [f"{name} is {x.item()}" for name, x in losses.items() if not x.isfinite()]
    if not wrong and not norm.isfinite():
        wrong = [f"the gradient's norm is {norm.item()}"]
    if wrong:
        raise NotFinite(
            f"{stopped} {'; '.join(wrong)}. The CLT that was given is as it was. Lower lr (now {lr:g}), or a term's"
            " weight; where it is so at the first step, check the model's and the CLT's weights."
        )
    adam.step()
