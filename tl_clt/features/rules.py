"""Labels by rule: the values of variables of the text that tell best where a feature is active.

A variable gives every token of a prompt a value, or none: the token itself, the tokens up to it, the next token, or
what is known of a text that was made (the state that a sentence is about). A rule is a few values of variables, one of
which must hold. It is built up on text from which no example was taken: of all values of all variables that one comes
next that adds most to the share of the feature's activation that the rule accounts for, less the share of contexts in
which the feature is not active and that it takes in. Where one value tells its strongest activations apart, that one
is named as well. What a feature is most active at comes first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from tl_clt.features.contexts import Contexts, Firing
from tl_clt.features.store import FeatureRecord, GivenLabel, LabelPart

MOST_CLAUSES = 3
WORTH_A_CLAUSE = 0.1
"""What one more clause must add: share of activation, less share of contexts without any."""
WORTH_A_VARIABLE = 0.01
"""What a variable further down the list must add beyond those above it."""
STRONG, TOLD_APART = 0.9, 0.5
"""Strong activations are those of at least this share of the greatest. A value that tells them apart accounts for this
share of them, less that of all other contexts that it takes in."""
FEWEST_CONTEXTS = 3
"""Where a feature is active in fewer, it gets no label."""
SAY = "say "
"""Begins a label of what comes next."""


class Variable(NamedTuple):
    """Something that has a value at each token of a text, or none there."""

    name: str
    """What it is, for the detail of a label."""

    values: Callable[[Sequence[str]], Sequence[str | None]]
    """Of one prompt's tokens: the value at each."""

    label: Callable[[str, FeatureRecord], str]
    """A value in words, short."""


def quoted(value: str, record: FeatureRecord) -> str:
    """Text as it stands, in quotation marks."""
    return f'"{value.strip() or value}"'


def _say(value: str, record: FeatureRecord) -> str:
    promoted = {pair.token.strip() for pair in record.top_logits}
    return f"{SAY}{value.strip()}" if value.strip() in promoted else f'before "{value.strip()}"'


def _n_gram(n: int) -> Callable[[Sequence[str]], list[str | None]]:
    def values(tokens: Sequence[str]) -> list[str | None]:
        spaced = [t if t.startswith(" ") or i == 0 else f" {t}" for i, t in enumerate(tokens)]
        return [None if i < n - 1 else "".join(spaced[i - n + 1 : i + 1]).strip() for i in range(len(tokens))]

    return values


TOKEN = Variable("the token", lambda tokens: list(tokens), quoted)
NEXT_TOKEN = Variable("the next token", lambda tokens: [*tokens[1:], None], _say)
TWO_TOKENS = Variable("the last two tokens", _n_gram(2), quoted)
THREE_TOKENS = Variable("the last three tokens", _n_gram(3), quoted)
VARIABLES = (TOKEN, NEXT_TOKEN, TWO_TOKENS, THREE_TOKENS)
"""What every text has."""


class Clause(NamedTuple):
    """A variable has a value."""

    variable: Variable
    value: str


class _Coded(NamedTuple):
    """A variable on some contexts, its values as numbers."""

    codes: np.ndarray
    """Number of the value at each context; the last number for none."""
    values: list[str]
    numbers: dict[str, int]
    counts: np.ndarray
    """Contexts with each value, and with none."""


