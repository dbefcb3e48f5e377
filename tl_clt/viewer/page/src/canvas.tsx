// The graph on a canvas: zoom, the node under the pointer, and the keyboard's way from node to node.

import { select } from "d3-selection";
import { zoom, ZoomBehavior, zoomIdentity, ZoomTransform } from "d3-zoom";
import Flatbush from "flatbush";
import { useEffect, useLayoutEffect, useMemo, useRef, useState } from "preact/hooks";

import { Layout, placeNodes, rowOf, SMALLEST_SCALE } from "./layout";
import { CanvasPainter, drawEdges, drawHover, drawScene, MARGIN, readPalette, Scene, View } from "./picture";
import { number, Store } from "./store";
import { Visible } from "./visible";

/** Pixels from a node within which the pointer means it. */
const REACH = 16;

interface Props {
  store: Store;
  visible: Visible;
  path: number[] | null;
  found: Set<number>;
  shared: Set<number> | null;
  /** Told of the scene whenever it is drawn, for exports and tests. */
  onScene(scene: Scene): void;
}

/** Pixels as (width, height) of an element, followed as they change. */
function useSize(ref: { current: HTMLElement | null }): [number, number] {
  const [size, setSize] = useState<[number, number]>([0, 0]);
  useLayoutEffect(() => {
    const element = ref.current!;
    const measure = () => setSize([element.clientWidth, element.clientHeight]);
    measure();
    const observer = new ResizeObserver(measure);
    observer.observe(element);
    return () => observer.disconnect();
  }, []);
  return size;
}

/** Whether the system asks for dark colours, followed as it changes. */
function useScheme(): boolean {
  const query = useMemo(() => matchMedia("(prefers-color-scheme: dark)"), []);
  const [isDark, setIsDark] = useState(query.matches);
  useEffect(() => {
    const follow = () => setIsDark(query.matches);
    query.addEventListener("change", follow);
    return () => query.removeEventListener("change", follow);
  }, []);
  return isDark;
}

