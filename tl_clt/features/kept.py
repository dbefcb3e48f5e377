"""The contexts that a pass over text keeps of each feature: some slots, filled by a total order, so that neither the
order in which prompts come nor who sees which of them matters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float, Float16, Int32, Int64
from torch import Tensor

LAST = torch.iinfo(torch.int64).max
"""The rank of an empty slot."""


class Windows(NamedTuple):
    """Token ids around the peaks of some contexts, and activations there."""

    tokens: Int32[Tensor, "n width"]
    """-1 beyond the prompt's ends."""

    shares: Float16[Tensor, "n width"]
    """Activation as a share of the peak's, which keeps small and huge ones within float16."""


class KeptContexts:
    """The `n_slots` contexts of lowest rank of each feature, equal ranks by prompt. A context is the window around the
    greatest activation of one feature in one prompt."""

    def __init__(self, n_features: int, n_slots: int, width: int, device: torch.device) -> None:
        shape = (n_features, n_slots)
        self.rank = torch.full(shape, LAST, dtype=torch.int64, device=device)
        self.prompt = torch.full(shape, LAST, dtype=torch.int64, device=device)
        self.peak = torch.zeros(shape, dtype=torch.float32, device=device)
        self.tokens = torch.full((*shape, width), -1, dtype=torch.int32, device=device)
        self.shares = torch.zeros((*shape, width), dtype=torch.float16, device=device)

    @staticmethod
    def bytes_per_feature(n_slots: int, width: int) -> int:
        """Memory that one feature takes."""
        return n_slots * (8 + 8 + 4 + 6 * width)

    def add(
        self,
        features: Int64[Tensor, " n"],
        rank: Int64[Tensor, "n m"],
        prompt: Int64[Tensor, "n m"],
        peak: Float[Tensor, "n m"],
        windows: Callable[[Int64[Tensor, " c"], Int64[Tensor, " c"]], Windows],
    ) -> None:
        """Keep of what is there and of m new contexts of each of n features those of lowest rank.

        Args:
            features: which they are, each once.
            rank, prompt, peak: of the new contexts; `LAST` in rank marks none.
            windows: what stands around the new contexts (i, j) that are kept, asked for by rows i and columns j.
        """
        n_slots = self.rank.shape[1]
        # Later in a text most features have nothing that could still come in.
        open_to = torch.nonzero((rank <= self.rank[features].amax(dim=1, keepdim=True)).any(dim=1)).flatten()
        features, rank, prompt, peak = features[open_to], rank[open_to], prompt[open_to], peak[open_to]
        ranks = torch.cat([self.rank[features], rank], dim=1)
        prompts = torch.cat([self.prompt[features], prompt], dim=1)
        peaks = torch.cat([self.peak[features], peak.to(torch.float32)], dim=1)
        by_prompt = prompts.argsort(dim=1, stable=True)
        order = by_prompt.gather(1, ranks.gather(1, by_prompt).argsort(dim=1, stable=True))[:, :n_slots]
        self.rank[features] = ranks.gather(1, order)
        self.prompt[features] = prompts.gather(1, order)
        self.peak[features] = peaks.gather(1, order)

        before = order.clamp(max=n_slots - 1)[..., None]
        tokens = self.tokens[features].take_along_dim(before, dim=1)
        shares = self.shares[features].take_along_dim(before, dim=1)
        rows, slots = torch.nonzero((order >= n_slots) & (ranks.gather(1, order) < LAST), as_tuple=True)
        if len(rows):
            new = windows(open_to[rows], order[rows, slots] - n_slots)
            tokens[rows, slots], shares[rows, slots] = new.tokens, new.shares
        self.tokens[features], self.shares[features] = tokens, shares

    def merge(self, tensors: Mapping[str, Tensor], prefix: str) -> None:
        """Add what another pass kept, as `tensors` of it has it."""
        other = {name: tensors[prefix + name].to(self.rank.device) for name in self._names}
        everyone = torch.arange(len(self.rank), device=self.rank.device)
        self.add(
            everyone,
            other["rank"],
            other["prompt"],
            other["peak"],
            lambda rows, slots: Windows(other["tokens"][rows, slots], other["shares"][rows, slots]),
        )

    def named_tensors(self, prefix: str) -> dict[str, Tensor]:
        """All of it, for a file."""
        return {prefix + name: getattr(self, name) for name in self._names}

    _names = ("rank", "prompt", "peak", "tokens", "shares")


def rank_by_peak(peak: Float[Tensor, "n m"]) -> Int64[Tensor, "n m"]:
    """The greatest activation first: `LAST` where there is none. The bits of positive floats are in their order."""
    bits = peak.to(torch.float32).contiguous().view(torch.int32).to(torch.int64)
    return torch.where(peak > 0, 2**31 - bits, LAST)


def rank_at_random(
    features: Int64[Tensor, " n"], prompt: Int64[Tensor, " m"], peak: Float[Tensor, "n m"]
) -> Int64[Tensor, "n m"]:
    """A number that looks random and depends on feature and prompt alone: the lowest of them are a uniform sample of
    the prompts in which a feature is active, whoever draws it. `LAST` where it is not."""
    mixed = features[:, None] * -7046029254386353131 + prompt[None, :] * -4417276706812531889 + 1442695040888963407
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685), (31, 1)):
        # A logical shift: the sign's copies are masked off.
        mixed = (mixed ^ ((mixed >> shift) & (2 ** (64 - shift) - 1))) * factor
    return torch.where(peak > 0, mixed & (2**62 - 1), LAST)