class RuleLabeller:
    """Labels by rule, of these variables: those that come first win where others tell no better."""

    name = "rules"
    n_contexts = 100
    n_random = 64

    def __init__(self, variables: Sequence[Variable] = ()) -> None:
        """
        Args:
            variables: known of the text, beside those that every text has.
        """
        self.variables = (*variables, *VARIABLES)
        self._rules: dict[str, tuple[Clause, ...]] = {}
        self._coded: WeakKeyDictionary[Contexts, list[_Coded]] = WeakKeyDictionary()

    def label(self, record: FeatureRecord, firing: Firing, contexts: Contexts) -> GivenLabel | None:
        """A label and its parts, from where a feature is active in text for choosing."""
        if len(firing.contexts) < FEWEST_CONTEXTS:
            return None
        total = float(firing.activations.sum())
        nothing = np.zeros(len(contexts), dtype=bool)
        parts: dict[Clause, tuple[float, float]] = {}
        left, matched = firing, nothing.copy()
        for _ in range(MOST_CLAUSES):
            clause = self._next_clause(contexts, firing, left, matched, WORTH_A_CLAUSE)
            if clause is None:
                break
            mask = self._holds(clause, contexts)
            taken = mask[left.contexts]
            parts[clause] = (float(left.activations[taken].mean()), float(left.activations[taken].sum()) / total)
            left = Firing(left.contexts[~taken], left.activations[~taken])
            matched |= mask
        strong = firing.activations >= STRONG * firing.activations.max()
        if strong.sum() >= FEWEST_CONTEXTS:
            strongest = Firing(firing.contexts[strong], firing.activations[strong])
            clause = self._next_clause(contexts, strongest, strongest, nothing, TOLD_APART)
            if clause is not None and clause not in parts:
                own = firing.activations[self._holds(clause, contexts)[firing.contexts]]
                parts[clause] = (float(own.mean()), float(own.sum()) / total)
        if not parts:
            return None
        order = sorted(parts, key=lambda clause: -parts[clause][0])
        said = {clause: clause.variable.label(clause.value, record) for clause in order}
        text = _in_words(list(said.values()))
        self._rules[text] = tuple(order)
        return GivenLabel(text, [LabelPart(said[c], c.variable.name, c.value, parts[c][1]) for c in order])

    def fits(self, label: str, contexts: Contexts, which: np.ndarray) -> np.ndarray:
        """Whether a label, one of those given, says that the feature is active at each of some contexts."""
        matched = np.zeros(len(which), dtype=bool)
        for clause in self._rules[label]:
            matched |= self._holds(clause, contexts)[which]
        return matched

    def _next_clause(
        self, contexts: Contexts, firing: Firing, left: Firing, matched: np.ndarray, least: float
    ) -> Clause | None:
        """The clause that adds most, at least `least`, to those that take in what is `matched` and not `left`."""
        total, n_silent = float(firing.activations.sum()), max(1, len(matched) - len(firing.contexts))
        best: tuple[float, Clause] | None = None
        for variable, one in zip(self.variables, self._code(contexts), strict=True):
            n = len(one.numbers) + 1
            if n == 1 or not len(left.contexts):
                continue
            codes = one.codes[left.contexts]
            # In how many of the contexts that are not taken in yet each value stands, and in how many silent ones.
            free = one.counts - np.bincount(one.codes[matched], minlength=n) if matched.any() else one.counts
            silent = free - np.bincount(codes, minlength=n)
            gains = np.bincount(codes, left.activations, minlength=n) / total - silent / n_silent
            code = int(np.argmax(gains[:-1]))
            if gains[code] >= (least if best is None else best[0] + WORTH_A_VARIABLE):
                best = (float(gains[code]), Clause(variable, one.values[code]))
        return None if best is None else best[1]

    def _holds(self, clause: Clause, contexts: Contexts) -> np.ndarray:
        one = self._code(contexts)[self.variables.index(clause.variable)]
        return one.codes == one.numbers.get(clause.value, -1)

    def _code(self, contexts: Contexts) -> list[_Coded]:
        if contexts not in self._coded:
            self._coded[contexts] = [_code(variable, contexts) for variable in self.variables]
        return self._coded[contexts]


def label_here(record: FeatureRecord, tokens: Sequence[str], position: int, variables: Sequence[Variable] = ()) -> str:
    """What of a feature's label holds at a token of a prompt: the first part that does, or else the whole label.

    Args:
        record: of a labelled feature.
        tokens: of the prompt, with what comes next where that is known.
        position: of the token.
        variables: those that the labeller knew of the text, beside those that every text has.
    """
    named = {variable.name: variable for variable in (*variables, *VARIABLES)}
    for part in record.label_parts:
        if part.variable in named and named[part.variable].values(tokens)[position] == part.value:
            return part.text
    return record.label or ""


def _code(variable: Variable, contexts: Contexts) -> _Coded:
    numbers: dict[str, int] = {}
    per_prompt = [variable.values(tokens) for tokens in contexts.strings]
    found = [per_prompt[p][at] for p, at in zip(contexts.prompt, contexts.position, strict=True)]
    codes = np.array([-1 if v is None else numbers.setdefault(v, len(numbers)) for v in found], dtype=np.int64)
    codes[codes < 0] = len(numbers)
    return _Coded(codes, list(numbers), numbers, np.bincount(codes, minlength=len(numbers) + 1))


def _in_words(texts: Sequence[str]) -> str:
    """Parts of a label as one: `say a capital or a state; "Fact"`."""
    groups: list[list[str]] = []
    for text in dict.fromkeys(texts):
        kind = text.startswith(SAY), text.startswith('"')
        if groups and kind == (groups[-1][0].startswith(SAY), groups[-1][0].startswith('"')):
            groups[-1].append(text)
        else:
            groups.append([text])
    said = [[group[0], *(text.removeprefix(SAY) for text in group[1:])] for group in groups]
    return "; ".join(" or ".join(group) for group in said)
