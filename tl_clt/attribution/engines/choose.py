"""Which engine traces a prompt, and whether the sweep knows the model: it is tested on each prompt."""

from __future__ import annotations

import warnings
from typing import Literal

import torch

from tl_clt.attribution.engines.autograd import AutogradEngine
from tl_clt.attribution.engines.engine import Engine
from tl_clt.attribution.engines.held_maps import FoldedModel, fold_model
from tl_clt.attribution.engines.sweep import SweepEngine
from tl_clt.attribution.local import LocalReplacementModel, decoded_positions
from tl_clt.attribution.nodes import NodeKind, Nodes
from tl_clt.attribution.sources import Segment, SiteVectors, Sources
from tl_clt.attribution.streams import Readouts
from tl_clt.attribution.targets import feature_readouts, read_values
from tl_clt.errors import LocalModelMismatch, ModelUnsupported
from tl_clt.lens import HookedModel, dtype_of, model_name
from tl_clt.transcoder import CrossLayerTranscoder

EngineChoice = Literal["auto", "sweep", "autograd"]


class EngineMaker:
    """Makes the engine of each prompt of one call; what depends on the model alone is made once.

    Raises:
        ModelUnsupported: "sweep" was asked for, and does not know the model.
    """

    def __init__(self, choice: EngineChoice, model: HookedModel, clt: CrossLayerTranscoder) -> None:
        self.choice = choice
        self.folded: FoldedModel | None = None
        if choice == "autograd":
            return
        try:
            self.folded = fold_model(model, clt)
        except ModelUnsupported as error:
            if choice == "sweep":
                raise
            warnings.warn(f"{error} Doing so.", stacklevel=4)

    def make(self, local: LocalReplacementModel, sources: Sources, targets: Readouts) -> Engine:
        """The engine of one prompt, tested on it.

        Raises:
            LocalModelMismatch: it does not give what the model's own code gives.
        """
        whole = _one_source(local)
        if self.folded is not None:
            off = _how_far_off(SweepEngine(local, whole, self.folded), targets)
            if off <= 1:
                return SweepEngine(local, sources, self.folded)
            message = (
                f"The sweep does not know the architecture of {model_name(local.model)}: what it carries to the targets"
                f" is off by {off:.1g} times what rounding explains. Trace with engine='autograd'."
            )
            if self.choice == "sweep":
                raise LocalModelMismatch(message)
            warnings.warn(f"{message} Doing so.", stacklevel=4)
            self.folded = None
        engine = AutogradEngine(local, whole)
        off = _how_far_off(engine, targets)
        if not off <= 1:
            raise LocalModelMismatch(
                f"Gradients through {model_name(local.model)} do not carry what is written to the targets: the sums of"
                f" in-edges would be off by {off:.1g} times what rounding explains. Its graph would be wrong. Please"
                " report the model."
            )
        engine.sources = sources
        return engine


@torch.no_grad()
def _one_source(local: LocalReplacementModel) -> Sources:
    """All that is written, as one node: each target then has one in-edge from everything."""
    biases = local.biases()
    skips = biases.mlp.clone()
    skips[:, decoded_positions(local.bos)] -= local.clt.b_dec[:, None, :].to(skips.dtype)
    mlp = [written + skip for written, skip in zip(local.sites.mlp, skips, strict=True)]
    at = local.sites
    whole = SiteVectors(
        _one_node(at.embed),
        [] if at.pos_embed is None else _one_node(at.pos_embed),
        [_one_node(written) for written in biases.attn],
        [_one_node(written) for written in mlp],
    )
    none = local.tokens[:1]
    node = Nodes.build([(NodeKind.BIAS, none * 0, none * 0, none * 0, at.embed[:1, 0])])
    return Sources(node, whole, local.writes(bias_nodes=False)._replace(biases=None))


@torch.no_grad()
def _how_far_off(engine: Engine, targets: Readouts) -> float:
    """By how many times what rounding explains an engine that carries everything as one source misses what is read,
    at the targets and one feature a layer."""
    local = engine.local
    readouts, biases = _probes(local, targets), local.biases()
    found = engine.rows(readouts)[:, 0]
    where = zip(readouts.point.tolist(), readouts.pos.tolist(), strict=True)
    read_biases = torch.stack([biases.reads[point][pos] for point, pos in where])
    wanted = read_values(local, readouts) - readouts.constants - (read_biases * readouts.directions).sum(dim=-1)
    size = torch.stack([local.clean.points[p].norm(dim=-1).max() for p in readouts.point.tolist()])
    allowed = torch.finfo(dtype_of(local.model)).eps ** 0.5 * size * readouts.directions.norm(dim=-1)
    off = float(((found - wanted).abs() / allowed.clamp_min(1e-30)).max())
    return off if off == off else float("inf")


def _probes(local: LocalReplacementModel, targets: Readouts) -> Readouts:
    """The targets, and the last active feature of each layer."""
    features = local.features
    last = [torch.nonzero(features.layer == t).flatten()[-1:] for t in range(local.n_layers)]
    chosen = torch.cat(last)
    probes = feature_readouts(local, features.layer[chosen], features.pos[chosen], features.feature[chosen])
    return Readouts(*(torch.cat(parts) for parts in zip(targets, probes, strict=True)))


def _one_node(vectors: torch.Tensor) -> list[Segment]:
    zero = torch.zeros(1, dtype=torch.long, device=vectors.device)
    return [Segment(p, zero, vectors[p : p + 1], 0) for p in range(len(vectors))]
