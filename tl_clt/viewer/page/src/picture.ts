// The picture of a graph, drawn through a painter: on a canvas, or into an SVG file.

import { Graph } from "./graph";
import { Layout, LETTER } from "./layout";
import { Store } from "./store";
import { Kind } from "./types";
import { Visible } from "./visible";

export interface Palette {
  back: string;
  band: string;
  line: string;
  text: string;
  quiet: string;
  node: string;
  accent: string;
  halo: string;
  positive: string;
  negative: string;
}

const NAMES: (keyof Palette)[] = ["back", "band", "line", "text", "quiet", "node", "accent", "halo", "positive", "negative"];
const FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif';

/** The colours that the style sheet gives an element. */
export function readPalette(element: Element): Palette {
  const style = getComputedStyle(element);
  return Object.fromEntries(NAMES.map((name) => [name, style.getPropertyValue(`--${name}`).trim()])) as unknown as Palette;
}

export interface TextStyle {
  size: number;
  fill: string;
  align?: "left" | "center" | "right";
  bold?: boolean;
  /** Colour of a rim around the letters, which keeps them readable above lines. */
  rim?: string;
  alpha?: number;
}

export interface LineStyle {
  stroke: string;
  width: number;
  alpha: number;
  isDashed: boolean;
}

export interface Painter {
  rect(x: number, y: number, width: number, height: number, fill: string, stroke?: string, radius?: number): void;
  /** A curve that leaves and arrives upright. */
  curve(x1: number, y1: number, x2: number, y2: number, style: LineStyle): void;
  /** A closed shape of straight lines, or a circle where there are no points. */
  mark(points: [number, number][] | null, x: number, y: number, r: number, fill: string, stroke: string, width: number, alpha: number): void;
  text(text: string, x: number, y: number, style: TextStyle): void;
}

const DASHES = [5, 4];

export class CanvasPainter implements Painter {
  constructor(readonly context: CanvasRenderingContext2D) {}

  rect(x: number, y: number, width: number, height: number, fill: string, stroke?: string, radius = 0): void {
    const { context } = this;
    context.beginPath();
    context.roundRect(x, y, width, height, radius);
    context.fillStyle = fill;
    context.fill();
    if (!stroke) return;
    context.strokeStyle = stroke;
    context.lineWidth = 1;
    context.stroke();
  }

  curve(x1: number, y1: number, x2: number, y2: number, style: LineStyle): void {
    const { context } = this;
    const middle = (y1 + y2) / 2;
    context.beginPath();
    context.moveTo(x1, y1);
    context.bezierCurveTo(x1, middle, x2, middle, x2, y2);
    context.strokeStyle = style.stroke;
    context.lineWidth = style.width;
    context.globalAlpha = style.alpha;
    context.setLineDash(style.isDashed ? DASHES : []);
    context.stroke();
    context.setLineDash([]);
    context.globalAlpha = 1;
  }

  mark(points: [number, number][] | null, x: number, y: number, r: number, fill: string, stroke: string, width: number, alpha: number): void {
    const { context } = this;
    context.beginPath();
    if (points) {
      points.forEach(([px, py]) => context.lineTo(x + px * r, y + py * r));
      context.closePath();
    } else context.arc(x, y, r, 0, 2 * Math.PI);
    context.globalAlpha = alpha;
    context.fillStyle = fill;
    context.fill();
    context.strokeStyle = stroke;
    context.lineWidth = width;
    context.stroke();
    context.globalAlpha = 1;
  }

  text(text: string, x: number, y: number, style: TextStyle): void {
    const { context } = this;
    context.font = `${style.bold ? "600 " : ""}${style.size}px ${FONT}`;
    context.textAlign = style.align ?? "center";
    context.textBaseline = "middle";
    context.globalAlpha = style.alpha ?? 1;
    if (style.rim) {
      context.strokeStyle = style.rim;
      context.lineWidth = 3;
      context.lineJoin = "round";
      context.strokeText(text, x, y);
    }
    context.fillStyle = style.fill;
    context.fillText(text, x, y);
    context.globalAlpha = 1;
  }
}

