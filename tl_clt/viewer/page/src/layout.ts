// Where the nodes stand: a column for each token (and one for what acts at all positions), a row for each layer.

import { Graph } from "./graph";
import { Visible } from "./visible";

/** Up to so many nodes, each has its label below it; more stand closely, and tell their names when pointed at. */
export const MOST_LABELLED = 140;

export interface Band {
  /** Position, or layer; rows also have "position", "token" and "logit". */
  name: string;
  from: number;
  to: number;
}

export interface Layout {
  x: Float32Array;
  y: Float32Array;
  columns: Band[];
  rows: Band[];
  width: number;
  height: number;
  isLabelled: boolean;
}

const LABELLED = { across: 86, down: 48, narrow: 54, gap: 14 };
const CLOSE = { across: 15, down: 15, narrow: 15, gap: 12 };

/** Row of a node, counted from the bottom: positions, tokens, the layers, outputs. */
export function rowOf(graph: Graph, node: number): number {
  const layer = graph.data.nodes.layer[node];
  switch (graph.kind[node]) {
    case "position":
      return 0;
    case "token":
      return 1;
    case "logit":
      return 2 + graph.data.n_layers;
    default:
      return 2 + Math.min(Math.max(layer, 0), graph.data.n_layers);
  }
}

function rowName(graph: Graph, row: number): string {
  if (row === 0) return "position";
  if (row === 1) return "token";
  return row === 2 + graph.data.n_layers ? "output" : `layer ${row - 2}`;
}

/** Place the nodes shown; columns and rows grow beyond what they need until they fill the space given. */
export function placeNodes(graph: Graph, visible: Visible, width: number, height: number): Layout {
  const { pos, influence } = graph.data.nodes;
  const isLabelled = visible.nodes.length <= MOST_LABELLED;
  const pitch = isLabelled ? LABELLED : CLOSE;
  const cells = new Map<string, number[]>();
  const rowNumbers = new Set<number>();
  const columnNumbers = new Set<number>();
  for (const i of visible.nodes) {
    const row = rowOf(graph, i);
    const key = `${row} ${pos[i]}`;
    rowNumbers.add(row);
    columnNumbers.add(pos[i]);
    const cell = cells.get(key);
    if (cell) cell.push(i);
    else cells.set(key, [i]);
  }
  const rows = [...rowNumbers].sort((a, b) => b - a);
  const columns = [...columnNumbers].sort((a, b) => a - b);
  const across = new Map<number, number>();
  const widths = columns.map((column) => {
    const own = rows.map((row) => cells.get(`${row} ${column}`) ?? []);
    const most = Math.max(...own.map((cell) => cell.length));
    const n = most <= 2 ? most : Math.ceil(Math.sqrt(most * (isLabelled ? 1.8 : 1)));
    across.set(column, n);
    const isNarrow = column >= 0 && own.every((cell) => cell.every((i) => ["token", "position", "error"].includes(graph.kind[i])));
    return n * (isNarrow ? pitch.narrow : pitch.across) + (n > 1 && most > n ? pitch.across / 2 : 0) + pitch.gap;
  });
  const deep = (row: number, column: number) =>
    Math.ceil((cells.get(`${row} ${column}`)?.length ?? 0) / (across.get(column) ?? 1));
  const heights = rows.map((row) => Math.max(...columns.map((column) => deep(row, column))) * pitch.down + pitch.gap);
  const columnBands = spread(columns.map(String), widths, width);
  const rowBands = spread(rows.map((row) => rowName(graph, row)), heights, height);
  const x = new Float32Array(graph.n);
  const y = new Float32Array(graph.n);
  rows.forEach((row, r) => {
    columns.forEach((column, c) => {
      const cell = cells.get(`${row} ${column}`);
      if (!cell) return;
      cell.sort((a, b) => influence[b] - influence[a] || a - b);
      const n = Math.min(across.get(column) ?? 1, cell.length);
      const lines = Math.ceil(cell.length / n);
      const band = columnBands[c];
      const step = Math.min((band.to - band.from - pitch.gap) / (n + (lines > 1 ? 0.5 : 0)), pitch.across * 1.5);
      const middle = (band.from + band.to) / 2;
      const [top, bottom] = [rowBands[r].from, rowBands[r].to];
      cell.forEach((i, j) => {
        const line = Math.floor(j / n);
        const inLine = Math.min(n, cell.length - line * n);
        // Lines of a cell stand staggered, so that edges pass between nodes.
        const stagger = lines > 1 ? (line % 2 ? step / 4 : -step / 4) : 0;
        x[i] = middle + ((j % n) - (inLine - 1) / 2) * step + stagger;
        const center = (top + bottom) / 2 - (isLabelled ? 8 : 0);
        y[i] = center + (line - (lines - 1) / 2) * pitch.down;
      });
    });
  });
  return {
    x,
    y,
    columns: columnBands,
    rows: rowBands,
    width: columnBands[columnBands.length - 1]?.to ?? 0,
    height: rowBands[rowBands.length - 1]?.to ?? 0,
    isLabelled,
  };
}

function spread(names: string[], sizes: number[], available: number): Band[] {
  const total = sizes.reduce((sum, size) => sum + size, 0);
  const extra = sizes.length ? Math.max(available - total, 0) / sizes.length : 0;
  let at = 0;
  return names.map((name, i) => {
    const band = { name, from: at, to: at + sizes[i] + extra };
    at = band.to;
    return band;
  });
}
