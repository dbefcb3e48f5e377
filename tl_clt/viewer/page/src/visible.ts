// Which nodes and edges are shown, and of those that are not, how many for which reason.

import { Graph } from "./graph";
import { State } from "./store";
import { PageData, PLURAL } from "./types";

/** Edges drawn where no smallest weight is chosen; so many are drawn at once without a wait. */
export const EDGES_AT_FIRST = 2000;

/** Edges drawn at most, the strongest: more take seconds, and are a grey cloud. A node's card lists all of its edges. */
export const MOST_EDGES = 10_000;

export interface Visible {
  isShown: Uint8Array;
  nodes: number[];
  /** From the weakest to the strongest. */
  edges: Int32Array;
  minWeight: number;
  /** How many nodes are not shown, by reason. */
  hiddenNodes: [reason: string, count: number][];
  hiddenEdges: [reason: string, count: number][];
}

export function findVisible(graph: Graph, state: State): Visible {
  const { layer, pos } = graph.data.nodes;
  const hidden = new Map<string, number>();
  const isShown = new Uint8Array(graph.n);
  const nodes: number[] = [];
  const hiddenTokens = new Set(state.hiddenTokens);
  const why = (i: number): string | null => {
    const kind = graph.kind[i];
    if (!state.kinds[kind]) return `${PLURAL[kind]} switched off`;
    const inLayers = kind === "feature" || kind === "error" || kind === "bias";
    if (state.layers && inLayers && (layer[i] < state.layers[0] || layer[i] > state.layers[1])) return "of other layers";
    if (hiddenTokens.has(pos[i])) return "at tokens switched off";
    const stays = kind === "token" || kind === "logit";
    if (!stays && state.influence < 1 && graph.shareAbove[i] >= state.influence) return "of too little influence";
    return null;
  };
  for (let i = 0; i < graph.n; i++) {
    const reason = why(i);
    if (reason) hidden.set(reason, (hidden.get(reason) ?? 0) + 1);
    else {
      isShown[i] = 1;
      nodes.push(i);
    }
  }
  const minWeight = state.minWeight ?? graph.weightOfRank(EDGES_AT_FIRST);
  let ends = 0;
  let sign = 0;
  let weak = 0;
  let kept: number[] = [];
  for (let e = 0; e < graph.nEdges; e++) {
    const weight = graph.weight[e];
    if (!isShown[graph.target[e]] || !isShown[graph.source[e]]) ends++;
    else if ((state.sign === "positive" && weight < 0) || (state.sign === "negative" && weight > 0)) sign++;
    else if (Math.abs(weight) < minWeight) weak++;
    else kept.push(e);
  }
  const beyond = Math.max(kept.length - MOST_EDGES, 0);
  if (beyond) {
    const least = Float64Array.from(kept, (e) => Math.abs(graph.weight[e])).sort()[beyond];
    kept = kept.filter((e) => Math.abs(graph.weight[e]) >= least).slice(0, MOST_EDGES);
  }
  kept.sort((a, b) => Math.abs(graph.weight[a]) - Math.abs(graph.weight[b]));
  const hiddenEdges: [string, number][] = [
    ["at nodes that are hidden", ends],
    ["of the other sign", sign],
    [`beyond the ${MOST_EDGES} strongest`, beyond],
    [`of |weight| under ${Number(minWeight.toPrecision(2))}`, weak],
  ];
  return {
    isShown,
    nodes,
    edges: Int32Array.from(kept),
    minWeight,
    hiddenNodes: [...hidden.entries()],
    hiddenEdges: hiddenEdges.filter(([, count]) => count > 0),
  };
}

/** Of the features of the graphs, what of them is said here, and what is not, by reason. */
export function summariseFeatures(data: PageData, canLoad: boolean): string {
  const records = Object.values(data.features);
  const left = data.features_left_out ?? 0;
  if (!records.length && !left) return "";
  const inGraphs = records.length + left;
  const unknown = records.filter((record) => record === null).length;
  const elsewhere = Math.max((data.features_in_source ?? 0) - inGraphs, 0);
  const not: [string, number][] = [
    [canLoad ? "come when they are selected" : "left out as of least influence (max_features)", left],
    ["not known of", unknown],
    [`others of the store in no graph here`, elsewhere],
  ];
  const said = not.filter(([, count]) => count > 0).map(([reason, count]) => `${count} ${reason}`);
  return [`${records.length - unknown} of ${inGraphs} features described`, ...said].join("; ") + ".";
}

/** What is shown and what is not, in a sentence. */
export function summarise(graph: Graph, visible: Visible, unknownPins: number): string {
  const list = (entries: [string, number][]) => entries.map(([reason, count]) => `${count} ${reason}`).join(", ");
  const hidden = [
    visible.hiddenNodes.length ? `Nodes hidden: ${list(visible.hiddenNodes)}.` : "",
    visible.hiddenEdges.length ? `Edges hidden: ${list(visible.hiddenEdges)}.` : "",
    unknownPins ? `${unknownPins} pinned ${unknownPins === 1 ? "node is" : "nodes are"} not in this graph.` : "",
  ];
  const nodes = `${visible.nodes.length} of ${graph.n} nodes`;
  return [`${nodes} and ${visible.edges.length} of ${graph.nEdges} edges shown.`, ...hidden].filter(Boolean).join(" ");
}
