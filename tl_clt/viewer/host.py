"""What a page may ask of Python while it is open: features, annotations kept in a file, and a live model to steer.

The server and the notebook give the page the same host, over HTTP and over the kernel's messages.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any, TypeGuard

from tl_clt.arguments import as_path, as_whole, shown
from tl_clt.attribution import AttributionGraph, NodeKind
from tl_clt.errors import CLTMismatch, ConfigError, FormatError, InterventionError, ServerBusy
from tl_clt.files import new_file, read_json, reading, require_file
from tl_clt.interventions import Intervention, intervene
from tl_clt.lens import HookedModel, model_name
from tl_clt.replacement import feature_acts
from tl_clt.transcoder import CrossLayerTranscoder
from tl_clt.viewer.html import FeatureSource, Graphs, page_data, plain_json, prompt_of

FORMAT = "tl_clt.page_state"
VERSION = 1
MOST_DEEP = 32
"""Lists and objects within each other that JSON from a page may have."""
MOST_INTERVENTIONS = 1000
MOST_FEATURES_AT_ONCE = 200
"""Records of features that a page begins with; it asks for the others."""
MOST_TOKENS = 10
"""Tokens that steering gives, those whose probability changed most."""
FAR = 0.1
"""A graph's activations and those of the model at hand may differ by this share: number types differ by about 1% in
bfloat16, another CLT by the whole."""
PLACES = {"layer", "pos", "feature"}
SET_BY_PAGE = {"value", "scale", "add"}


class Host:
    """Graphs, and what a page may ask for beside them.

    Args:
        graphs: one or several.
        features: where records of features come from.
        model, clt: a live model and its CLT, for steering; both or neither.
        annotations: file to keep pins, groups and labels in. It may be there already, also with those of other
            graphs, which stay.

    Raises:
        ConfigError: there is no graph, a model without a CLT, or the file has annotations, but none of these graphs.
        CLTMismatch: the graphs were not traced with this model and CLT, or the features are of another CLT.
        FormatError: the file of annotations is damaged, or something else.
        NotWritten: it could not be written.
    """

    def __init__(
        self,
        graphs: Graphs,
        features: FeatureSource | None = None,
        model: HookedModel | None = None,
        clt: CrossLayerTranscoder | None = None,
        annotations: str | Path | None = None,
    ) -> None:
        if isinstance(graphs, Iterable) and not isinstance(graphs, (Mapping, str)):
            graphs = list(graphs)
        if (model is None) != (clt is None):
            missing, given = ("clt", "model") if clt is None else ("model", "clt")
            raise ConfigError(
                f"Steering takes a model and its CLT, and {missing} is missing: give both, or no {given}."
            )
        self._data = page_data(graphs, features, max_features=MOST_FEATURES_AT_ONCE)
        named = {"": graphs} if isinstance(graphs, AttributionGraph) else graphs
        self.graphs: list[AttributionGraph] = list(named.values() if isinstance(named, Mapping) else named)
        self.features, self.model, self.clt = features, model, clt
        self._reading, self._steering = Lock(), Lock()
        if model is not None and clt is not None:
            for graph in self.graphs:
                require_traced_with(graph, model, clt)
        path = None if annotations is None else as_path("annotations", annotations)
        self.annotations = None if path is None else Annotations(path, self.graphs)

    def data(self) -> dict[str, Any]:
        """What a page begins with: `data` (`page_data`, and what was saved), and `can` (what it may ask for)."""
        saved = None if self.annotations is None else self.annotations.read()
        can = {
            "features": self.features is not None,
            "annotate": self.annotations is not None,
            "steer": self.model is not None,
        }
        return {"data": {**self._data, "annotations": saved}, "can": can}

    def annotate(self, exported: object) -> None:
        """Keep what the page exports.

        Raises:
            ConfigError: there is no file to keep it in, or it is no export of these graphs.
            NotWritten, FormatError: the file could not be written, or has been damaged meanwhile; it stays as it was.
        """
        if self.annotations is None:
            raise ConfigError("There is no file of annotations: start with --annotations FILE.")
        self.annotations.save(exported)

    def feature(self, layer: int, feature: int) -> dict[str, Any] | None:
        """The record of a feature in values that JSON has, or None where there is none."""
        if self.features is None:
            return None
        with self._reading:
            record = self.features.get(layer, feature)
        return None if record is None else plain_json(record.to_dict())

    def steer(self, number: int, asked: object) -> dict[str, Any]:
        """Change features on a graph's prompt, and say which next tokens become likelier or less likely.

        Features of later layers are computed anew, and attention is held, as `intervene` does it unless told otherwise.

        Args:
            number: of the graph whose prompt it is.
            asked: what a page sent: `[{"layer": 1, "pos": 5, "feature": 17, "scale": 0}, ...]`, each with one of value,
                scale and add; `feature` may be a list.

        Returns:
            `top`: the tokens whose probability changed most, each with `token`, `before` and `after`. `inactive`:
            changed features that are not active there, in words.

        Raises:
            ConfigError: no model is attached.
            InterventionError: what was sent is no list of interventions, or means features that are not there.
            ServerBusy: another change is being computed.
        """
        if self.model is None or self.clt is None:
            raise ConfigError("No model is attached: give --model and --clt (in Python model= and clt=).")
        interventions = as_interventions(asked)
        if not self._steering.acquire(blocking=False):
            raise ServerBusy("Another change is being computed. Try again when it is done.")
        try:
            tokens = self.graphs[number].tokens.to(self.model.W_E.device)
            effect = intervene(self.model, self.clt, tokens, interventions)
            top = effect.top_changes(min(MOST_TOKENS, effect.logits.shape[-1]))
        finally:
            self._steering.release()
        rows = zip(top["token"], top["before"], top["after"], strict=True)
        return {
            "top": [{"token": str(t), "before": float(before), "after": float(after)} for t, before, after in rows],
            "inactive": [str(what) for what in effect.inactive],
        }


class Annotations:
    """Pins, groups and labels in a file, in the form that the page itself exports and imports:
    `{"format", "version", "prompts", "state": {"notes": [of each prompt], "labels", ...}}`.

    Notes belong to a prompt. Those of other prompts that are in the file already stay in it, behind the others.

    Raises:
        FormatError: the file is damaged, or something else.
        ConfigError: it is of other graphs.
        NotWritten: it could not be written.
    """

    def __init__(self, path: Path, graphs: Sequence[AttributionGraph]) -> None:
        self.path = path
        self.prompts = [prompt_of(graph) for graph in graphs]
        self._writing = Lock()
        require_file(path)
        kept = self._read()
        if kept is not None and kept["prompts"] and not set(kept["prompts"]) & set(self.prompts):
            raise ConfigError(
                f"'{path}' holds annotations of another graph (prompt {kept['prompts'][0]!r:.80}): give that graph, or"
                " another file."
            )

    def read(self) -> dict[str, Any] | None:
        """What the page exported, with notes in the order of these graphs; None where nothing is saved yet."""
        kept = self._read()
        if kept is None:
            return None
        of_prompt, _ = self._sort(kept)
        return {**kept, "prompts": self.prompts, "state": {**kept["state"], "notes": of_prompt}}

    def save(self, exported: object) -> None:
        """Keep what the page exports.

        Raises:
            ConfigError: it is no export of these graphs.
            NotWritten: the disk is full, for example; the file stays as it was.
            FormatError: the file has been damaged meanwhile.
        """
        if not _is_export(exported) or exported["prompts"] != self.prompts:
            raise ConfigError("What was sent are no annotations of these graphs. Load the page again.")
        with self._writing:
            kept = self._read()
            others = [] if kept is None else self._sort(kept)[1]
            notes = exported["state"]["notes"] + [notes for _, notes in others]
            prompts = self.prompts + [prompt for prompt, _ in others]
            together = {**exported, "prompts": prompts, "state": {**exported["state"], "notes": notes}}
            # Characters that are none (half a surrogate pair) are written by their numbers.
            text = json.dumps(together, indent=1, allow_nan=False)
            with new_file(self.path) as unfinished:
                unfinished.write_text(text, encoding="utf-8")

    def _sort(self, kept: dict[str, Any]) -> tuple[list[Any], list[tuple[str, Any]]]:
        """Notes of these graphs' prompts, None where there are none, and other prompts with theirs."""
        left = list(zip(kept["prompts"], kept["state"]["notes"], strict=True))
        of_prompt: list[Any] = []
        for prompt in self.prompts:
            found = next((entry for entry in left if entry[0] == prompt), None)
            of_prompt.append(None if found is None else found[1])
            if found is not None:
                left.remove(found)
        return of_prompt, left

    def _read(self) -> dict[str, Any] | None:
        if not self.path.exists():
            return None
        mend = "Give another file, or remove it."
        with reading(self.path, "file of annotations", mend):
            kept = read_json(self.path.read_text(encoding="utf-8"))
            if not _is_export(kept):
                raise FormatError(f"'{self.path}' holds no annotations that this tl_clt reads. {mend}")
        return kept


