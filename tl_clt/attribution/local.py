"""The local replacement model of one prompt (Methods, "The Local Replacement Model").

The CLT stands in for the MLPs; attention patterns and norm scales are held at this prompt's values; the error
`mlp_out - recons` is added back at each (layer, pos). Between features everything is then linear: what is
written into the residual stream (at a "site") reaches what is read from it through a fixed linear map.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_clt.errors import LocalModelMismatch, ModelUnsupported
from tl_clt.lens import (
    FwdHook,
    HookedModel,
    block_hook,
    frozen_hooks,
    is_frozen_hook,
    model_name,
    run_with_cache,
    run_with_hooks,
    tap_unembedding,
    user_hooks_aside,
)
from tl_clt.shapes import Tokens
from tl_clt.transcoder import CrossLayerTranscoder

Bos = Literal["error", "drop", "features"]
Stream = Float[Tensor, "pos d_model"]


class Sites(NamedTuple):
    """What is written into the residual stream, by place. A clean run's values give back the clean run."""

    embed: Stream
    """Token embeddings."""
    pos_embed: Stream | None
    """Position embeddings, where the model adds them."""
    attn: list[Stream]
    """Added to each attention layer's output: zero, but what biases write can be told by it."""
    mlp: list[Stream]
    """Each MLP's output less the CLT's skip connection."""


class Reads(NamedTuple):
    """What is read from the residual stream."""

    inputs: list[Stream]
    """The CLT's input at each layer."""
    final: Stream
    """Output of ln_final, which the unembedding reads."""
    logits: Float[Tensor, "pos d_vocab"]
    """Before any soft-cap."""


class ActiveFeatures(NamedTuple):
    """Features that are active on the prompt, ordered by (layer, pos, feature)."""

    layer: Int[Tensor, " n_active"]
    pos: Int[Tensor, " n_active"]
    feature: Int[Tensor, " n_active"]
    activation: Float[Tensor, " n_active"]


class Biases(NamedTuple):
    """What biases write, [n_layers, pos, d_model] each, and what they add on reading."""

    attn: Float[Tensor, "n_layers pos d_model"]
    mlp: Float[Tensor, "n_layers pos d_model"]
    inputs: Float[Tensor, "n_layers pos d_model"]
    final: Float[Tensor, "pos d_model"]


