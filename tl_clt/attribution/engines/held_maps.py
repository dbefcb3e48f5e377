"""Attention and norms, held at one prompt's values, as the plain matrices that the sweep multiplies with.

A norm with its scale held is `gain * (x - mean(x)) / scale`. Gain and centring are folded into W_V and W_O, which
depend on the model alone; scales are folded into the patterns, which depend on the prompt. What is left of an
attention layer is three products: W_O, the pattern, W_V.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from tl_clt.attribution.local import LocalReplacementModel, tracing_dtype
from tl_clt.errors import ModelUnsupported
from tl_clt.lens import (
    MLP_IN,
    MLP_OUT,
    HookedModel,
    NormMap,
    block_hook,
    is_parallel,
    mlp_norms,
    model_name,
    norm_map,
    ov_weights,
)
from tl_clt.transcoder import CrossLayerTranscoder

INPUT_HOOKS = ("hook_resid_mid", "hook_resid_pre", "ln2.hook_normalized", MLP_IN)
OUTPUT_HOOKS = ("hook_mlp_out", MLP_OUT)


class FoldedOV(NamedTuple):
    """Transposed attention weights of one layer, with the gain and centring of the norms around it."""

    from_out: Float[Tensor, "d_model heads_x_d_head"]
    """W_O^T after the transpose of the norm behind attention (Gemma)."""
    to_in: Float[Tensor, "key_value_heads_x_d_head d_model"]
    """W_V^T, then the transpose of ln1."""
    n_heads: int
    n_key_value_heads: int


class NamedNorm(NamedTuple):
    """A norm of the model's, and the part of it that is linear once its scale is held."""

    name: str
    """For example `blocks.3.ln2`."""
    map: NormMap


class FoldedModel(NamedTuple):
    """What the sweep needs of a model, whatever the prompt."""

    attention: list[FoldedOV]
    ln_final: NormMap | None
    read_norms: list[NamedNorm | None]
    """Between the residual stream and the CLT's inputs: for `mlp.hook_in` the whole norm, for `ln2.hook_normalized`
    without its gain, which comes after that hook; None for CLTs that read the residual stream."""
    write_norms: list[NamedNorm | None]
    """Between the CLT's outputs and the residual stream: for `mlp.hook_out` the norm behind the MLP (Gemma)."""
    parallel: bool
    reads_mid: bool
    """Whether the CLT reads after attention, rather than at the block's input."""


def fold_model(model: HookedModel, clt: CrossLayerTranscoder) -> FoldedModel:
    """Fold norms into the attention weights.

    Raises:
        ModelUnsupported: norms, attention or hooks that the sweep does not know.
    """
    cfg, name = clt.cfg, model_name(model)
    if cfg.input_hook not in INPUT_HOOKS or cfg.output_hook not in OUTPUT_HOOKS:
        raise ModelUnsupported(
            f"The sweep knows CLTs that read {', '.join(INPUT_HOOKS)} and write {' or '.join(OUTPUT_HOOKS)}; this one"
            f" reads {cfg.input_hook} and writes {cfg.output_hook}. Trace with engine='autograd'."
        )
    if getattr(model.cfg, "use_hook_mlp_in", False):
        raise ModelUnsupported(f"{name} splits its MLP inputs (use_hook_mlp_in). Trace with engine='autograd'.")
    dtype, parallel = tracing_dtype(model), is_parallel(model)
    read_norms: list[NamedNorm | None] = [None] * cfg.n_layers
    write_norms: list[NamedNorm | None] = [None] * cfg.n_layers
    for t in clt.layers:
        norms = mlp_norms(model, t)
        if cfg.input_hook in ("ln2.hook_normalized", MLP_IN):
            norm = _named_norm(model, norms.before)
            if norm is not None and cfg.input_hook != MLP_IN:
                norm = NamedNorm(norm.name, norm.map._replace(gain=None))
            read_norms[t] = norm
        if cfg.output_hook == MLP_OUT:
            write_norms[t] = _named_norm(model, norms.behind)
    return FoldedModel(
        [_fold_attention(model, t, dtype) for t in clt.layers],
        norm_map(model, "ln_final"),
        read_norms,
        write_norms,
        parallel,
        not parallel and cfg.input_hook != "hook_resid_pre",
    )


def _named_norm(model: HookedModel, name: str | None) -> NamedNorm | None:
    found = None if name is None else norm_map(model, name)
    return None if name is None or found is None else NamedNorm(name, found)


def _fold_attention(model: HookedModel, layer: int, dtype: torch.dtype) -> FoldedOV:
    W_V, W_O = ov_weights(model, layer)
    before, behind = norm_map(model, f"blocks.{layer}.ln1"), norm_map(model, f"blocks.{layer}.ln1_post")
    to_in = rearrange(W_V.to(dtype), "head d_model d_head -> (head d_head) d_model")
    to_in = transposed_norm(before, to_in)
    # A view: without a norm behind attention, the model's own weights serve.
    from_out = rearrange(W_O.to(dtype), "head d_head d_model -> (head d_head) d_model").T
    if behind is not None:
        from_out = from_out - from_out.mean(dim=0) if behind.centred else from_out
        from_out = from_out if behind.gain is None else behind.gain.to(dtype)[:, None] * from_out
    return FoldedOV(from_out, to_in.contiguous(), len(W_O), len(W_V))


