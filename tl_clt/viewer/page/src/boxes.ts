// The pinned nodes as boxes, one for each supernode or single node, and the edges between them; laid out by dagre.

import { Graph as Dagre, layout as runDagre } from "@dagrejs/dagre";

import { LineStyle, Painter, Palette, wrap } from "./picture";
import { Store } from "./store";

export interface Box {
  /** A node's id, or `group:` and the group's name. */
  id: string;
  group: string | null;
  members: number[];
  title: string;
  /** Of a group: its members, a line for each. */
  lines: string[];
  isMarked: boolean;
  x: number;
  y: number;
  width: number;
  height: number;
}

export interface Link {
  from: Box;
  to: Box;
  /** Sum of the weights of the edges from all members of the one to all of the other. */
  weight: number;
  count: number;
}

export interface Subgraph {
  boxes: Box[];
  links: Link[];
}

const WIDTH = 172;
const LINE = 15;
const PER_LINE = 20;
const TITLE_LINES = 4;
const MOST_LINES = 6;

export function buildSubgraph(store: Store): Subgraph {
  const { notes, graph } = store;
  const inGroup = new Set(notes.groups.flatMap((group) => group.members));
  const boxes: Box[] = [];
  const add = (id: string, group: string | null, ids: string[]) => {
    const members = ids.map((member) => store.numberOf(member)).filter((i): i is number => i !== null);
    if (!members.length) return;
    const title = group ?? boxName(store, members[0]);
    const lines = group === null ? [] : members.slice(0, MOST_LINES).map((i) => boxName(store, i));
    if (members.length > MOST_LINES) lines.push(`and ${members.length - MOST_LINES} more`);
    const rows = wrap(title, PER_LINE, TITLE_LINES).length;
    boxes.push({
      id,
      group,
      members,
      title,
      lines,
      isMarked: ids.every((member) => store.marked.includes(member)),
      x: 0,
      y: 0,
      width: WIDTH,
      height: 20 + rows * LINE + (group === null ? LINE : 4 + lines.length * LINE),
    });
  };
  for (const group of notes.groups) add(`group:${group.name}`, group.name, group.members);
  for (const id of notes.pinned) if (!inGroup.has(id)) add(id, null, [id]);
  const links = linkBoxes(store, boxes);
  place(store, boxes, links);
  return { boxes, links: links.filter((link) => link.weight !== 0) };

  function linkBoxes(store: Store, boxes: Box[]): Link[] {
    const boxOf = new Map<number, Box>();
    for (const box of boxes) for (const i of box.members) boxOf.set(i, box);
    const found = new Map<string, Link>();
    for (const [i, to] of boxOf) {
      for (const e of graph.inEdges(i)) {
        const from = boxOf.get(graph.source[e]);
        if (!from || from === to) continue;
        const key = `${boxes.indexOf(from)} ${boxes.indexOf(to)}`;
        const link = found.get(key) ?? { from, to, weight: 0, count: 0 };
        link.weight += graph.weight[e];
        link.count++;
        found.set(key, link);
      }
    }
    return [...found.values()].filter((link) => isSignShown(store, link.weight));
  }
}

function isSignShown(store: Store, weight: number): boolean {
  return store.state.sign === "both" || weight > 0 === (store.state.sign === "positive");
}

function boxName(store: Store, node: number): string {
  const { graph } = store;
  const name = store.nameOf(node);
  if (graph.kind[node] === "logit") return `${name} ${Math.round(100 * graph.outputWeight[node])}%`;
  return name;
}

/** Where a single node is, below its name. */
export function boxPlace(store: Store, box: Box): string {
  const { graph } = store;
  const node = box.members[0];
  const { layer, pos } = graph.data.nodes;
  const token = pos[node] < 0 ? "" : (graph.data.tokens[pos[node]]?.trim() ?? "");
  if (graph.kind[node] === "feature") return `layer ${layer[node]} · ${token}`;
  if (graph.kind[node] === "logit") return "output";
  return graph.kind[node] === "token" ? `token ${pos[node]}` : graph.kind[node];
}

