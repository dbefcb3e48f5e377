"""The local replacement model of one prompt (Methods, "The Local Replacement Model").

The CLT stands in for the MLPs; attention patterns and norm scales are held at this prompt's values; the error
`mlp_out - recons` is added back at each (layer, pos). Between features everything is then linear: what is
written into the residual stream (at a "site") reaches what is read from it through a fixed linear map.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from tl_clt.arguments import as_choice
from tl_clt.attribution.streams import ActiveFeatures, Biases, Bos, Reads, Sites, Stream, Streams, Writes
from tl_clt.errors import LocalModelMismatch, ModelUnsupported
from tl_clt.lens import (
    MLP_OUT,
    FwdHook,
    HookedModel,
    block_hook,
    dtype_of,
    frozen_hooks,
    is_frozen_hook,
    logit_scale,
    mlp_norms,
    model_name,
    require_held,
    run_with_cache,
    run_with_hooks,
    tap_unembedding,
    to_tokens,
    user_hooks_aside,
)
from tl_clt.replacement import check_fit
from tl_clt.shapes import Tokens
from tl_clt.transcoder import CrossLayerTranscoder


@dataclass(repr=False)
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
    attn_out: Streams
    """What each attention layer wrote on the clean run."""
    features: ActiveFeatures
    errors: Streams
    """mlp_out - recons; at position 0 by `bos`."""
    held: dict[str, Tensor]
    """Attention patterns and norm scales of the clean run, by hook."""
    norm_outputs: dict[str, Tensor]
    """Clean outputs of norms that a bridge computes by Hugging Face's own code."""
    extra_points: list[str]
    """Residual-stream hooks that targets read, in the order of their read points after ln_final's."""
    logit_scale: float = 1.0
    """What the model multiplies its unembedding's output by (Cohere, Granite)."""
    embed_scale: float = 1.0
    """What it multiplies token embeddings by behind `hook_embed` (Granite)."""
    rounding: dict[str, Tensor] = field(default_factory=dict)
    """Their difference from scale-held norms, a constant that counts as a bias. Filled by the first run."""
    _biases: Biases | None = None

    @property
    def n_layers(self) -> int:
        return self.clt.cfg.n_layers

    @property
    def dtype(self) -> torch.dtype:
        """Number type that graphs are computed in."""
        return tracing_dtype(self.model)

    @property
    def has_norm_behind(self) -> bool:
        """Whether a norm passes on what the CLT writes."""
        return self.clt.cfg.output_hook == MLP_OUT and mlp_norms(self.model, 0).behind is not None

    def run(self, sites: Sites) -> Reads:
        """The linear model: reads of given writes, through held patterns and scales. Differentiable."""
        points: dict[str, Tensor] = {}

        def write_mlp(mlp_out: Tensor, hook: object, layer: int) -> Tensor:
            x = points[block_hook(layer, self.clt.cfg.input_hook)]
            return (sites.mlp[layer] + skip_output(self.clt, x, layer, self.bos))[None].to(mlp_out.dtype)

        def add_attn(attn_out: Tensor, hook: object, layer: int) -> Tensor:
            return attn_out + sites.attn[layer][None].to(attn_out.dtype)

        return self._run(sites, write_mlp, add_attn, points)

    def biases(self) -> Biases:
        """What the model's and CLT's biases write and add on reading, by one run from an empty residual stream.

        Every attention layer sees zeros, so that its output is what biases alone make; it is noted and not
        passed on, so that the next layer sees zeros too.
        """
        if self._biases is None:
            self._biases = self._find_biases()
        return self._biases

    def _find_biases(self) -> Biases:
        zero = torch.zeros_like(self.sites.embed)
        points: dict[str, Tensor] = {}
        attn: list[Tensor] = [zero] * self.n_layers
        behind: list[Tensor] = [zero] * self.n_layers

        def silence_mlp(mlp_out: Tensor, hook: object, layer: int) -> Tensor:
            return torch.zeros_like(mlp_out)

        def note_behind(mlp_out: Tensor, hook: object, layer: int) -> Tensor:
            behind[layer] = mlp_out[0].to(self.dtype)
            return torch.zeros_like(mlp_out)

        def note_attn(attn_out: Tensor, hook: object, layer: int) -> Tensor:
            attn[layer] = attn_out[0].to(self.dtype)
            return torch.zeros_like(attn_out)

        pos_zero = None if self.sites.pos_embed is None else zero
        with torch.no_grad():
            nothing = Sites(zero, pos_zero, attn, attn)
            reads = self._run(nothing, silence_mlp, note_attn, points, note_behind)
            skips = [skip_output(self.clt, x, t, self.bos) for t, x in enumerate(reads.points[: self.n_layers])]
            mlp = torch.stack(skips)
            mlp[:, decoded_positions(self.bos)] += self.clt.b_dec[:, None, :].to(mlp.dtype)
            if any(bool(added.any()) for added in behind):
                added = torch.stack(behind)

                def put_ones(mlp_out: Tensor, hook: object, layer: int) -> Tensor:
                    return torch.ones_like(mlp_out)

                self._run(nothing, put_ones, note_attn, {}, note_behind)
                mlp += self._before_norm(added, torch.stack(behind) - added)
        return Biases(torch.stack(attn), mlp, reads.points)

    def _before_norm(self, added: Streams, gain: Streams) -> Streams:
        """What a norm behind the MLP adds by itself, as a vector in front of it that gives the same.

        Args:
            added: what it gives for zeros.
            gain: what it gives for ones, beyond that: with its scale held, gain / scale; zeros if it takes means off.
        """
        if bool(((gain == 0) & (added != 0)).any()):
            raise ModelUnsupported(
                f"The norm behind the MLPs of {model_name(self.model)} has a bias, which no node in front of it can"
                " carry. Use a CLT that writes hook_mlp_out."
            )
        return torch.where(added == 0, added, added / gain)

    @torch.no_grad()
    def follow(self, other: LocalReplacementModel) -> Biases:
        """What another prompt of the same length has beyond this one's held map: run along the other's residual
        stream with this prompt's patterns and scales, and note what its own attention and norms gave more."""
        if self.has_norm_behind:
            raise ModelUnsupported(
                f"contrast= does not know CLTs that write {MLP_OUT} in front of a norm, as this one of"
                f" {model_name(self.model)}. Trace the prompts by themselves, or use a CLT that writes hook_mlp_out."
            )
        points: dict[str, Tensor] = {}
        attn: list[Tensor] = [other.attn_out[0]] * self.n_layers

        def write_mlp(mlp_out: Tensor, hook: object, layer: int) -> Tensor:
            x = other.clean.points[layer]
            return (other.sites.mlp[layer] + skip_output(self.clt, x, layer, self.bos))[None].to(mlp_out.dtype)

        def own_attn(attn_out: Tensor, hook: object, layer: int) -> Tensor:
            attn[layer] = other.attn_out[layer] - attn_out[0].to(self.dtype)
            return other.attn_out[layer][None].to(attn_out.dtype)

        reads = self._run(other.sites, write_mlp, own_attn, points)
        beyond = [theirs - held for theirs, held in zip(other.clean.points, reads.points, strict=True)]
        skips = [skip_output(self.clt, x, t, self.bos) for t, x in enumerate(beyond[: self.n_layers])]
        return Biases(torch.stack(attn), torch.stack(skips), beyond)

    def writes(self, bias_nodes: bool) -> Writes:
        """All that the nodes of this prompt's graph write."""
        biases = self.biases() if bias_nodes else None
        at = self.sites
        pos_embed = at.pos_embed if bias_nodes else None
        return Writes(self.features, self.features.activation, self.errors, at.embed, pos_embed, biases)

    def _run(
        self,
        sites: Sites,
        on_mlp: Callable,
        on_attn: Callable,
        points: dict[str, Tensor],
        on_mlp_written: Callable | None = None,
    ) -> Reads:
        cfg, dtype = self.clt.cfg, self.dtype
        names = [*(block_hook(t, cfg.input_hook) for t in self.clt.layers), *self.extra_points]

        def keep_point(x: Tensor, hook: object, name: str) -> None:
            points[name] = x[0].to(dtype)

        hooks: list[FwdHook] = frozen_hooks(self.held)
        hooks += [(name, self._pin(name)) for name in self.norm_outputs]
        hooks.append(("hook_embed", _put(sites.embed)))
        if sites.pos_embed is not None:
            hooks.append(("hook_pos_embed", _put(sites.pos_embed)))
        # A read comes before a write: an MLP's skip connection reads what its hook saw just before.
        hooks += [(name, partial(keep_point, name=name)) for name in names]
        for t in self.clt.layers:
            hooks.append((block_hook(t, "hook_attn_out"), partial(on_attn, layer=t)))
            hooks.append((block_hook(t, cfg.output_hook), partial(on_mlp, layer=t)))
            if on_mlp_written is not None and cfg.output_hook == MLP_OUT:
                hooks.append((block_hook(t, "hook_mlp_out"), partial(on_mlp_written, layer=t)))
        with user_hooks_aside(self.model), tap_unembedding(self.model) as tap:
            run_with_hooks(self.model, self.tokens[None], hooks)
        seen = tap.get()
        values = [points[name] for name in names]
        values.insert(self.n_layers, seen.final[0].to(dtype))
        return Reads(values, seen.logits[0].to(dtype))

    def _pin(self, name: str) -> Callable:
        """Make a scale-held norm give, on the clean run, what the model's own code gave, to the bit."""

        def pin(out: Tensor, hook: object) -> Tensor:
            if name not in self.rounding:
                self.rounding[name] = (self.norm_outputs[name] - out).detach()
            return out + self.rounding[name]

        return pin


