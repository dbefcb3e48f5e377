// A graph with its edges sorted by target and by source, and what follows from them.

import { GraphData, Kind } from "./types";

/** Edges of each node: those of node i stand in `edge` from start[i] to start[i + 1]. */
interface Sorted {
  start: Int32Array;
  edge: Int32Array;
}

const SMALLEST_INPUT = 1e-8;

export class Graph {
  readonly n: number;
  readonly nEdges: number;
  readonly kind: Kind[];
  readonly target: Int32Array;
  readonly source: Int32Array;
  readonly weight: Float64Array;
  /** Each node's absolute input, with what is not in the graph; shares of in-edges are taken of it. */
  readonly input: Float64Array;
  /** Probabilities on output nodes, 0 elsewhere. */
  readonly outputWeight: Float64Array;
  /** Share of all influence that nodes of more influence carry. */
  readonly shareAbove: Float64Array;
  /** An opaque name for each node, the same in every graph of a model: its kind, layer, index and position. */
  readonly ids: string[];
  readonly byId = new Map<string, number>();
  readonly maxWeight: number;
  private readonly into: Sorted;
  private readonly outOf: Sorted;
  private readonly byWeight: Float64Array;

  constructor(readonly data: GraphData) {
    const { nodes, edges } = data;
    this.kind = nodes.kind;
    this.n = nodes.kind.length;
    this.target = Int32Array.from(edges.target);
    this.source = Int32Array.from(edges.source);
    this.weight = Float64Array.from(edges.weight);
    this.nEdges = this.weight.length;
    this.into = sortBy(this.target, this.n);
    this.outOf = sortBy(this.source, this.n);
    this.input = Float64Array.from(nodes.dropped);
    for (let e = 0; e < this.nEdges; e++) this.input[this.target[e]] += Math.abs(this.weight[e]);
    for (let i = 0; i < this.n; i++) this.input[i] = Math.max(this.input[i], SMALLEST_INPUT);
    this.byWeight = this.weight.map(Math.abs).sort();
    this.maxWeight = this.nEdges ? this.byWeight[this.nEdges - 1] : 0;
    this.outputWeight = new Float64Array(this.n);
    let output = 0;
    for (let i = 0; i < this.n; i++) if (this.kind[i] === "logit") this.outputWeight[i] = data.probabilities[output++];
    this.shareAbove = this.sumAbove();
    this.ids = this.nameNodes();
    this.ids.forEach((id, i) => this.byId.set(id, i));
  }

  inEdges(node: number): Int32Array {
    return this.into.edge.subarray(this.into.start[node], this.into.start[node + 1]);
  }

  outEdges(node: number): Int32Array {
    return this.outOf.edge.subarray(this.outOf.start[node], this.outOf.start[node + 1]);
  }

  /** The edge's share of its target's absolute input. */
  share(edge: number): number {
    return Math.abs(this.weight[edge]) / this.input[this.target[edge]];
  }

  /** The smallest |weight| of the n strongest edges; 0 where there are no more than n. */
  weightOfRank(n: number): number {
    return n < this.nEdges ? this.byWeight[this.nEdges - n] : 0;
  }

  /** "layer/feature" of a feature node, under which what is known of it stands. */
  featureKey(node: number): string | null {
    return this.kind[node] === "feature" ? `${this.data.nodes.layer[node]}/${this.data.nodes.index[node]}` : null;
  }

  private sumAbove(): Float64Array {
    const { influence } = this.data.nodes;
    const order = Array.from(influence.keys()).sort((a, b) => influence[b] - influence[a]);
    const total = influence.reduce((sum, value) => sum + value, 0) || 1;
    const above = new Float64Array(this.n);
    let sum = 0;
    for (const i of order) {
      above[i] = sum / total;
      sum += influence[i];
    }
    return above;
  }

  private nameNodes(): string[] {
    const { layer, pos, index } = this.data.nodes;
    const seen = new Map<string, number>();
    return this.kind.map((kind, i) => {
      const id = `${kind}.${layer[i]}.${index[i]}.${pos[i]}`;
      const again = seen.get(id) ?? 0;
      seen.set(id, again + 1);
      return again ? `${id}.${again}` : id;
    });
  }
}

function sortBy(key: Int32Array, n: number): Sorted {
  const start = new Int32Array(n + 1);
  for (let e = 0; e < key.length; e++) start[key[e] + 1]++;
  for (let i = 0; i < n; i++) start[i + 1] += start[i];
  const next = start.slice(0, n);
  const edge = new Int32Array(key.length);
  for (let e = 0; e < key.length; e++) edge[next[key[e]]++] = e;
  return { start, edge };
}
