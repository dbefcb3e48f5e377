"""`FeatureStore`: what every feature of a CLT means, in a folder that is read a feature at a time.

    features.json          which CLT and model, which text, how contexts were chosen
    tokens.json            the tokens that occur, as text: {id: text}
    statistics.safetensors one row a feature: counts, greatest activation, histogram, output tokens, connections
    examples.safetensors   contexts of all features one after another, and where those of each begin
    held_out.safetensors   prompts that no example is from: labels are chosen on some of them and scored on others
    labels.safetensors     labels and their scores, once there are some
    labels.json            who gave them, and what a random dictionary reaches
    checksums.json         of all these files, so that damage is told where it is read

Nothing in it can run code. `store[layer, feature]` reads the rows of one feature and no others.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from pandas import DataFrame
from safetensors.torch import save_file
from torch import Tensor

from tl_clt.arguments import as_path, as_whole
from tl_clt.bundled import bundled_folder
from tl_clt.errors import CLTMismatch, FeatureNotFound, FormatError
from tl_clt.features.checksums import CheckedFolder, write_checksums
from tl_clt.files import files_into, read_json, reading
from tl_clt.report import as_html
from tl_clt.transcoder import CrossLayerTranscoder
from tl_clt.transcoder.tensor_files import TensorFile

FORMAT = "tl_clt.features"
VERSION = 1
ABOUT, TOKENS = "features.json", "tokens.json"
STATISTICS, EXAMPLES, HELD_OUT = "statistics.safetensors", "examples.safetensors", "held_out.safetensors"
LABELS, LABELS_ABOUT = "labels.safetensors", "labels.json"
MEND = "Copy the folder again, or make it anew with `tl-clt features`."
MEND_OF_LABELS = (
    "Copy the folder again; or remove labels.json and labels.safetensors, and label the store anew (`tl-clt features"
    " --resume`)."
)
BANDS = ("top", "0.75-1.0", "0.5-0.75", "0.25-0.5", "0.0-0.25")
"""What an example is one of: the greatest activations, or a quarter of a random sample, by rank."""
PARTS = ("choosing", "scoring")
"""What held-out prompts are for."""
HISTOGRAM_EDGES = [2 ** (half / 2) for half in range(-24, 26)]
"""Of activations: half octaves from 2^-12 to 2^12.5. What lies beyond counts in the last interval on its side."""
PER_FEATURE = {
    "n_active": (),
    "max_activation": (),
    "decoder_norm": (),
    "histogram": (len(HISTOGRAM_EDGES) - 1,),
    "top_tokens": None,
    "top_values": None,
    "bottom_tokens": None,
    "bottom_values": None,
    "connected": None,
    "connected_weights": None,
}
"""Tensors [n_layers, d_transcoder, ...] of `statistics.safetensors`; None for a last axis that may have any length."""


class TokenValue(NamedTuple):
    """An output token, and how far a feature's decoders push it up."""

    token: str
    value: float


class Connection(NamedTuple):
    """Another feature, and the virtual weight between the two: onto it where its layer is later, else from it."""

    layer: int
    feature: int
    weight: float


class Histogram(NamedTuple):
    """How many activations lie between neighbouring edges, the lower of which counts as between."""

    edges: list[float]
    counts: list[int]


class LabelPart(NamedTuple):
    """One of the things that a feature is active at, by rule: a variable of the text has a value."""

    text: str
    variable: str
    value: str
    share: float
    """Of the feature's activation, that is in such contexts and in none of those before."""


class GivenLabel(NamedTuple):
    """What a labeller gives."""

    text: str
    parts: list[LabelPart]
    """Where it was found by rule; else empty."""


@dataclass(frozen=True)
class Example:
    """The text around the greatest activation of a feature in one prompt."""

    quantile: str
    """One of `BANDS`."""

    tokens: list[str]
    activations: list[float]
    """Of the feature at each token; 0 at those that are left out, as in training."""

    position: int
    """Which of the tokens has the greatest activation."""


