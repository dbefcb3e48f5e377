"""The JSON that viewers read of one feature: contexts it fires in by quantile, and the tokens it promotes and opposes.

Neuronpedia and circuit-tracer share it. What a record of a feature has beyond it, its label and the scores of that,
values of tokens, connected features, is under the key `tl_clt`, so that what was written is read as the same record.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tl_clt.errors import ConfigError, FormatError
from tl_clt.files import read_json, reading

RecordValues: TypeAlias = Mapping[str, Any]
"""What a feature means, as `record.to_dict()` of a store of features gives it: layer, feature, label, label_score,
label_score_random, density, max_activation, histogram (edges, counts), top_logits and bottom_logits (token, value),
examples (quantile, tokens, activations, position), connected (layer, feature, weight)."""
MEND = "Export the features again, or copy the file again."

Line = Annotated[str, Field(max_length=10_000)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, lt=2**53)]


class _Strict(BaseModel):
    """Values of exactly these types. What a record has beyond them is kept."""

    model_config = ConfigDict(strict=True, extra="allow")


class _Histogram(_Strict):
    edges: list[Number]
    counts: list[Number]


class _Example(_Strict):
    quantile: Line
    tokens: list[Line]
    activations: list[Number]
    position: int


class _Connected(_Strict):
    layer: Count
    feature: Count
    weight: Number


class _Record(_Strict):
    layer: Count
    feature: Count
    label: Line | None
    label_score: Number | None
    label_score_random: Number | None
    density: Number | None
    max_activation: Number | None
    histogram: _Histogram | None
    top_logits: list[tuple[Line, Number | None] | list[Line | Number | None]]
    bottom_logits: list[tuple[Line, Number | None] | list[Line | Number | None]]
    examples: list[_Example]
    connected: list[_Connected]


class _TheirExample(_Strict):
    tokens: list[Line]
    tokens_acts_list: list[Number]
    train_token_ind: int | None = None


class _TheirQuantile(_Strict):
    quantile_name: Line
    examples: list[_TheirExample]


class _Theirs(_Strict):
    examples_quantiles: list[_TheirQuantile]
    top_logits: list[Line]
    bottom_logits: list[Line]
    index: int | None = None
    layer: int | None = None
    act_max: Number | None = None
    activation_frequency: Number | None = None
    histogram: list[Number] | None = None
    tl_clt: dict[str, Any] | None = None


def check_record(record: RecordValues) -> dict[str, Any]:
    """A record, as it is, once it is found to be one.

    Raises:
        ConfigError: it is of another shape.
    """
    if not isinstance(record, Mapping):
        raise ConfigError(f"A feature's record is of type {type(record).__name__}. Give a mapping, `record.to_dict()`.")
    values = dict(record)
    try:
        _Record.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"A feature's record {_first(error)}. Give `record.to_dict()` as it is.") from None
    for token in (*values["top_logits"], *values["bottom_logits"]):
        if len(token) != 2 or not isinstance(token[0], str) or isinstance(token[1], str):
            raise ConfigError(f"A feature's record has {token!r:.60} for a token and its value. Give both.")
    for example in values["examples"]:
        if len(example["tokens"]) != len(example["activations"]):
            raise ConfigError(
                f"An example of feature {values['layer']}.{values['feature']} has {len(example['tokens'])} tokens and"
                f" {len(example['activations'])} activations. Give one for each."
            )
    return values


def _first(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"is of another shape: {first['msg']} at {where or 'the top'}"


def write_feature(record: dict[str, Any]) -> dict[str, Any]:
    """A checked record in the layout that viewers read, as plain values."""
    quantiles: dict[str, list[dict[str, Any]]] = {}
    for example in record["examples"]:
        rest = {name: value for name, value in example.items() if name not in _Example.model_fields}
        quantiles.setdefault(example["quantile"], []).append(
            {
                "tokens": example["tokens"],
                "tokens_acts_list": example["activations"],
                "train_token_ind": example["position"],
                "is_repeated_datapoint": False,
                **rest,
            }
        )
    kept = {
        name: value
        for name, value in record.items()
        if name not in ("layer", "feature", "examples", "top_logits", "bottom_logits")
    }
    values = {name: [value for _, value in record[name]] for name in ("top_logits", "bottom_logits")}
    highest = record["max_activation"]
    return {
        "index": record["feature"],
        "layer": record["layer"],
        "examples_quantiles": [{"quantile_name": name, "examples": examples} for name, examples in quantiles.items()],
        **{name: [token for token, _ in record[name]] for name in ("top_logits", "bottom_logits")},
        "act_min": 0.0,
        # Viewers divide by it.
        "act_max": highest if highest else 1.0,
        "activation_frequency": record["density"] or 0.0,
        "histogram": record["histogram"]["counts"] if record["histogram"] else [],
        "tl_clt": {**kept, "values": values},
    }


def read_feature_file(path: Path) -> Any:
    """The values of one JSON file.

    Raises:
        FormatError: it is missing, truncated or no JSON.
    """
    with reading(path, "feature", MEND):
        return read_json(path.read_text(encoding="utf-8"), finite=True)


def parse_feature(path: Path, values: Any, layer: int, feature: int) -> dict[str, Any]:
    """A record of what a file tells of a feature; None for what it does not.

    Raises:
        FormatError: it is of another shape, or of another feature than its place.
    """
    try:
        theirs = _Theirs.model_validate(values)
    except ValidationError as error:
        raise FormatError(f"'{path}', feature {layer}.{feature}, {_first(error)}. {MEND}") from None
    own = theirs.tl_clt
    if own is not None and (theirs.layer, theirs.index) != (layer, feature):
        raise FormatError(
            f"'{path}' has feature {theirs.layer}.{theirs.index} at the place of {layer}.{feature}. {MEND}"
        )
    examples = []
    for quantile in theirs.examples_quantiles:
        for example in quantile.examples:
            if len(example.tokens) != len(example.tokens_acts_list):
                raise FormatError(
                    f"'{path}', feature {layer}.{feature}, has an example with {len(example.tokens)} tokens and"
                    f" {len(example.tokens_acts_list)} activations. {MEND}"
                )
            position = example.train_token_ind
            if position is None:
                acts = example.tokens_acts_list
                position = acts.index(max(acts)) if acts else 0
            rest = {name: value for name, value in (example.model_extra or {}).items() if name in _extra(own, example)}
            examples.append(
                {
                    "quantile": quantile.quantile_name,
                    "tokens": example.tokens,
                    "activations": example.tokens_acts_list,
                    "position": position,
                    **rest,
                }
            )
    tokens = {"top_logits": theirs.top_logits, "bottom_logits": theirs.bottom_logits}
    if own is None:
        unknown = dict.fromkeys(("label", "label_score", "label_score_random"))
        record = {
            **{"layer": layer, "feature": feature, **unknown},
            "density": theirs.activation_frequency,
            "max_activation": theirs.act_max,
            "histogram": None if not theirs.histogram else _histogram(values, theirs.histogram),
            **{name: [[token, None] for token in found] for name, found in tokens.items()},
            "examples": examples,
            "connected": [],
        }
        return record
    given = own.get("values")
    pairs: dict[str, list[list[Any]]] = {}
    for name, found in tokens.items():
        held = given.get(name) if isinstance(given, dict) else None
        if not isinstance(held, list) or len(held) != len(found):
            raise FormatError(f"'{path}', feature {layer}.{feature}, has no value for each of its {name}. {MEND}")
        pairs[name] = [[token, value] for token, value in zip(found, held, strict=True)]
    rest = {name: value for name, value in own.items() if name != "values"}
    try:
        return check_record({"layer": layer, "feature": feature, **rest, **pairs, "examples": examples})
    except ConfigError as error:
        raise FormatError(f"'{path}', feature {layer}.{feature}: {error} {MEND}") from None


def _extra(own: dict[str, Any] | None, example: _TheirExample) -> set[str]:
    """Of what an example has beyond the layout, what a record of ours had in it."""
    return set(example.model_extra or ()) - {"is_repeated_datapoint"} if own is not None else set()


def _histogram(values: dict[str, Any], counts: list[float]) -> dict[str, list[float]]:
    """Counts of bins of one width between the least and the greatest activation."""
    least, greatest = (values.get(name) for name in ("act_min", "act_max"))
    low = float(least) if isinstance(least, (int, float)) else 0.0
    high = float(greatest) if isinstance(greatest, (int, float)) else 1.0
    width = (high - low) / len(counts)
    return {"edges": [low + width * number for number in range(len(counts) + 1)], "counts": counts}