export function GraphCanvas({ store, visible, path, found, shared, onScene }: Props) {
  const box = useRef<HTMLDivElement>(null);
  const base = useRef<HTMLCanvasElement>(null);
  const over = useRef<HTMLCanvasElement>(null);
  const tip = useRef<HTMLDivElement>(null);
  const zooming = useRef<ZoomBehavior<HTMLDivElement, unknown> | null>(null);
  const [width, height] = useSize(box);
  const [view, setView] = useState<View>({ x: MARGIN.left, y: MARGIN.top, k: 1 });
  const scheme = useScheme();
  const graph = store.graph;
  const inner = { width: width - MARGIN.left - MARGIN.right, height: height - MARGIN.top - MARGIN.bottom };
  const layout = useMemo(() => placeNodes(graph, visible, inner.width, inner.height), [graph, visible, width, height]);
  const index = useMemo(() => indexNodes(layout, visible), [layout, visible]);
  const scene = useRef<Scene | null>(null);
  const layer = useRef<KeptEdges | null>(null);
  const isMoving = useRef(false);

  // Laid out anew, the graph is seen whole; of one too large to be seen so, the end of the prompt, where outputs are.
  const fit = (smallest = 0) => {
    if (!width || !height || !layout.width) return;
    const k = Math.max(Math.min(inner.width / layout.width, inner.height / layout.height, 1.4), smallest);
    const spare = inner.width - layout.width * k;
    const x = MARGIN.left + (spare < 0 ? spare : spare / 2);
    const y = MARGIN.top + Math.max((inner.height - layout.height * k) / 2, 0);
    select(box.current!).call(zooming.current!.transform, zoomIdentity.translate(x, y).scale(k));
  };

  useEffect(() => {
    zooming.current = zoom<HTMLDivElement, unknown>()
      .scaleExtent([0.02, 12])
      .on("start", (event) => {
        isMoving.current = Boolean(event.sourceEvent);
      })
      .on("end", () => {
        isMoving.current = false;
        setView((last) => ({ ...last }));
      })
      .on("zoom", (event: { transform: ZoomTransform }) => {
        const { x, y, k } = event.transform;
        setView({ x, y, k });
      });
    select(box.current!).call(zooming.current).on("dblclick.zoom", null);
    return () => {
      select(box.current!).on(".zoom", null);
    };
  }, []);
  useEffect(() => fit(SMALLEST_SCALE), [layout]);

  useLayoutEffect(() => {
    if (!width || !height) return;
    const painter = prepare(base.current!, width, height);
    const palette = readPalette(box.current!);
    scene.current = { store, graph, visible, layout, view, width, height, palette, found, shared };
    layer.current = keepEdges(layer.current, scene.current, isMoving.current);
    drawScene(painter, scene.current, path, (strength) => stampEdges(painter, layer.current!, view, strength));
    onScene(scene.current);
    showHover();
    // All that a picture is made of; what else changes the page does not draw it again.
  }, [visible, layout, view, path, found, shared, width, height, scheme, store.state.selected, store.state.labels, store.loaded, store.state.theme, store.notes.pinned]);

  const showHover = () => {
    const now = scene.current;
    if (!now) return;
    const node = store.hovered;
    const painter = prepare(over.current!, now.width, now.height);
    const label = tip.current!;
    label.hidden = node === null || !now.visible.isShown[node];
    if (node === null || !now.visible.isShown[node]) return;
    // Within the axes, which lie on the canvas below.
    painter.context.save();
    painter.context.beginPath();
    painter.context.rect(MARGIN.left - 6, 0, now.width, now.height - MARGIN.bottom + 4);
    painter.context.clip();
    drawHover(painter, now, node);
    painter.context.restore();
    fillTip(label, store, node, now);
  };
  useEffect(() => store.onHover(showHover), [store]);

  const nodeAt = (event: MouseEvent): number | null => {
    const bounds = box.current!.getBoundingClientRect();
    const [x, y] = [event.clientX - bounds.left, event.clientY - bounds.top];
    const [worldX, worldY] = [(x - view.x) / view.k, (y - view.y) / view.k];
    const nearest = index?.neighbors(worldX, worldY, 1, REACH / view.k);
    return nearest?.length ? visible.nodes[nearest[0]] : null;
  };

  const onKeyDown = (event: KeyboardEvent) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key];
    if (step) {
      const next = nodeInDirection(store, visible, layout, step[0], step[1]);
      if (next !== null) {
        store.hover(next);
        store.say(store.describe(next));
      }
    } else if (event.key === "Enter" || event.key === " ") {
      if (store.hovered !== null) store.select(store.hovered);
    } else if (event.key === "+" || event.key === "=" || event.key === "-") {
      select(box.current!).call(zooming.current!.scaleBy, event.key === "-" ? 1 / 1.3 : 1.3);
    } else if (event.key === "0") fit();
    else return;
    event.preventDefault();
    event.stopPropagation();
  };

  return (
    <div
      ref={box}
      class="canvas"
      tabIndex={0}
      role="application"
      aria-label="Attribution graph. Arrow keys move among nodes, Enter selects, p pins, question mark for help."
      data-testid="graph"
      onPointerMove={(event) => {
        const node = nodeAt(event);
        box.current!.style.cursor = node === null ? "grab" : "pointer";
        store.hover(node);
      }}
      onPointerLeave={() => store.hover(null)}
      onClick={(event) => {
        const node = nodeAt(event);
        if (node !== null && event.shiftKey) store.togglePin(node);
        else store.select(node);
      }}
      onKeyDown={onKeyDown}
    >
      <canvas ref={base} aria-hidden="true" />
      <canvas ref={over} aria-hidden="true" />
      <div ref={tip} class="tip" hidden />
      <div class="zoom" role="group" aria-label="Zoom">
        <button type="button" title="Larger (+)" aria-label="Larger" onClick={() => select(box.current!).call(zooming.current!.scaleBy, 1.3)}>
          +
        </button>
        <button type="button" title="Smaller (-)" aria-label="Smaller" onClick={() => select(box.current!).call(zooming.current!.scaleBy, 1 / 1.3)}>
          −
        </button>
        <button type="button" title="The whole graph (0)" aria-label="The whole graph" onClick={() => fit()}>
          ⤢
        </button>
      </div>
    </div>
  );
}

/** An empty canvas of this size, at the screen's own resolution. */
function prepare(canvas: HTMLCanvasElement, width: number, height: number): CanvasPainter {
  const ratio = window.devicePixelRatio || 1;
  const [w, h] = [Math.round(width * ratio), Math.round(height * ratio)];
  if (canvas.width !== w || canvas.height !== h) {
    canvas.width = w;
    canvas.height = h;
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
  }
  const context = canvas.getContext("2d")!;
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  return new CanvasPainter(context);
}