@dataclass(frozen=True, kw_only=True, repr=False)
class FeatureRecord:
    """What is known of one feature."""

    layer: int
    feature: int
    label: str | None = None
    label_parts: list[LabelPart] = field(default_factory=list)
    """Of a label by rule: what it is made of."""
    label_score: float | None = None
    """Balanced accuracy (0.5 is chance) of the label in telling held-out contexts in which the feature is active from
    random ones in which it is not."""
    label_score_nearest: float | None = None
    """The same against the contexts in which it is not active that are most like them."""
    label_score_random: float | None = None
    """The mean of `label_score` over features of random encoder directions, as often active, in the same layer."""
    label_score_random_nearest: float | None = None
    density: float
    """Share of the tokens at which it is active."""
    n_active: int
    """Their number."""
    max_activation: float
    decoder_norm: float
    """Norm of all that it writes at activation 1."""
    histogram: Histogram
    top_logits: list[TokenValue]
    bottom_logits: list[TokenValue]
    examples: list[Example]
    connected: list[Connection]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, as the page reads them."""
        return {
            "layer": self.layer,
            "feature": self.feature,
            "label": self.label,
            "label_score": self.label_score,
            "label_score_random": self.label_score_random,
            "density": self.density,
            "max_activation": self.max_activation,
            "histogram": {"edges": self.histogram.edges, "counts": self.histogram.counts},
            "top_logits": [list(pair) for pair in self.top_logits],
            "bottom_logits": [list(pair) for pair in self.bottom_logits],
            "examples": [
                {"quantile": e.quantile, "tokens": e.tokens, "activations": e.activations, "position": e.position}
                for e in self.examples
            ],
            "connected": [connection._asdict() for connection in self.connected],
        }

    def score_text(self) -> str:
        """The label's score beside a random dictionary's, in words."""
        if self.label_score is None:
            return "not scored: too few held-out contexts"
        random = "" if self.label_score_random is None else f", random dictionary {self.label_score_random:.2f}"
        nearest = "" if self.label_score_nearest is None else f", {self.label_score_nearest:.2f} against the nearest"
        return f"{self.label_score:.2f}{nearest}{random}"

    def __repr__(self) -> str:
        label = "" if self.label is None else f" {self.label!r} (balanced accuracy {self.score_text()})"
        promotes = ", ".join(repr(pair.token) for pair in self.top_logits[:3])
        return (
            f"FeatureRecord({self.layer}.{self.feature}{label}: active on {self.density:.3%} of tokens, at most"
            f" {self.max_activation:.3g}; promotes {promotes})"
        )

    def __str__(self) -> str:
        lines = [repr(self)]
        lines += [
            f"  {part.share:4.0%} of its activation where {part.variable} is {part.value!r}"
            for part in self.label_parts
        ]
        for example in self.examples:
            words = [f"[{t.strip()}]" if i == example.position else t.strip() for i, t in enumerate(example.tokens)]
            lines.append(f"  {example.quantile:>8} {example.activations[example.position]:8.3g}  {' '.join(words)}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        contexts = [
            (e.quantile, e.activations[e.position], "".join(e.tokens[: e.position]), e.tokens[e.position],
             "".join(e.tokens[e.position + 1 :]))
            for e in self.examples
        ]  # fmt: skip
        return as_html(
            repr(self),
            {
                "Contexts": DataFrame(contexts, columns=["quantile", "activation", "before", "token", "after"]),
                "Promotes": DataFrame(self.top_logits, columns=["token", "logit"]),
                "Suppresses": DataFrame(self.bottom_logits, columns=["token", "logit"]),
                "Connected with": DataFrame(self.connected, columns=["layer", "feature", "weight"]),
            },
        )


class Label(NamedTuple):
    """A label and what it is worth, as it is written to a store."""

    text: str
    parts: list[LabelPart]
    score: float | None
    score_nearest: float | None
    score_random: float | None
    score_random_nearest: float | None


SCORES = ("score", "score_nearest", "score_random", "score_random_nearest")


@dataclass(frozen=True, repr=False)
class FeatureStore:
    """What the features of a CLT mean. `FeatureStore.open(folder)` reads one; `collect_features` makes one."""

    folder: Path
    about: dict[str, Any] = field(repr=False)
    """What `features.json` holds: `clt`, `text`, `settings`."""
    _tokens: dict[int, str] = field(repr=False)
    _files: CheckedFolder = field(repr=False, compare=False)

    @classmethod
    def open(cls, folder: str | Path, clt: CrossLayerTranscoder | None = None) -> FeatureStore:
        """Open a store; nothing but its index is read. What else is read later is checked then, by its checksums.

        Args:
            folder: what `collect_features` or `tl-clt features` wrote, or the name of a bundled organism ("atlas").
            clt: a CLT that it must belong to.

        Raises:
            FormatError: there is no store, it is unfinished, or a file is missing, truncated, damaged or of another
                kind.
            CLTMismatch: it belongs to another CLT.
        """
        path = as_path("folder", folder, FormatError)
        if not path.is_dir():
            path = bundled_folder(folder, "features") or path
        if not (path / ABOUT).is_file():
            if (path / UNFINISHED).is_dir():
                raise FormatError(
                    f"'{path}' holds an unfinished store. Finish it: the same call with resume=True (`--resume`)."
                )
            raise FormatError(f"'{path}' is no feature store: it has no {ABOUT}. Make one with `tl-clt features`.")
        files = CheckedFolder(path, {LABELS: MEND_OF_LABELS, LABELS_ABOUT: MEND_OF_LABELS}, MEND)
        about = _read_mapping(files, ABOUT)
        if about.get("format") != FORMAT or about.get("version") != VERSION:
            raise FormatError(
                f"'{path / ABOUT}' is of format {about.get('format')!r:.40}, version {about.get('version')!r:.20}; this"
                f" release reads {FORMAT}, version {VERSION}. {MEND}"
            )
        with reading(path / ABOUT, "index of a feature store", MEND):
            size = {name: int(about["clt"][name]) for name in ("n_layers", "d_transcoder")}
            _ = str(about["clt"]["fingerprint"]), int(about["text"]["n_tokens"])
        with reading(path / TOKENS, "list of tokens", MEND):
            tokens = {int(number): str(text) for number, text in _read_mapping(files, TOKENS).items()}
        store = cls(path, about, tokens, files)
        store._check_files(**size)
        if clt is not None:
            store.require_clt(clt)
        return store

    # -- what it is of

    @property
    def n_layers(self) -> int:
        return self.about["clt"]["n_layers"]

    @property
    def d_transcoder(self) -> int:
        """Features a layer."""
        return self.about["clt"]["d_transcoder"]

    @property
    def clt_fingerprint(self) -> str:
        """Of the CLT that it belongs to (`CrossLayerTranscoder.fingerprint`)."""
        return self.about["clt"]["fingerprint"]

    @property
    def n_tokens(self) -> int:
        """Tokens that densities are shares of."""
        return self.about["text"]["n_tokens"]

    @property
    def is_labelled(self) -> bool:
        return (self.folder / LABELS).is_file()

    def require_clt(self, clt: CrossLayerTranscoder) -> None:
        """Raise unless the store belongs to a CLT.

        Raises:
            CLTMismatch: features of another CLT mean other things, whatever their numbers.
        """
        own = self.about["clt"]
        if own["fingerprint"] != clt.fingerprint():
            raise CLTMismatch(
                f"The feature store '{self.folder}' belongs to another CLT of {own.get('model_name', 'unknown')!r:.80}"
                f" ({self.n_layers} layers x {self.d_transcoder} features), not to {clt!r}. Open the one made for this"
                " CLT, or make one with `tl-clt features` (collect_features)."
            )

    # -- reading

    def __getitem__(self, where: tuple[int, int]) -> FeatureRecord:
        """What is known of feature `store[layer, feature]`.

        Raises:
            FeatureNotFound: the CLT has no such feature.
            FormatError: a file is damaged.
        """
        if not isinstance(where, tuple) or len(where) != 2:
            raise FeatureNotFound(f"A feature is asked for as store[layer, feature], not by {where!r:.60}.")
        layer = as_whole("layer", where[0], 0, self.n_layers - 1, why="the layers", error=FeatureNotFound)
        feature = as_whole(
            "feature", where[1], 0, self.d_transcoder - 1, why="the features of a layer", error=FeatureNotFound
        )
        with self._files.open_tensors(STATISTICS) as file:
            row = {name: file.part(name, (layer, feature)) for name in PER_FEATURE}
        counts, n_active = row["histogram"].tolist(), int(row["n_active"])
        label = self.label(layer, feature)
        return FeatureRecord(
            layer=layer,
            feature=feature,
            label=label and label.text,
            label_parts=label.parts if label else [],
            label_score=label and label.score,
            label_score_nearest=label and label.score_nearest,
            label_score_random=label and label.score_random,
            label_score_random_nearest=label and label.score_random_nearest,
            density=n_active / max(1, self.n_tokens),
            n_active=n_active,
            max_activation=float(row["max_activation"]),
            decoder_norm=float(row["decoder_norm"]),
            histogram=_within(counts),
            top_logits=self._token_values(row["top_tokens"], row["top_values"]),
            bottom_logits=self._token_values(row["bottom_tokens"], row["bottom_values"]),
            examples=list(self._examples(layer, feature)),
            connected=[
                Connection(partner // self.d_transcoder, partner % self.d_transcoder, weight)
                for partner, weight in zip(row["connected"].tolist(), row["connected_weights"].tolist(), strict=True)
                if partner >= 0
            ],
        )

    def get(self, layer: int, feature: int) -> FeatureRecord | None:
        """The same, or None where the CLT has no such feature."""
        try:
            return self[layer, feature]
        except FeatureNotFound:
            return None

    def __len__(self) -> int:
        """All features."""
        return self.n_layers * self.d_transcoder

    def __iter__(self) -> Iterator[FeatureRecord]:
        """What is known of every feature, layer by layer in order, one at a time.

        Raises:
            FormatError: a file is damaged.
        """
        return (self[layer, feature] for layer in range(self.n_layers) for feature in range(self.d_transcoder))

    def labels(self) -> DataFrame:
        """All features with a label: layer, feature, label, its scores, density, max_activation and decoder_norm."""
        stats = self.statistics()
        rows = []
        if self.is_labelled:
            with self._files.open_tensors(LABELS) as file:
                starts = file.part("starts", (slice(None),))
                labelled = torch.nonzero(starts.diff()).flatten().tolist()
            rows = [divmod(number, self.d_transcoder) for number in labelled]
        found = [(place, self.label(*place)) for place in rows]
        values = [
            (*place, label.text, *label[2:], *(float(stats[name][place]) for name in STATISTIC_COLUMNS))
            for place, label in found
            if label is not None
        ]
        table = DataFrame(values, columns=["layer", "feature", "label", *SCORES, *STATISTIC_COLUMNS])
        return table.assign(density=table.pop("n_active") / max(1, self.n_tokens))

    def statistics(self) -> dict[str, Tensor]:
        """Of every feature [n_layers, d_transcoder]: n_active, max_activation, decoder_norm."""
        with self._files.open_tensors(STATISTICS) as file:
            return {name: file.part(name, (slice(None),)) for name in STATISTIC_COLUMNS}

    def label_summary(self) -> dict[str, Any]:
        """Who gave the labels, and by layer what they and those of a random dictionary score (`labels.json`)."""
        return _read_mapping(self._files, LABELS_ABOUT) if self.is_labelled else {}

    def held_out(self, part: str) -> list[Int[Tensor, " _"]]:
        """Prompts that no example is from: those that labels are chosen on ("choosing"), or scored on ("scoring")."""
        with self._files.open_tensors(HELD_OUT) as file:
            tokens, starts, of = (file.part(name, (slice(None),)) for name in ("tokens", "starts", "part"))
        with reading(self.folder / HELD_OUT, "list of prompts", MEND):
            prompts = torch.tensor_split(tokens.long(), starts[1:-1].tolist()) if len(of) else ()
            return [prompt for prompt, p in zip(prompts, of.tolist(), strict=True) if PARTS[p] == part]

    def __repr__(self) -> str:
        own, labels = self.about["clt"], "labelled" if self.is_labelled else "without labels"
        return (
            f"FeatureStore({self.n_layers} layers x {self.d_transcoder} features of a CLT of"
            f" {own.get('model_name', 'unknown')}, on {self.n_tokens} tokens, {labels}: {self.folder})"
        )

    def _repr_html_(self) -> str:
        return as_html(repr(self), {"Labels": self.labels()} if self.is_labelled else {})

    # -- writing

    def write_labels(self, labels: Mapping[tuple[int, int], Label], about: Mapping[str, Any]) -> None:
        """Put labels in the place of those that there are, all or nothing.

        Args:
            labels: by (layer, feature).
            about: who gave them, for `label_summary`.
        """
        texts, starts = bytearray(), [0]
        scores = torch.full((self.n_layers, self.d_transcoder, len(SCORES)), torch.nan)
        for layer in range(self.n_layers):
            for feature in range(self.d_transcoder):
                label = labels.get((layer, feature))
                if label is not None:
                    texts += json.dumps([label.text, label.parts]).encode()
                    values = [torch.nan if value is None else value for value in label[2:]]
                    scores[layer, feature] = torch.tensor(values)
                starts.append(len(texts))
        with files_into(self.folder) as unfinished:
            tensors = {
                "texts": torch.tensor(list(texts), dtype=torch.uint8),
                "starts": torch.tensor(starts, dtype=torch.int64),
                "scores": scores,
            }
            save_file(tensors, unfinished / LABELS)
            (unfinished / LABELS_ABOUT).write_text(json.dumps(dict(about), indent=2) + "\n", encoding="utf-8")
            write_checksums(unfinished, self.folder)

    # -- details

    def label(self, layer: int, feature: int) -> Label | None:
        """A feature's label with its scores, or None."""
        if not self.is_labelled:
            return None
        at = layer * self.d_transcoder + feature
        with self._files.open_tensors(LABELS) as file:
            first, last = file.part("starts", (slice(at, at + 2),)).tolist()
            if first == last:
                return None
            written = bytes(file.part("texts", (slice(first, last),)).tolist())
            scores = file.part("scores", (layer, feature)).tolist()
        with reading(self.folder / LABELS, "file of labels", MEND):
            text, parts = read_json(written.decode())
            return Label(
                str(text),
                [
                    LabelPart(str(said), str(variable), str(value), float(share))
                    for said, variable, value, share in parts
                ],
                *(None if score != score else score for score in scores),
            )

    def _examples(self, layer: int, feature: int) -> Iterator[Example]:
        at = layer * self.d_transcoder + feature
        with self._files.open_tensors(EXAMPLES) as file:
            first, last = file.part("first_example", (slice(at, at + 2),)).tolist()
            starts = file.part("first_token", (slice(first, last + 1),)).tolist()
            tokens = file.part("tokens", (slice(starts[0], starts[-1]),)).tolist() if starts else []
            shares = file.part("shares", (slice(starts[0], starts[-1]),)).float() if starts else torch.zeros(0)
            peaks, positions, bands = (
                file.part(name, (slice(first, last),)).tolist() for name in ("peaks", "positions", "bands")
            )
        with reading(self.folder / EXAMPLES, "file of examples", MEND):
            if not 0 <= first <= last or len(starts) != last - first + 1 or len(tokens) != starts[-1] - starts[0]:
                raise ValueError("it points beyond its end")
            for n, (peak, position, band) in enumerate(zip(peaks, positions, bands, strict=True)):
                part = slice(starts[n] - starts[0], starts[n + 1] - starts[0])
                words = [self._text(t) for t in tokens[part]]
                activations = (shares[part] * peak).tolist()
                activations[position] = peak
                yield Example(BANDS[band], words, activations, position)

    def _token_values(self, tokens: Int[Tensor, " k"], values: Float[Tensor, " k"]) -> list[TokenValue]:
        return [TokenValue(self._text(t), v) for t, v in zip(tokens.tolist(), values.tolist(), strict=True)]

    def _text(self, token: int) -> str:
        return self._tokens.get(token, f"#{token}")

    def _check_files(self, n_layers: int, d_transcoder: int) -> None:
        """Raise unless every file is there with tensors of the right shapes; none is read."""
        n = n_layers * d_transcoder
        wanted: dict[str, dict[str, Sequence[int | None]]] = {
            STATISTICS: {
                name: (n_layers, d_transcoder, *((None,) if last is None else last))
                for name, last in PER_FEATURE.items()
            },
            EXAMPLES: {
                **{"first_example": (n + 1,), "first_token": (None,), "tokens": (None,), "shares": (None,)},
                **{"peaks": (None,), "positions": (None,), "bands": (None,)},
            },
            HELD_OUT: {"tokens": (None,), "starts": (None,), "part": (None,)},
        }
        if self.is_labelled:
            wanted[LABELS] = {"texts": (None,), "starts": (n + 1,), "scores": (n_layers, d_transcoder, len(SCORES))}
        of_labels = {name: (self.folder / name).is_file() for name in (LABELS, LABELS_ABOUT)}
        for name, is_there in of_labels.items():
            if not is_there and any(of_labels.values()):
                raise FormatError(f"The feature store '{self.folder}' is damaged: it lacks {name}. {MEND_OF_LABELS}")
        self.label_summary()
        for name, tensors in wanted.items():
            with self._files.open_tensors(name) as file:
                for key, shape in tensors.items():
                    _require_shape(file, key, shape)