def _is_export(given: object) -> TypeGuard[dict[str, Any]]:
    """Whether this is what the page exports, with notes for each prompt. What notes hold is the page's own to judge."""
    if not isinstance(given, dict) or (given.get("format"), given.get("version")) != (FORMAT, VERSION):
        return False
    prompts, state = given.get("prompts"), given.get("state")
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        return False
    notes = state.get("notes") if isinstance(state, dict) else None
    return isinstance(notes, list) and len(notes) == len(prompts)


def require_traced_with(graph: AttributionGraph, model: HookedModel, clt: CrossLayerTranscoder) -> None:
    """Raise unless a graph's features have the activations that this model and CLT give them.

    Raises:
        CLTMismatch: they have not, or the CLT is of another model.
        PromptError: the model does not know the graph's tokens.
    """
    acts = feature_acts(model, clt, graph.tokens.to(model.W_E.device))
    nodes = graph.nodes.take(graph.nodes.is_kind(NodeKind.FEATURE))
    layer, pos, index = (getattr(nodes, name).long().to(acts.device) for name in ("layer", "pos", "index"))
    found, expected = None, nodes.activation.to(acts)
    if not len(expected) or (int(layer.max()) < acts.shape[1] and int(index.max()) < acts.shape[2]):
        found = acts[pos, layer, index]
    if found is None or float((found - expected).norm()) > FAR * float(expected.norm()):
        prompt = prompt_of(graph)
        raise CLTMismatch(
            f"The graph of {prompt!r:.80} was not traced with this CLT and {model_name(model)}: its features have other"
            " activations there. Give the model and the CLT it was traced with, or neither."
        )