/** The edges as they were last drawn, and how they stood then. */
interface KeptEdges {
  canvas: HTMLCanvasElement;
  view: View;
  scene: Scene;
}

/** The kept edges where they still hold, or drawn anew. While the graph is moved, they move as they are. */
function keepEdges(kept: KeptEdges | null, scene: Scene, isMoving: boolean): KeptEdges {
  const isSame =
    kept !== null &&
    (["visible", "layout", "width", "height"] as const).every((key) => kept.scene[key] === scene[key]) &&
    kept.scene.palette.positive === scene.palette.positive;
  const isInPlace = kept !== null && (["x", "y", "k"] as const).every((key) => kept.view[key] === scene.view[key]);
  if (isSame && (isInPlace || isMoving)) return kept;
  const canvas = kept?.canvas ?? document.createElement("canvas");
  drawEdges(prepare(canvas, scene.width, scene.height), scene, 1);
  return { canvas, view: scene.view, scene };
}

function stampEdges({ context }: CanvasPainter, { canvas, view: from, scene }: KeptEdges, to: View, strength: number): void {
  const scale = to.k / from.k;
  context.globalAlpha = strength;
  context.drawImage(canvas, to.x - from.x * scale, to.y - from.y * scale, scene.width * scale, scene.height * scale);
  context.globalAlpha = 1;
}

function indexNodes(layout: Layout, visible: Visible): Flatbush | null {
  if (!visible.nodes.length) return null;
  const index = new Flatbush(visible.nodes.length);
  for (const i of visible.nodes) index.add(layout.x[i], layout.y[i], layout.x[i], layout.y[i]);
  index.finish();
  return index;
}

/** Along a row by x; to the row above or below by the nearest x. */
export function nodeInDirection(store: Store, visible: Visible, layout: Layout, dx: number, dy: number): number | null {
  const { graph } = store;
  if (!visible.nodes.length) return null;
  const current = store.hovered ?? store.selected;
  if (current === null || !visible.isShown[current]) {
    const { influence } = graph.data.nodes;
    return visible.nodes.reduce((best, i) => (influence[i] > influence[best] ? i : best));
  }
  const row = rowOf(graph, current);
  if (dx) {
    const inRow = visible.nodes.filter((i) => rowOf(graph, i) === row).sort((a, b) => layout.x[a] - layout.x[b] || a - b);
    return inRow[Math.min(Math.max(inRow.indexOf(current) + dx, 0), inRow.length - 1)];
  }
  const rows = [...new Set(visible.nodes.map((i) => rowOf(graph, i)))].sort((a, b) => a - b);
  const next = rows[rows.indexOf(row) + dy];
  if (next === undefined) return current;
  const distance = (i: number) => Math.abs(layout.x[i] - layout.x[current]);
  return visible.nodes.filter((i) => rowOf(graph, i) === next).reduce((best, i) => (distance(i) < distance(best) ? i : best));
}

function fillTip(label: HTMLDivElement, store: Store, node: number, scene: Scene): void {
  const { graph } = scene;
  const { nodes } = graph.data;
  const lines = [
    store.labelOf(node),
    nodes.label[node],
    `activation ${number(nodes.activation[node])} · influence ${(100 * nodes.influence[node]).toPrecision(2)}%`,
    `${graph.inEdges(node).length} inputs, ${graph.outEdges(node).length} outputs`,
  ].filter((line): line is string => Boolean(line));
  label.replaceChildren(
    ...lines.map((line, i) => {
      const part = document.createElement(i === 0 ? "strong" : "span");
      part.textContent = line;
      return part;
    }),
  );
  const x = scene.layout.x[node] * scene.view.k + scene.view.x;
  const y = scene.layout.y[node] * scene.view.k + scene.view.y;
  const isRight = x > scene.width - 270;
  const isLow = y > scene.height - 110;
  label.style.left = isRight ? "" : `${x + 14}px`;
  label.style.right = isRight ? `${scene.width - x + 14}px` : "";
  label.style.top = isLow ? "" : `${y + 10}px`;
  label.style.bottom = isLow ? `${scene.height - y + 10}px` : "";
}