def build_local_model(
    model: HookedModel,
    clt: CrossLayerTranscoder,
    tokens: Tokens,
    bos: Bos = "error",
    extra_points: Sequence[str] = (),
) -> LocalReplacementModel:
    """Run one prompt and set up its local replacement model.

    Args:
        model, clt: a model and a CLT that fits it.
        tokens: the prompt, [pos].
        bos: what position 0, whose activations are huge and mean nothing, contributes: "error" puts its whole
            MLP outputs into error nodes, "drop" leaves out its features and errors, "features" keeps both. A skip
            connection is linear at position 0 unless that is "error".
        extra_points: residual-stream hooks to read besides the CLT's inputs.

    Raises:
        ModelUnsupported: the model lacks a hook that tracing needs, normalises its embeddings, or does something
            between unembedding and logits that is no scale and no soft-cap; or hooks do not hold what is to be held.
        LocalModelMismatch: the local replacement model does not give the model's logits.
    """
    check_fit(model, clt)
    tokens, bos = to_tokens(model, tokens), as_choice("bos", bos, get_args(Bos))
    _require_traceable(model)
    require_held(model, tokens[None], anew=True)
    cfg, dtype = clt.cfg, tracing_dtype(model)
    in_hooks = [block_hook(t, cfg.input_hook) for t in clt.layers]
    out_hooks = [block_hook(t, cfg.output_hook) for t in clt.layers]
    attn_hooks = [block_hook(t, "hook_attn_out") for t in clt.layers]
    known = model.hook_dict
    norms = {n.removesuffix("hook_scale") + "hook_out" for n in known if n.endswith("hook_scale")}
    norms &= set(known)
    start = block_hook(0, "hook_resid_pre")
    wanted = {"hook_embed", "hook_pos_embed", start, *in_hooks, *out_hooks, *attn_hooks, *norms, *extra_points}
    with user_hooks_aside(model), tap_unembedding(model) as tap:
        logits, cache = run_with_cache(model, tokens[None], lambda n: n in wanted or is_frozen_hook(n))
    seen = tap.get()

    def clean(name: str) -> Tensor:
        return cache[name][0].to(dtype)

    points = [clean(name) for name in (*in_hooks, *extra_points)]
    points.insert(cfg.n_layers, seen.final[0].detach().to(dtype))
    written = _split(clt, points[: cfg.n_layers], torch.stack([clean(name) for name in out_hooks]), bos)
    embed = clean("hook_embed")
    pos_embed = clean("hook_pos_embed") if "hook_pos_embed" in cache else None
    local = LocalReplacementModel(
        model=model,
        clt=clt,
        tokens=tokens,
        bos=bos,
        logits=logits[0],
        clean=Reads(points, seen.logits[0].detach().to(dtype)),
        sites=Sites(embed, pos_embed, [torch.zeros_like(embed)] * cfg.n_layers, written.sites),
        attn_out=torch.stack([clean(name) for name in attn_hooks]),
        features=written.features,
        errors=written.errors,
        held={name: cache[name] for name in cache.keys() if is_frozen_hook(name)},
        norm_outputs={name: cache[name] for name in norms},
        extra_points=list(extra_points),
        logit_scale=logit_scale(model, seen, logits),
        embed_scale=_embed_scale(embed, clean(start) if pos_embed is None else clean(start) - pos_embed),
    )
    _check_logits(local)
    return local