def transposed_norm(norm: NormMap | None, directions: Float[Tensor, "*n d_model"]) -> Float[Tensor, "*n d_model"]:
    """The transpose of a held norm, but for its scale."""
    if norm is None:
        return directions
    if norm.gain is not None:
        directions = directions * norm.gain.to(directions.dtype)
    return directions - directions.mean(dim=-1, keepdim=True) if norm.centred else directions


class HeldMaps:
    """One prompt's held attention and read-outs."""

    def __init__(self, local: LocalReplacementModel, folded: FoldedModel) -> None:
        self.local = local
        self.folded = folded
        self.n_layers = local.n_layers
        self.patterns = [self._scaled_pattern(t) for t in range(local.n_layers)]
        self.final_scale = self._scale("ln_final")
        self.read_scales = [self._scale_of(norm) for norm in folded.read_norms]
        self.write_scales = [self._scale_of(norm) for norm in folded.write_norms]

    def _scale(self, norm: str) -> Float[Tensor, " pos"]:
        name, like = f"{norm}.hook_scale", self.local.sites.embed
        if name not in self.local.held:
            return torch.ones_like(like[:, 0])
        # Split query, key and value inputs give a scale a head, all the same.
        return self.local.held[name][0].reshape(len(like), -1)[:, 0].to(like.dtype)

    def _scale_of(self, norm: NamedNorm | None) -> Float[Tensor, " pos"] | None:
        return None if norm is None else self._scale(norm.name)

    def _scaled_pattern(self, layer: int) -> Float[Tensor, "n_heads key query"]:
        pattern = self.local.held[block_hook(layer, "attn.hook_pattern")][0].to(self.local.dtype)
        into, out = self._scale(f"blocks.{layer}.ln1"), self._scale(f"blocks.{layer}.ln1_post")
        scaled = rearrange(pattern, "head query key -> head key query") / into[:, None]
        if self.folded_behind(layer):
            scaled = scaled / out
        return scaled.contiguous()

    def folded_behind(self, layer: int) -> bool:
        """Whether there is a norm behind attention."""
        return f"blocks.{layer}.ln1_post.hook_scale" in self.local.held

    def depths(self, point: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        """How deep in the model each read point lies: 2l at the input of block l, 2l + 1 between its attention
        and MLP, 2l + 2 at its output."""
        by_point = [2 * t + int(self.folded.reads_mid) for t in range(self.n_layers)] + [2 * self.n_layers]
        for hook in self.local.extra_points:
            _, block, place = hook.split(".")
            by_point.append(2 * int(block) + {"hook_resid_pre": 0, "hook_resid_mid": 1, "hook_resid_post": 2}[place])
        return torch.tensor(by_point, device=point.device)[point]

    def seeds(
        self, point: Int[Tensor, " n"], pos: Int[Tensor, " n"], directions: Float[Tensor, "n d_model"]
    ) -> Float[Tensor, "n d_model"]:
        """Directions at read points, carried back through the norm in front of them to the residual stream."""
        seeds = directions.clone()
        at_end = torch.nonzero(point == self.n_layers).flatten()
        if len(at_end):
            back = transposed_norm(self.folded.ln_final, directions[at_end])
            seeds[at_end] = back / self.final_scale[pos[at_end], None]
        if any(self.folded.read_norms):
            for t in point[point < self.n_layers].unique().tolist():
                at = torch.nonzero(point == t).flatten()
                seeds[at] = self.input_transposed(t, directions[at], pos[at])
        return seeds

    def input_transposed(
        self, layer: int, directions: Float[Tensor, "*n d_model"], pos: Int[Tensor, " m"] | slice
    ) -> Float[Tensor, "*n d_model"]:
        """From a CLT's input at one layer back to the residual stream."""
        norm, scale = self.folded.read_norms[layer], self.read_scales[layer]
        if norm is None or scale is None:
            return directions
        return transposed_norm(norm.map, directions) / scale[pos, None]

    def output_transposed(
        self, layer: int, directions: Float[Tensor, "*n pos d_model"]
    ) -> Float[Tensor, "*n pos d_model"]:
        """From the residual stream behind one layer's MLP back to the CLT's output."""
        norm, scale = self.folded.write_norms[layer], self.write_scales[layer]
        if norm is None or scale is None:
            return directions
        return transposed_norm(norm.map, directions) / scale[: directions.shape[-2], None]

    def written(self, layer: int, vectors: Float[Tensor, "n d_model"], pos: int) -> Float[Tensor, "n d_model"]:
        """What vectors at the CLT's output of one layer and position write into the residual stream."""
        norm, scale = self.folded.write_norms[layer], self.write_scales[layer]
        if norm is None or scale is None:
            return vectors
        if norm.map.centred:
            vectors = vectors - vectors.mean(dim=-1, keepdim=True)
        if norm.map.gain is not None:
            vectors = vectors * norm.map.gain.to(vectors.dtype)
        return vectors / scale[pos]

    def carried(self, x: Float[Tensor, "pos d_model"]) -> list[Float[Tensor, "_ d_model"]]:
        """What embeddings write through the first attention layer: to each position, from every one up to it."""
        ov, pattern = self.folded.attention[0], self.patterns[0]
        values = rearrange(x @ ov.to_in.T, "key (group d_head) -> key group d_head", group=ov.n_key_value_heads)
        values = values.repeat_interleave(ov.n_heads // ov.n_key_value_heads, dim=1)
        W_O = ov.from_out.T
        written = []
        for q in range(len(x)):
            weighed = values[: q + 1] * rearrange(pattern[:, : q + 1, q], "head key -> key head 1")
            written.append(weighed.flatten(start_dim=1) @ W_O)
        return written
