"""What an intervention did: logits and features with it and without."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from pandas import DataFrame
from torch import Tensor

from tl_clt.arguments import as_whole
from tl_clt.errors import InterventionError
from tl_clt.lens import HookedModel, PromptRows, token_strings
from tl_clt.shapes import Logits, TokenBatch
from tl_clt.transcoder import CrossLayerTranscoder

Inputs = Float[Tensor, "batch pos n_layers d_model"]
Acts = Float[Tensor, "batch pos n_layers d_transcoder"]


class InactiveFeature(NamedTuple):
    """A feature that was changed though it is active at none of the positions named, in the clean run."""

    prompt: int
    """Which of the batch."""
    layer: int
    feature: int

    def __str__(self) -> str:
        return f"feature {self.layer}.{self.feature} is not active there in prompt {self.prompt}"


class Recorded(NamedTuple):
    """What passed a hook."""

    value: Tensor
    """In the intervened run."""
    baseline: Tensor
    """In the clean run."""


@dataclass(frozen=True, kw_only=True, eq=False)
class InterventionEffect:
    """A run with an intervention (no prefix) and the clean run (`baseline_`) of the same prompts."""

    tokens: TokenBatch
    """The prompts, padded where their lengths differ."""

    attention_mask: Int[Tensor, "batch pos"] | None = None
    """1 where a row has its own tokens, 0 at padding; None where nothing is padded."""

    logits: Logits
    """Of the intervened run, as the model gives them."""

    baseline_logits: Logits
    """Of the clean run."""

    feature_acts: Acts
    """Of the intervened run: what features read there. Changed features have the values they were set to."""

    baseline_feature_acts: Acts
    """Of the clean run."""

    inputs: Inputs
    """What features read in the intervened run."""

    baseline_inputs: Inputs
    """What features read in the clean run."""

    inactive: list[InactiveFeature]
    """Features that were changed though they are not active: suppressing one does nothing."""

    recorded: dict[str, Recorded] = field(default_factory=dict)
    """By name, what passed the hooks that `record` named."""

    model: HookedModel = field(repr=False)
    clt: CrossLayerTranscoder = field(repr=False)

    def __repr__(self) -> str:
        batch, pos = self.tokens.shape
        inactive = f", inactive: {'; '.join(map(str, self.inactive))}" if self.inactive else ""
        return f"InterventionEffect({batch} prompts of {pos} tokens{inactive})"

    @property
    def hidden_pre(self) -> Acts:
        """Pre-activations in the intervened run. Their change is what an edge of a graph predicts."""
        return self._hidden_pre(self.inputs)

    @property
    def baseline_hidden_pre(self) -> Acts:
        """Pre-activations in the clean run."""
        return self._hidden_pre(self.baseline_inputs)

    def _hidden_pre(self, inputs: Inputs) -> Acts:
        each = [self.clt.encode_layer(inputs[..., t, :], t).hidden_pre.detach() for t in self.clt.layers]
        return torch.stack(each, dim=-2)

    def top_changes(self, k: int = 10, pos: int = -1) -> DataFrame:
        """The k tokens of each prompt whose probability of coming next changed most.

        Args:
            k: rows for each prompt.
            pos: position within each prompt after which the token comes; the last one unless said otherwise.

        Returns:
            Columns prompt (number in the batch), token (text, or #id without a tokenizer), token_id, before and
            after (probabilities), change (after - before), logit_change; the largest change first.

        Raises:
            InterventionError: k or pos is out of range.
        """
        d_vocab = self.logits.shape[-1]
        rows = PromptRows(self.tokens, self.attention_mask)
        n_pos = min(rows.lengths)
        k = as_whole("k", k, 1, d_vocab, why="the size of the vocabulary", error=InterventionError)
        pos = as_whole("pos", pos, -n_pos, n_pos - 1, why="the positions of the prompts", error=InterventionError)
        columns = [offset + pos % n for offset, n in zip(rows.offsets, rows.lengths, strict=True)]
        at = (range(len(columns)), columns)
        before, after = (x[at].double().softmax(dim=-1) for x in (self.baseline_logits, self.logits))
        logit_change = (self.logits - self.baseline_logits)[at]
        table = []
        for prompt, ids in enumerate((after - before).abs().topk(k).indices):
            for token, text in zip(ids.tolist(), token_strings(self.model, ids), strict=True):
                b, a = float(before[prompt, token]), float(after[prompt, token])
                table.append((prompt, text, token, b, a, a - b, float(logit_change[prompt, token])))
        names = ["prompt", "token", "token_id", "before", "after", "change", "logit_change"]
        return DataFrame(table, columns=names)