@dataclass
class LocalReplacementModel:
    """One prompt's replacement model, with everything that writes into its residual stream."""

    model: HookedModel
    clt: CrossLayerTranscoder
    tokens: Tokens
    bos: Bos
    logits: Float[Tensor, "pos d_vocab"]
    """The model's own output logits."""
    clean: Reads
    """Reads of the clean run."""
    sites: Sites
    """Writes of the clean run."""
    features: ActiveFeatures
    errors: Float[Tensor, "n_layers pos d_model"]
    """mlp_out - recons; at position 0 by `bos`."""
    frozen: list[FwdHook]
    norm_outputs: dict[str, Tensor]
    """Clean outputs of norms that a bridge computes by Hugging Face's own code."""
    rounding: dict[str, Tensor]
    """Their difference from scale-held norms, a constant that counts as a bias. Filled by the first run."""

    @property
    def n_layers(self) -> int:
        return self.clt.cfg.n_layers

    def run(self, sites: Sites) -> Reads:
        """The linear model: reads of given writes, through held patterns and scales. Differentiable."""
        inputs: list[Tensor] = [torch.empty(0)] * self.n_layers

        def keep_input(x: Tensor, hook: object, layer: int) -> None:
            inputs[layer] = x[0]

        def write_mlp(mlp_out: Tensor, hook: object, layer: int) -> Tensor:
            return (sites.mlp[layer] + skip_output(self.clt, inputs[layer], layer, self.bos))[None].to(mlp_out.dtype)

        def add_attn(attn_out: Tensor, hook: object, layer: int) -> Tensor:
            return attn_out + sites.attn[layer][None]

        return self._run(sites, keep_input, write_mlp, add_attn, inputs)

    def biases(self) -> Biases:
        """What the model's and CLT's biases write and add on reading, by one run from an empty residual stream.

        Every attention layer sees zeros, so that its output is what biases alone make; it is noted and not
        passed on, so that the next layer sees zeros too.
        """
        zero = torch.zeros_like(self.sites.embed)
        inputs: list[Tensor] = [torch.empty(0)] * self.n_layers
        attn: list[Tensor] = [zero] * self.n_layers

        def keep_input(x: Tensor, hook: object, layer: int) -> None:
            inputs[layer] = x[0]

        def silence_mlp(mlp_out: Tensor, hook: object, layer: int) -> Tensor:
            return torch.zeros_like(mlp_out)

        def note_attn(attn_out: Tensor, hook: object, layer: int) -> Tensor:
            attn[layer] = attn_out[0]
            return torch.zeros_like(attn_out)

        pos_zero = None if self.sites.pos_embed is None else zero
        with torch.no_grad():
            empty = Sites(zero, pos_zero, attn, attn)
            reads = self._run(empty, keep_input, silence_mlp, note_attn, inputs)
            mlp = torch.stack([skip_output(self.clt, x, t, self.bos) for t, x in enumerate(reads.inputs)])
            mlp[:, decoded_positions(self.bos)] += self.clt.b_dec[:, None, :]
        return Biases(torch.stack(attn), mlp, torch.stack(reads.inputs), reads.final)

    def _run(
        self, sites: Sites, keep_input: Callable, on_mlp: Callable, on_attn: Callable, inputs: list[Tensor]
    ) -> Reads:
        cfg = self.clt.cfg
        hooks: list[FwdHook] = [*self.frozen]
        hooks += [(name, partial(self._pin, name=name)) for name in self.norm_outputs]
        hooks.append(("hook_embed", partial(_put, value=sites.embed)))
        if sites.pos_embed is not None:
            hooks.append(("hook_pos_embed", partial(_put, value=sites.pos_embed)))
        for t in range(self.n_layers):
            hooks.append((block_hook(t, "hook_attn_out"), partial(on_attn, layer=t)))
            hooks.append((block_hook(t, cfg.input_hook), partial(keep_input, layer=t)))
            hooks.append((block_hook(t, cfg.output_hook), partial(on_mlp, layer=t)))
        with user_hooks_aside(self.model), tap_unembedding(self.model) as tap:
            run_with_hooks(self.model, self.tokens[None], hooks)
        seen = tap.get()
        return Reads(inputs, seen.final[0], seen.logits[0])

    def _pin(self, out: Tensor, hook: object, name: str) -> Tensor:
        """Make a scale-held norm give, on the clean run, what the model's own code gave, to the bit."""
        if name not in self.rounding:
            self.rounding[name] = (self.norm_outputs[name] - out).detach()
        return out + self.rounding[name]


def build_local_model(
    model: HookedModel, clt: CrossLayerTranscoder, tokens: Tokens, bos: Bos = "error"
) -> LocalReplacementModel:
    """Run one prompt and set up its local replacement model.

    Args:
        model, clt: a model and a CLT that fits it.
        tokens: the prompt, [pos].
        bos: what position 0, whose activations are huge and mean nothing, contributes: "error" puts its whole
            MLP outputs into error nodes, "drop" leaves out its features and errors, "features" keeps both.

    Raises:
        ModelUnsupported: the model lacks a hook that tracing needs, or normalises its embeddings.
        LocalModelMismatch: the local replacement model does not give the model's logits.
    """
    _require_traceable(model)
    cfg = clt.cfg
    in_hooks = [block_hook(t, cfg.input_hook) for t in clt.layers]
    out_hooks = [block_hook(t, cfg.output_hook) for t in clt.layers]
    known = model.hook_dict
    norms = {n.removesuffix("hook_scale") + "hook_out" for n in known if n.endswith("hook_scale")}
    norms &= set(known)
    wanted = {"hook_embed", "hook_pos_embed", *in_hooks, *out_hooks, *norms}
    with user_hooks_aside(model), tap_unembedding(model) as tap:
        logits, cache = run_with_cache(model, tokens[None], lambda n: n in wanted or is_frozen_hook(n))
    seen = tap.get()
    inputs = [cache[name][0] for name in in_hooks]
    mlp_out = torch.stack([cache[name][0] for name in out_hooks])
    embed = cache["hook_embed"][0]
    pos_embed = cache["hook_pos_embed"][0] if "hook_pos_embed" in cache else None
    written = _split(clt, inputs, mlp_out, bos)
    local = LocalReplacementModel(
        model=model,
        clt=clt,
        tokens=tokens,
        bos=bos,
        logits=logits[0],
        clean=Reads(inputs, seen.final[0].detach(), seen.logits[0].detach()),
        sites=Sites(embed, pos_embed, [torch.zeros_like(embed)] * cfg.n_layers, written.sites),
        features=written.features,
        errors=written.errors,
        frozen=frozen_hooks({name: cache[name] for name in cache.keys() if is_frozen_hook(name)}),
        norm_outputs={name: cache[name] for name in norms},
        rounding={},
    )
    _check_logits(local)
    return local