def as_interventions(asked: object) -> list[Intervention]:
    """The interventions that a page asked for.

    Raises:
        InterventionError: it is no list of them.
    """
    form = 'give [{"layer": 1, "pos": 5, "feature": 17, "scale": 0}, ...], each with one of value, scale and add'
    if not isinstance(asked, list) or not 0 < len(asked) <= MOST_INTERVENTIONS:
        raise InterventionError(f"interventions is no list of 1 to {MOST_INTERVENTIONS}: {form}.")
    found = []
    for i, entry in enumerate(asked):
        if not isinstance(entry, dict) or not PLACES <= set(entry) <= {*PLACES, *SET_BY_PAGE}:
            raise InterventionError(f"interventions[{i}] is {shown(entry)}: {form}.")
        layer, pos = (
            as_whole(f"interventions[{i}].{name}", entry[name], error=InterventionError) for name in ("layer", "pos")
        )
        amounts = {name: entry[name] for name in SET_BY_PAGE if name in entry}
        found.append(Intervention(layer=layer, pos=pos, feature=entry["feature"], **amounts))
    return found


def read_page_json(text: str) -> Any:
    """JSON that a page sent: without NaN and infinite numbers, not deeper than `MOST_DEEP`.

    Raises:
        ConfigError: it is none.
    """

    try:
        value = read_json(text, finite=True)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"This is no JSON that is read here: {error}.") from None
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MOST_DEEP:
            raise ConfigError(f"This JSON has more than {MOST_DEEP} lists and objects within each other.")
        within = [v.values() if isinstance(v, dict) else v for v in level if isinstance(v, (dict, list))]
        level = [child for children in within for child in children]
    return value