def tracing_dtype(model: HookedModel) -> torch.dtype:
    """float64 for models in float64, else float32: half-precision models are traced with float32 sums."""
    return torch.float64 if dtype_of(model) == torch.float64 else torch.float32


def _embed_scale(embed: Stream, into_blocks: Stream) -> float:
    """The one factor between token embeddings and what goes into block 0; 1 where there is none."""
    scale = float((embed * into_blocks).sum() / embed.square().sum().clamp_min(1e-30))
    return scale if abs(scale - 1) > torch.finfo(embed.dtype).eps ** 0.5 else 1.0


class _MLPParts(NamedTuple):
    """MLP outputs, split into what features write and the rest."""

    features: ActiveFeatures
    errors: Streams
    sites: list[Stream]


@torch.no_grad()
def _split(clt: CrossLayerTranscoder, inputs: list[Stream], mlp_out: Streams, bos: Bos) -> _MLPParts:
    """Encode the clean run and split each MLP's output into features, b_dec, skip connection and error."""
    recons = torch.zeros_like(mlp_out)
    found = []
    for source in clt.layers:
        feature_acts = clt.encode_layer(inputs[source].to(clt.W_enc.dtype), source).feature_acts
        if bos != "features":
            feature_acts[0] = 0
        targets = clt.cfg.targets(source)
        written = clt.decode_source(feature_acts, source)
        recons[targets.start : targets.stop] += written.transpose(0, 1)
        pos, feature = torch.nonzero(feature_acts, as_tuple=True)
        found.append((torch.full_like(pos, source), pos, feature, feature_acts[pos, feature].to(mlp_out.dtype)))
    recons[:, decoded_positions(bos)] += clt.b_dec[:, None, :]
    skipped = torch.stack([skip_output(clt, inputs[t], t, bos) for t in clt.layers])
    errors = mlp_out - recons - skipped
    if bos == "drop":
        errors[:, 0] = 0
    active = ActiveFeatures(*(torch.cat(parts) for parts in zip(*found, strict=True)))
    return _MLPParts(active, errors, list(mlp_out - skipped))