class _MLPParts(NamedTuple):
    """MLP outputs, split into what features write and the rest."""

    features: ActiveFeatures
    errors: Float[Tensor, "n_layers pos d_model"]
    sites: list[Stream]


@torch.no_grad()
def _split(
    clt: CrossLayerTranscoder,
    inputs: list[Stream],
    mlp_out: Float[Tensor, "n_layers pos d_model"],
    bos: Bos,
) -> _MLPParts:
    """Encode the clean run and split each MLP's output into features, b_dec, skip connection and error."""
    x = torch.stack(inputs, dim=1).to(clt.W_enc.dtype)
    feature_acts = clt.encode(x)
    if bos != "features":
        feature_acts[0] = 0
    recons = torch.zeros_like(mlp_out)
    for source in clt.layers:
        targets = clt.cfg.targets(source)
        written = clt.decode_source(feature_acts[:, source], source)
        recons[targets.start : targets.stop] += written.transpose(0, 1)
    recons[:, decoded_positions(bos)] += clt.b_dec[:, None, :]
    skipped = torch.stack([skip_output(clt, x[:, t], t, bos) for t in clt.layers])
    errors = mlp_out - recons - skipped
    if bos == "drop":
        errors[:, 0] = 0
    layer, pos, feature = torch.nonzero(feature_acts.transpose(0, 1), as_tuple=True)
    active = ActiveFeatures(layer, pos, feature, feature_acts[pos, layer, feature])
    return _MLPParts(active, errors, list(mlp_out - skipped))


def decoded_positions(bos: Bos) -> slice:
    """Positions where the CLT's features and b_dec stand in for the MLPs."""
    return slice(0 if bos == "features" else 1, None)


def skip_output(clt: CrossLayerTranscoder, x: Stream, layer: int, bos: Bos) -> Stream:
    """What a skip connection writes: nothing at position 0 where its whole MLP output counts as error."""
    if clt.W_skip is None:
        return torch.zeros_like(x)
    written = clt.skip(x, layer)
    return torch.cat([torch.zeros_like(written[:1]), written[1:]]) if bos == "error" else written


@torch.no_grad()
def _check_logits(local: LocalReplacementModel) -> None:
    """Raise unless the local replacement model gives the model's own logits."""
    reads = local.run(local.sites)
    worst = float((reads.logits - local.clean.logits).abs().max())
    allowed = torch.finfo(reads.logits.dtype).eps ** 0.5 * float(local.clean.logits.abs().max().clamp_min(1))
    if not worst <= allowed:
        raise LocalModelMismatch(
            f"The local replacement model of {model_name(local.model)} gives other logits (off by {worst:.2g})."
            " Something in this architecture is not held by attention patterns and norm scales; its graph"
            " would be wrong. Please report the model."
        )


def _require_traceable(model: HookedModel) -> None:
    name, known = model_name(model), model.hook_dict
    if getattr(model.cfg, "post_embedding_ln", False) or "embed.ln.hook_scale" in known:
        raise ModelUnsupported(f"{name} normalises its embeddings, which tracing does not know yet.")
    if getattr(model.cfg, "positional_embedding_type", "") == "shortformer":
        raise ModelUnsupported(f"{name} has shortformer position embeddings, which tracing does not know.")
    for layer in range(model.cfg.n_layers):
        for hook in ("hook_attn_out", "attn.hook_pattern"):
            if block_hook(layer, hook) not in known:
                raise ModelUnsupported(
                    f"{name} has no {block_hook(layer, hook)}: tracing needs softmax attention in every block."
                )


def _put(tensor: Tensor, hook: object, value: Tensor) -> Tensor:
    return value[None].to(tensor.dtype)