UNFINISHED = "unfinished"
"""Folder within a store in which `collect_features` keeps what it has so far."""
STATISTIC_COLUMNS = ("n_active", "max_activation", "decoder_norm")


def _within(counts: list[int]) -> Histogram:
    """A histogram without the empty intervals at its ends."""
    filled = [i for i, count in enumerate(counts) if count]
    if not filled:
        return Histogram([], [])
    first, last = filled[0], filled[-1] + 1
    return Histogram(HISTOGRAM_EDGES[first : last + 1], counts[first:last])


def _require_shape(file: TensorFile, key: str, shape: Sequence[int | None]) -> None:
    found = file.shape(key)
    if len(found) != len(shape) or any(b is not None and a != b for a, b in zip(found, shape, strict=True)):
        raise FormatError(
            f"'{file.path}': {key} has shape {list(found)}, which does not fit {ABOUT}. Files of two stores are mixed:"
            f" {MEND[0].lower()}{MEND[1:]}"
        )


def _read_mapping(files: CheckedFolder, name: str) -> dict[str, Any]:
    with reading(files.folder / name, "JSON mapping", MEND_OF_LABELS if name == LABELS_ABOUT else MEND):
        values = read_json(files.read_text(name))
        if not isinstance(values, dict):
            raise ValueError(f"it holds {type(values).__name__}")
        return values
