// Influence, scores and paths, as tl_clt/attribution/influence.py has them (Methods, "Graph Pruning" and "Evaluating
// Graphs"): A = |weights| with each target's divided by its absolute input, influence = w (A + A^2 + ...).

import { Graph } from "./graph";
import { Scores } from "./types";

/** Nodes so that each comes before all that writes to it: outputs, then features from the top layer down. */
export function topDown(graph: Graph): number[] {
  const { layer } = graph.data.nodes;
  const inner: number[] = [];
  const outputs: number[] = [];
  for (let i = 0; i < graph.n; i++) {
    if (graph.kind[i] === "logit") outputs.push(i);
    else if (graph.kind[i] === "feature") inner.push(i);
  }
  return outputs.concat(inner.sort((a, b) => layer[b] - layer[a]));
}

/**
 * Replacement and completeness of the graph in which features that are not kept count as errors: walks end there.
 * With T and E the influence of tokens and errors, o = influence + w, D = sum of o over outputs and features kept, and
 * u the walks that are lost along edges that are not in the graph:
 *
 *     replacement  = T / (T + E)       from T / (T + E + u) to (T + u) / (T + E + u)
 *     completeness = 1 - E / (D - u)   from 1 - (E + u) / D to 1 - E / (D + further visits of lost walks)
 *
 * A lost walk visits at most as many nodes further on as there are layers below it, and one leaf, which does not count.
 */
export function scoreSubgraph(graph: Graph, isKept: (node: number) => boolean): Scores {
  const { layer, traced, dropped } = graph.data.nodes;
  const influence = new Float64Array(graph.n);
  let counted = 0;
  let lost = 0;
  let further = 0;
  for (const i of topDown(graph)) {
    const isError = graph.kind[i] === "feature" && !isKept(i);
    if (isError) continue;
    const output = influence[i] + graph.outputWeight[i];
    counted += output;
    const unknown = traced[i] ? dropped[i] / graph.input[i] : 1;
    lost += output * unknown;
    further += output * unknown * Math.max(layer[i], 0);
    if (!traced[i]) continue;
    for (const e of graph.inEdges(i)) influence[graph.source[e]] += output * graph.share(e);
  }
  let token = 0;
  let error = 0;
  for (let i = 0; i < graph.n; i++) {
    if (graph.kind[i] === "token") token += influence[i];
    else if (graph.kind[i] === "error" || (graph.kind[i] === "feature" && !isKept(i))) error += influence[i];
  }
  return {
    replacement: share(token, token + error),
    completeness: 1 - share(error, counted - lost),
    replacement_bounds: [share(token, token + error + lost), share(token + lost, token + error + lost)],
    completeness_bounds: [1 - share(error + lost, counted), 1 - share(error, counted + further)],
  };
}

function share(part: number, whole: number): number {
  return whole > 0 ? part / whole : 0;
}

/** The nodes of the path from one node to another whose product of shares is largest; null where there is none. */
export function strongestPath(graph: Graph, from: number, to: number): number[] | null {
  const best = new Float64Array(graph.n);
  const next = new Int32Array(graph.n).fill(-1);
  best[to] = 1;
  for (const i of topDown(graph)) {
    if (!best[i] || i === from) continue;
    for (const e of graph.inEdges(i)) {
      const value = best[i] * graph.share(e);
      const s = graph.source[e];
      if (value > best[s]) {
        best[s] = value;
        next[s] = i;
      }
    }
  }
  if (!best[from] || from === to) return null;
  const path = [from];
  while (path[path.length - 1] !== to) path.push(next[path[path.length - 1]]);
  return path;
}
