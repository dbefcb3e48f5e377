"""What a sweep reads: the next token after one position of one prompt, with interventions and without."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tl_clt.arguments import as_whole
from tl_clt.attribution.targets import TargetsGiven, as_token_ids
from tl_clt.errors import InterventionError
from tl_clt.interventions.intervene import intervene
from tl_clt.interventions.intervention import AnyIntervention
from tl_clt.lens import Freeze, HookedModel, Prompt, to_tokens, token_strings
from tl_clt.shapes import Tokens
from tl_clt.transcoder import CrossLayerTranscoder


class Outcome(NamedTuple):
    """The next token in one run."""

    probabilities: Float[Tensor, " d_vocab"]
    logits: Float[Tensor, " d_vocab"]
    """Less their mean over the vocabulary."""

    @property
    def answer(self) -> int:
        """The likeliest token."""
        return int(self.logits.argmax())


class Reading(NamedTuple):
    """One named token in one run."""

    token: str
    token_id: int
    probability: float
    logit: float


class Outcomes:
    """Runs interventions on one prompt and reads named tokens after one position.

    Raises:
        InterventionError: a position that is not there, or no token.
        TargetError: a token that is not one.
        PromptError, TokenizerMissing: as `to_tokens`.
    """

    def __init__(
        self,
        model: HookedModel,
        clt: CrossLayerTranscoder,
        prompt: Prompt,
        tokens: TargetsGiven,
        pos: int,
        freeze: Freeze,
    ) -> None:
        self.model, self.clt = model, clt
        self.freeze: Freeze = freeze
        self.prompt: Tokens = to_tokens(model, prompt)
        n_pos = len(self.prompt)
        self.pos = as_whole("pos", pos, -n_pos, n_pos - 1, why="the prompt's positions", error=InterventionError)
        self.ids = as_token_ids(model, tokens)
        if not self.ids:
            raise InterventionError("There are no tokens to report: name at least one.")

    def of(self, interventions: Sequence[AnyIntervention], through_layer: int | None) -> Outcome:
        """The outcome of one run."""
        effect = intervene(self.model, self.clt, self.prompt, interventions, through_layer, self.freeze)
        logits = effect.logits[0, self.pos].double()
        return Outcome(logits.softmax(dim=-1), logits - logits.mean())

    def clean(self) -> Outcome:
        """The outcome of the model itself."""
        return self.of([], -1)

    def read(self, outcome: Outcome) -> list[Reading]:
        """The named tokens in one run."""
        pairs = zip(self.texts(self.ids), self.ids, strict=True)
        return [Reading(text, i, float(outcome.probabilities[i]), float(outcome.logits[i])) for text, i in pairs]

    def texts(self, ids: list[int]) -> list[str]:
        """Tokens as text, or #id without a tokenizer."""
        return token_strings(self.model, torch.tensor(ids))