def decoded_positions(bos: Bos) -> slice:
    """Positions where the CLT's features and b_dec stand in for the MLPs."""
    return slice(0 if bos == "features" else 1, None)


def skipped_positions(bos: Bos) -> slice:
    """Positions where the CLT's skip connection is part of what is linear, in graphs and in constrained interventions
    alike: not position 0 where its whole MLP output counts as error; with "drop" it is, as circuit-tracer has it."""
    return slice(1 if bos == "error" else 0, None)


def skip_output(clt: CrossLayerTranscoder, x: Stream, layer: int, bos: Bos) -> Stream:
    """What a skip connection writes, at the positions where it is linear; nothing at others."""
    written = torch.zeros_like(x)
    if clt.W_skip is not None:
        at = skipped_positions(bos)
        written[at] = clt.skip(x[at].to(clt.W_skip.dtype), layer).to(x.dtype)
    return written


@torch.no_grad()
def _check_logits(local: LocalReplacementModel) -> None:
    """Raise unless the local replacement model gives the model's own logits."""
    reads = local.run(local.sites)
    worst = float((reads.logits - local.clean.logits).abs().max())
    allowed = torch.finfo(dtype_of(local.model)).eps ** 0.5 * float(local.clean.logits.abs().max().clamp_min(1))
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


def _put(value: Stream) -> Callable:
    def put(tensor: Tensor, hook: object) -> Tensor:
        return value[None].to(tensor.dtype)

    return put