/** dagre puts sources below what they write to; boxes that were dragged stay where they are. */
function place(store: Store, boxes: Box[], links: Link[]): void {
  const dagre = new Dagre({ multigraph: false, compound: false });
  dagre.setGraph({ rankdir: "BT", nodesep: 24, ranksep: 30, marginx: 8, marginy: 8 });
  dagre.setDefaultEdgeLabel(() => ({}));
  for (const box of boxes) dagre.setNode(box.id, { width: box.width, height: box.height });
  for (const link of links) {
    // Two groups may write to each other, where each has members of several layers: the stronger direction ranks them.
    const back = links.find((other) => other.from === link.to && other.to === link.from);
    if (!back || Math.abs(back.weight) < Math.abs(link.weight)) dagre.setEdge(link.from.id, link.to.id, { weight: 1 });
  }
  runDagre(dagre);
  for (const box of boxes) {
    const at = dagre.node(box.id) as { x: number; y: number };
    const [x, y] = store.notes.places[box.id] ?? [at.x, at.y];
    box.x = x;
    box.y = y;
  }
}

/** The rectangle that holds all boxes: left, top, width, height. */
export function boundsOf(boxes: Box[], margin = 14): [number, number, number, number] {
  if (!boxes.length) return [0, 0, 100, 100];
  const left = Math.min(...boxes.map((box) => box.x - box.width / 2)) - margin;
  const top = Math.min(...boxes.map((box) => box.y - box.height / 2)) - margin;
  const right = Math.max(...boxes.map((box) => box.x + box.width / 2)) + margin;
  const bottom = Math.max(...boxes.map((box) => box.y + box.height / 2)) + margin;
  return [left, top, right - left, bottom - top];
}

/** Where a link leaves the one box and reaches the other: top and bottom, whichever lie towards each other. */
export function linkEnds({ from, to }: Link): [number, number, number, number] {
  const isUp = to.y <= from.y;
  return [from.x, from.y + (isUp ? -from.height / 2 : from.height / 2), to.x, to.y + (isUp ? to.height / 2 : -to.height / 2)];
}

export function linkStyle(link: Link, most: number, palette: { positive: string; negative: string }): LineStyle {
  const strength = Math.sqrt(Math.abs(link.weight) / (most || 1));
  return {
    stroke: link.weight > 0 ? palette.positive : palette.negative,
    width: 0.8 + 5 * strength,
    alpha: 0.35 + 0.6 * strength,
    isDashed: link.weight < 0,
  };
}

/** The same as a picture, for files. */
export function drawSubgraph(painter: Painter, store: Store, { boxes, links }: Subgraph, palette: Palette): void {
  const [left, top, width, height] = boundsOf(boxes);
  const most = Math.max(...links.map((link) => Math.abs(link.weight)), 0);
  painter.rect(0, 0, width, height, palette.back);
  for (const link of links) {
    const [x1, y1, x2, y2] = linkEnds(link);
    painter.curve(x1 - left, y1 - top, x2 - left, y2 - top, linkStyle(link, most, palette));
  }
  for (const box of boxes) {
    const [x, y] = [box.x - left - box.width / 2, box.y - top - box.height / 2];
    painter.rect(x, y, box.width, box.height, box.group === null ? palette.back : palette.band, palette.node, 7);
    textOf(store, box).forEach((line) => {
      painter.text(line.text, x + box.width / 2, y + line.y, { size: line.size, fill: line.isQuiet ? palette.quiet : palette.text, bold: line.isBold });
    });
  }
}

export interface BoxText {
  text: string;
  y: number;
  size: number;
  isBold: boolean;
  isQuiet: boolean;
  member: number | null;
}

/** The lines written in a box. */
export function textOf(store: Store, box: Box): BoxText[] {
  const title = wrap(box.title, PER_LINE, TITLE_LINES).map((text, i) => ({
    text,
    y: 18 + i * LINE,
    size: 12.5,
    isBold: true,
    isQuiet: false,
    member: box.group === null ? box.members[0] : null,
  }));
  const start = 18 + title.length * LINE;
  const below = box.group === null ? [boxPlace(store, box)] : box.lines;
  return title.concat(
    below.map((text, i) => ({
      text: wrap(text, PER_LINE + 5, 1)[0] ?? "",
      y: start + (box.group === null ? 0 : 3) + i * LINE,
      size: 11,
      isBold: false,
      isQuiet: true,
      member: (box.group === null ? box.members[0] : box.members[i]) ?? null,
    })),
  );
}