export class SvgPainter implements Painter {
  private readonly parts: string[] = [];

  constructor(
    readonly width: number,
    readonly height: number,
    readonly title: string,
  ) {}

  rect(x: number, y: number, width: number, height: number, fill: string, stroke?: string, radius = 0): void {
    const rim = stroke ? ` stroke="${stroke}"` : "";
    this.parts.push(
      `<rect x="${short(x)}" y="${short(y)}" width="${short(width)}" height="${short(height)}" rx="${radius}" fill="${fill}"${rim}/>`,
    );
  }

  curve(x1: number, y1: number, x2: number, y2: number, style: LineStyle): void {
    const middle = short((y1 + y2) / 2);
    const dash = style.isDashed ? ` stroke-dasharray="${DASHES.join(" ")}"` : "";
    this.parts.push(
      `<path d="M${short(x1)},${short(y1)}C${short(x1)},${middle} ${short(x2)},${middle} ${short(x2)},${short(y2)}" fill="none"` +
        ` stroke="${style.stroke}" stroke-width="${short(style.width)}" stroke-opacity="${short(style.alpha)}"${dash}/>`,
    );
  }

  mark(points: [number, number][] | null, x: number, y: number, r: number, fill: string, stroke: string, width: number, alpha: number): void {
    const style = `fill="${fill}" stroke="${stroke}" stroke-width="${width}" opacity="${short(alpha)}"`;
    const at = points?.map(([px, py]) => `${short(x + px * r)},${short(y + py * r)}`).join(" ");
    this.parts.push(
      at ? `<polygon points="${at}" ${style}/>` : `<circle cx="${short(x)}" cy="${short(y)}" r="${short(r)}" ${style}/>`,
    );
  }

  text(text: string, x: number, y: number, style: TextStyle): void {
    const anchor = { left: "start", center: "middle", right: "end" }[style.align ?? "center"];
    const rim = style.rim ? ` stroke="${style.rim}" stroke-width="3" stroke-linejoin="round" paint-order="stroke"` : "";
    const weight = style.bold ? ' font-weight="600"' : "";
    const alpha = style.alpha === undefined ? "" : ` opacity="${short(style.alpha)}"`;
    this.parts.push(
      `<text x="${short(x)}" y="${short(y)}" font-size="${style.size}" text-anchor="${anchor}" dominant-baseline="central"` +
        ` fill="${style.fill}"${weight}${rim}${alpha}>${escape(text)}</text>`,
    );
  }

  toString(): string {
    const { width, height } = this;
    return (
      `<svg xmlns="http://www.w3.org/2000/svg" width="${Math.ceil(width)}" height="${Math.ceil(height)}"` +
      ` viewBox="0 0 ${Math.ceil(width)} ${Math.ceil(height)}" role="img" font-family="${escape(FONT)}">` +
      `<title>${escape(this.title)}</title>${this.parts.join("")}</svg>\n`
    );
  }
}

function short(value: number): string {
  return String(Math.round(value * 100) / 100);
}

