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

const LABELLED = { across: 82, down: 48, narrow: 46, gap: 12 };
const CLOSE = { across: 15, down: 15, narrow: 15, gap: 12 };

/** Mean width of a bold letter of the tokens below the graph. */
export const LETTER = 7.8;
const LONGEST_TOKEN = 12;

/** A graph that would have to be drawn smaller than this to be seen whole is seen in part at first. */
export const SMALLEST_SCALE = 0.3;

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
  const count = (row: number, column: number) => cells.get(`${row} ${column}`)?.length ?? 0;
  // Cells of several nodes may be wide or deep: what lets the whole be drawn largest is taken.
  const shapes = [3, 2, 1.2, 0.8, 0.5].map((breadth) => {
    const across = columns.map((column) => {
      const most = Math.max(...rows.map((row) => count(row, column)));
      return most <= 2 && breadth > 0.5 ? most : Math.ceil(Math.sqrt(most * breadth));
    });
    const widths = columns.map((column, c) => {
      const most = Math.max(...rows.map((row) => count(row, column)));
      const own = rows.flatMap((row) => cells.get(`${row} ${column}`) ?? []);
      const isNarrow = column >= 0 && own.every((i) => ["token", "position", "error"].includes(graph.kind[i]));
      const stagger = across[c] > 0 && most > across[c] ? 0.5 : 0;
      const wide = (across[c] + stagger) * (isNarrow ? pitch.narrow : pitch.across) + pitch.gap;
      const letters = Math.min(graph.data.tokens[column]?.trim().length ?? 0, LONGEST_TOKEN);
      return isLabelled ? Math.max(wide, letters * LETTER + pitch.gap) : wide;
    });
    const heights = rows.map((row) => Math.max(...columns.map((column, c) => Math.ceil(count(row, column) / across[c]))) * pitch.down + pitch.gap);
    const scale = Math.min(width / sum(widths), height / sum(heights), 1);
    return { across, widths, heights, scale: scale > 0 ? Math.max(scale, SMALLEST_SCALE) : 1 };
  });
  const { across, widths, heights, scale } = shapes.reduce((best, shape) => (shape.scale > best.scale + 1e-9 ? shape : best));
  const columnBands = spread(columns.map(String), widths, width / scale);
  const rowBands = spread(rows.map((row) => rowName(graph, row)), heights, height / scale);
  const x = new Float32Array(graph.n);
  const y = new Float32Array(graph.n);
  rows.forEach((row, r) => {
    columns.forEach((column, c) => {
      const cell = cells.get(`${row} ${column}`);
      if (!cell) return;
      cell.sort((a, b) => influence[b] - influence[a] || a - b);
      const n = Math.min(across[c], cell.length);
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

function sum(values: number[]): number {
  return values.reduce((total, value) => total + value, 0) || 1;
}

function spread(names: string[], sizes: number[], available: number): Band[] {
  const total = sum(sizes);
  const extra = sizes.length ? Math.max(available - total, 0) / sizes.length : 0;
  let at = 0;
  return names.map((name, i) => {
    const band = { name, from: at, to: at + sizes[i] + extra };
    at = band.to;
    return band;
  });
}