/** Text as XML has it, without the control characters that it has no place for. */
function escape(text: string): string {
  return text
    .replace(/[\u0000-\u0008\u000b\u000c\u000e-\u001f\ufffe\uffff]/g, "\ufffd")
    .replace(/[&<>"]/g, (sign) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[sign]!);
}

const DIAMOND: [number, number][] = [[0, -1.25], [1.25, 0], [0, 1.25], [-1.25, 0]];
const SQUARE: [number, number][] = [[-0.9, -0.9], [0.9, -0.9], [0.9, 0.9], [-0.9, 0.9]];
const UP: [number, number][] = [[0, -1.2], [1.1, 0.8], [-1.1, 0.8]];
const DOWN: [number, number][] = [[0, 1.2], [1.1, -0.8], [-1.1, -0.8]];
const HEXAGON: [number, number][] = [[1.2, 0], [0.6, 1.04], [-0.6, 1.04], [-1.2, 0], [-0.6, -1.04], [0.6, -1.04]];
const SHAPES: Record<Kind, [number, number][] | null> = {
  feature: null,
  error: DIAMOND,
  token: SQUARE,
  position: UP,
  bias: DOWN,
  logit: HEXAGON,
};

export function shapeOf(kind: Kind): [number, number][] | null {
  return SHAPES[kind];
}

/** Words cut to lines of at most so many characters; the last line ends in an ellipsis where something is left. */
export function wrap(text: string, perLine: number, most: number): string[] {
  const lines: string[] = [];
  // By characters, of which some are two units of a string.
  let rest = Array.from(text.trim().replace(/\s+/g, " "));
  const cut = (from: number, to?: number) => rest.slice(from, to).join("").trim();
  while (rest.length && lines.length < most) {
    if (rest.length <= perLine) {
      lines.push(cut(0));
      rest = [];
    } else if (lines.length === most - 1) {
      lines.push(`${cut(0, perLine - 1)}…`);
      rest = [];
    } else {
      const space = rest.lastIndexOf(" ", perLine);
      const at = space > perLine / 3 ? space : perLine;
      lines.push(cut(0, at));
      rest = Array.from(cut(at));
    }
  }
  return lines;
}

/** How the picture stands on the canvas: screen = k * world + (x, y). */
export interface View {
  x: number;
  y: number;
  k: number;
}

export const MARGIN = { left: 62, right: 46, top: 12, bottom: 30 };

export interface Scene {
  store: Store;
  graph: Graph;
  visible: Visible;
  layout: Layout;
  view: View;
  width: number;
  height: number;
  palette: Palette;
  /** Nodes found by a search. */
  found: Set<number>;
  /** Nodes that the graph compared with has as well; null where none is compared. */
  shared: Set<number> | null;
}

export function radiusOf(scene: Scene, node: number): number {
  // Outputs have no influence of their own: they are as large as they are probable.
  const { graph, layout } = scene;
  const root = Math.sqrt(Math.min(Math.max(graph.data.nodes.influence[node], graph.outputWeight[node]), 0.5));
  const size = layout.isLabelled ? 4.2 + 8 * root : 3.4 + 5 * root;
  return size * Math.min(Math.max(scene.view.k, 0.5), 1.6);
}

function toScreen(scene: Scene, node: number): [number, number] {
  const { layout, view } = scene;
  return [layout.x[node] * view.k + view.x, layout.y[node] * view.k + view.y];
}

/** Draws all edges shown, as strong as said: 1 where nothing is in focus, less where something else is. */
export type EdgeLayer = (strength: number) => void;

/** All edges shown. A canvas keeps them as a layer, since thousands take longer than all else together. */
export function drawEdges(painter: Painter, scene: Scene, strength: number): void {
  // The more there are, the finer and fainter each.
  const crowd = Math.min(Math.sqrt(300 / Math.max(scene.visible.edges.length, 1)), 1);
  for (const e of scene.visible.edges) drawEdge(painter, scene, e, strength * Math.max(0.55 * crowd, 0.16), Math.max(crowd, 0.4));
}

/** The whole picture. What is lit stands out, the rest is faint: the selected node's edges, or a path's. */
export function drawScene(painter: Painter, scene: Scene, path: number[] | null, layer?: EdgeLayer): void {
  const { graph, visible, layout, view, palette, store, width, height } = scene;
  painter.rect(0, 0, width, height, palette.back);
  layout.rows.forEach((row, r) => {
    if (r % 2 === 0) painter.rect(0, row.from * view.k + view.y, width, (row.to - row.from) * view.k, palette.band);
  });
  const selected = store.selected;
  const onPath = new Set(path ?? []);
  const weights = selected === null ? null : neighbours(graph, selected);
  const isFaint = (i: number) => (path ? !onPath.has(i) : weights !== null && !weights.has(i));
  const strength = path || weights ? 0.22 : 1;
  if (layer) layer(strength);
  else drawEdges(painter, scene, strength);
  const lit = path ? stepsOf(scene, path) : selected === null ? [] : edgesOf(scene, selected);
  for (const e of lit) drawEdge(painter, scene, e, 0.95, 1.5);
  for (const i of visible.nodes) drawNode(painter, scene, i, isFaint(i), weights);
  for (const i of labelled(scene)) drawLabel(painter, scene, i, isFaint(i));
  drawAxes(painter, scene);
}

/** Nodes whose label is drawn: all, or where they stand closely the likeliest output and the one selected. */
export function labelled({ graph, visible, layout, store }: Scene): number[] {
  if (layout.isLabelled) return visible.nodes;
  const outputs = visible.nodes.filter((i) => graph.kind[i] === "logit");
  const likeliest = outputs.sort((a, b) => graph.outputWeight[b] - graph.outputWeight[a]).slice(0, 1);
  return visible.nodes.filter((i) => likeliest.includes(i) || i === store.selected);
}

/** Edges of one node that are drawn when it is pointed at or selected, the strongest; its card lists them all. */
const MOST_OF_NODE = 400;

/**
 * The edges of a node to nodes that are shown, from the weakest; also those that are too weak to be drawn among all,
 * unless a smallest weight was chosen.
 */
function edgesOf({ graph, visible, store }: Scene, node: number): number[] {
  const { sign, minWeight } = store.state;
  if (!visible.isShown[node]) return [];
  return [...graph.inEdges(node), ...graph.outEdges(node)]
    .filter((e) => visible.isShown[graph.source[e]] && visible.isShown[graph.target[e]])
    .filter((e) => sign === "both" || graph.weight[e] > 0 === (sign === "positive"))
    .filter((e) => minWeight === null || Math.abs(graph.weight[e]) >= minWeight)
    .sort((a, b) => Math.abs(graph.weight[a]) - Math.abs(graph.weight[b]))
    .slice(-MOST_OF_NODE);
}

/** The edges along a path, where both ends are shown. */
function stepsOf({ graph, visible }: Scene, path: number[]): number[] {
  const steps = path.slice(1).map((to, i) => [...graph.inEdges(to)].find((e) => graph.source[e] === path[i])!);
  return steps.filter((e) => visible.isShown[graph.source[e]] && visible.isShown[graph.target[e]]);
}

/** What changes while the pointer moves: the node under it, its edges and neighbours. */
export function drawHover(painter: Painter, scene: Scene, node: number): void {
  const { graph, visible } = scene;
  const lit = neighbours(graph, node);
  // All else steps back, so that these edges are seen among thousands.
  const { width, height, palette, layout } = scene;
  painter.rect(MARGIN.left - 6, 0, width - MARGIN.left, height - MARGIN.bottom + 4, `color-mix(in srgb, ${palette.back} 70%, transparent)`);
  for (const e of edgesOf(scene, node)) drawEdge(painter, scene, e, 0.9, 1.4);
  const shown = [...lit.keys()].filter((i) => visible.isShown[i]);
  for (const i of shown) drawNode(painter, scene, i, false, lit);
  if (layout.isLabelled) for (const i of shown) drawLabel(painter, scene, i, false);
}

/** A node, and those that it has edges with, each with the weight of its edge. */
export function neighbours(graph: Graph, node: number): Map<number, number> {
  const found = new Map([[node, 0]]);
  for (const e of graph.inEdges(node)) found.set(graph.source[e], graph.weight[e]);
  for (const e of graph.outEdges(node)) found.set(graph.target[e], graph.weight[e]);
  return found;
}

function drawEdge(painter: Painter, scene: Scene, edge: number, alpha: number, scale: number): void {
  const { graph, palette } = scene;
  const weight = graph.weight[edge];
  const strength = Math.sqrt(Math.abs(weight) / (graph.maxWeight || 1));
  const [x1, y1] = toScreen(scene, graph.source[edge]);
  const [x2, y2] = toScreen(scene, graph.target[edge]);
  painter.curve(x1, y1, x2, y2, {
    stroke: weight > 0 ? palette.positive : palette.negative,
    width: (0.4 + 3.2 * strength) * scale,
    alpha: alpha * (0.25 + 0.75 * strength),
    isDashed: weight < 0,
  });
}

/** A node; its colour is that of its edge with the node in focus, where there is one. */
function drawNode(painter: Painter, scene: Scene, node: number, isFaint: boolean, weights: Map<number, number> | null): void {
  const { graph, palette, store, found, shared } = scene;
  const [x, y] = toScreen(scene, node);
  const r = radiusOf(scene, node);
  const isSelected = node === store.selected;
  const isPinned = store.notes.pinned.includes(graph.ids[node]);
  let fill = graph.kind[node] === "feature" || graph.kind[node] === "logit" ? palette.node : palette.quiet;
  const weight = weights?.get(node);
  if (weight) fill = weight > 0 ? palette.positive : palette.negative;
  if (shared && !shared.has(node) && graph.kind[node] === "feature") fill = palette.back;
  const alpha = isFaint ? 0.28 : 1;
  if (isSelected || found.has(node)) painter.mark(null, x, y, r + (isSelected ? 6 : 4), palette.halo, isSelected ? palette.accent : palette.halo, 1.5, isSelected ? 0.9 : 0.7);
  const rim = isPinned ? palette.accent : shared && !shared.has(node) ? palette.node : palette.back;
  painter.mark(shapeOf(graph.kind[node]), x, y, r, fill, rim, isPinned ? 2.6 : 1.2, alpha);
}

function drawLabel(painter: Painter, scene: Scene, node: number, isFaint: boolean): void {
  const { graph, layout, view, palette, store } = scene;
  const kind = graph.kind[node];
  // Tokens stand on the axis already.
  if (kind === "token" || kind === "position" || view.k < 0.55) return;
  const [x, y] = toScreen(scene, node);
  const size = Math.min(Math.max(11 * view.k, 9.5), 14);
  const isNamed = store.labelOf(node) !== null || kind === "logit";
  const perLine = Math.max(Math.floor((80 * view.k) / (size * 0.54)), 5);
  let name = store.nameOf(node);
  if (kind === "logit") name += ` ${Math.round(graph.outputWeight[node] * 100)}%`;
  const top = y + radiusOf(scene, node) + size * 0.75;
  wrap(name, perLine, layout.isLabelled ? 2 : 1).forEach((line, i) => {
    painter.text(line, x, top + i * size * 1.08, {
      size,
      fill: isNamed ? palette.text : palette.quiet,
      rim: palette.back,
      alpha: isFaint ? 0.35 : 1,
      bold: kind === "logit",
    });
  });
}

function drawAxes(painter: Painter, scene: Scene): void {
  const { graph, layout, view, width, height, palette } = scene;
  painter.rect(0, 0, MARGIN.left - 6, height, palette.back);
  painter.rect(0, height - MARGIN.bottom + 4, width, MARGIN.bottom, palette.back);
  for (const row of layout.rows) {
    const y = ((row.from + row.to) / 2) * view.k + view.y;
    if (y < 0 || y > height - MARGIN.bottom) continue;
    painter.text(row.name, MARGIN.left - 12, y, { size: 11, fill: palette.quiet, align: "right" });
  }
  let last = -Infinity;
  for (const column of layout.columns) {
    const x = ((column.from + column.to) / 2) * view.k + view.x;
    if (x < MARGIN.left - 4 || x > width) continue;
    const room = (column.to - column.from) * view.k;
    const position = Number(column.name);
    const token = position < 0 ? "all" : graph.data.tokens[position]?.trim() || "␣";
    // Where columns are narrower than their tokens, these are cut, or left out, rather than written over each other.
    const letters = Math.floor(Math.min(Math.max(room / LETTER, 5), (2 * (x - last - 4)) / LETTER));
    const [line] = letters < 2 ? [] : wrap(token, letters, 1);
    if (!line || (letters < 5 && line.endsWith("…"))) continue;
    last = x + (line.length * LETTER) / 2;
    painter.text(line, x, height - MARGIN.bottom / 2 + 2, { size: 12, fill: position < 0 ? palette.quiet : palette.text, bold: position >= 0 });
  }
}
