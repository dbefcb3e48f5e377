// The subgraph that one builds: pinned nodes and supernodes, to drag, group and name, with its scores.

import { drag } from "d3-drag";
import { pointer, select } from "d3-selection";
import { useEffect, useMemo, useRef, useState } from "preact/hooks";

import { boundsOf, Box, buildSubgraph, linkEnds, linkStyle, textOf } from "./boxes";
import { number, Store } from "./store";
import { Scores } from "./types";
import { scoreSubgraph } from "./walks";

interface Props {
  store: Store;
  /** Ask for a text; the page shows a small dialog. */
  ask(title: string, value: string, done: (text: string) => void): void;
}

const STEP = 12;
/** A subgraph that would be drawn smaller than this is scrolled instead. */
const SMALLEST = 0.72;

/** Scores of the subgraph: features that are not pinned count as errors. Null while none is pinned. */
export function pinnedScores(store: Store): Scores | null {
  const kept = new Set(store.pinned);
  const { graph } = store;
  return [...kept].some((i) => graph.kind[i] === "feature") ? scoreSubgraph(graph, (i) => kept.has(i)) : null;
}

export function SubgraphPanel({ store, ask }: Props) {
  const svg = useRef<SVGSVGElement>(null);
  const { notes, graph } = store;
  const subgraph = useMemo(() => buildSubgraph(store), [notes, graph, store.marked, store.state.labels, store.state.sign, store.loaded]);
  const scores = useMemo(() => pinnedScores(store), [notes.pinned, graph]);
  const [isLarge, setIsLarge] = useState(false);
  const [frozen, setFrozen] = useState<[number, number, number, number] | null>(null);
  const { boxes, links } = subgraph;
  const most = Math.max(...links.map((link) => Math.abs(link.weight)), 0);
  const [left, top, width, height] = frozen ?? boundsOf(boxes);
  const latest = useRef(boxes);
  latest.current = boxes;

  useEffect(() => {
    const dragging = drag<SVGGElement, unknown>()
      .container(() => svg.current!)
      .clickDistance(4)
      .subject(function (event) {
        const box = latest.current.find((box) => box.id === this.dataset.box)!;
        const [x, y] = pointer(event.sourceEvent, svg.current!);
        return { x, y, box };
      })
      .on("start", () => setFrozen(boundsOf(latest.current)))
      .on("drag", (event) => {
        const { box, x, y } = event.subject as { box: Box; x: number; y: number };
        const at: [number, number] = [box.x + event.x - x, box.y + event.y - y];
        store.note({ places: { ...store.notes.places, [box.id]: at } }, `drag ${box.id}`);
      })
      .on("end", () => {
        setFrozen(null);
        store.endMerge();
      });
    select(svg.current).selectAll<SVGGElement, unknown>("g.box").call(dragging);
  }, [boxes.map((box) => box.id).join("\n")]);

  const idsOf = (box: Box) => box.members.map((i) => graph.ids[i]);
  const toggleMark = (box: Box) => {
    const ids = idsOf(box);
    const isMarked = ids.every((id) => store.marked.includes(id));
    store.mark(isMarked ? store.marked.filter((id) => !ids.includes(id)) : [...new Set([...store.marked, ...ids])]);
    store.say(`${box.title} ${isMarked ? "no longer marked" : "marked"}; ${store.marked.length} nodes marked.`);
  };
  const rename = (box: Box) => {
    if (box.group !== null) ask("Name of the group", box.group, (name) => store.renameGroup(box.group!, name));
    else ask("Label of the node", store.labelOf(box.members[0]) ?? "", (label) => store.relabel(box.members[0], label));
  };
  const onKeyDown = (event: KeyboardEvent, box: Box) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (step) {
      const at: [number, number] = [box.x + step[0] * STEP, box.y + step[1] * STEP];
      store.note({ places: { ...notes.places, [box.id]: at } }, `drag ${box.id}`);
    } else if (event.key === "Enter") store.select(box.members[0]);
    else if (event.key === "x" || event.key === " ") toggleMark(box);
    else if (event.key === "e" || event.key === "F2") rename(box);
    else if (event.key === "Delete" && box.group !== null) store.ungroup(box.group);
    else if (event.key === "Delete") store.togglePin(box.members[0]);
    else return;
    event.preventDefault();
    event.stopPropagation();
  };
  if (!boxes.length) {
    return (
      <section class="subgraph empty" aria-label="Subgraph">
        <p>
          <strong>Your subgraph.</strong> Pin nodes with <kbd>p</kbd> or Shift and a click; mark some with <kbd>x</kbd> and group them with <kbd>g</kbd>. Its
          scores count what is not pinned as errors.
        </p>
      </section>
    );
  }
  return (
    <section class={isLarge ? "subgraph large" : "subgraph"} aria-label="Subgraph" data-testid="subgraph">
      <div class="bar">
        <h2>Subgraph</h2>
        <span class="scores" data-testid="pinned-scores">
          {scores ? `replacement ${between(scores.replacement, scores.replacement_bounds)} · completeness ${between(scores.completeness, scores.completeness_bounds)}` : "no feature pinned"}
        </span>
        <span class="fill" />
        <button type="button" disabled={!store.marked.length} onClick={() => askGroup(store, ask)}>
          Group{store.marked.length ? ` ${store.marked.length}` : ""} <kbd>g</kbd>
        </button>
        <button type="button" aria-pressed={isLarge} title="The subgraph alone, without the graph above it" onClick={() => setIsLarge(!isLarge)} data-testid="enlarge">
          Enlarge
        </button>
        <button type="button" disabled={!Object.keys(notes.places).length} onClick={() => store.note({ places: {} })} data-testid="auto-layout">
          Lay out <kbd>l</kbd>
        </button>
      </div>
      <div class="boxes" tabIndex={0} role="group" aria-label="Boxes of the subgraph">
        <svg
          ref={svg}
          viewBox={`${left} ${top} ${width} ${height}`}
          style={{ maxWidth: `${width * 1.1}px`, maxHeight: `${height * 1.1}px`, minHeight: `${height * SMALLEST}px` }}
          role="group"
          aria-label={`Subgraph of ${boxes.length} boxes and ${links.length} edges`}
        >
          {links.map((link) => {
            const [x1, y1, x2, y2] = linkEnds(link);
            const style = linkStyle(link, most, { positive: "positive", negative: "negative" });
            const middle = (y1 + y2) / 2;
            return (
              <path
                key={`${link.from.id} ${link.to.id}`}
                class={`link ${style.stroke}`}
                d={`M${x1},${y1}C${x1},${middle} ${x2},${middle} ${x2},${y2}`}
                stroke-width={style.width}
                stroke-opacity={style.alpha}
                stroke-dasharray={style.isDashed ? "6 4" : undefined}
              >
                <title>{`${link.from.title} to ${link.to.title}: ${number(link.weight)}${link.count > 1 ? ` (${link.count} edges)` : ""}`}</title>
              </path>
            );
          })}
          {boxes.map((box) => (
            <g
              key={box.id}
              class={`box ${box.group === null ? "" : "group"} ${box.isMarked ? "marked" : ""} ${box.members.includes(store.selected ?? -1) ? "selected" : ""}`}
              data-box={box.id}
              transform={`translate(${box.x - box.width / 2},${box.y - box.height / 2})`}
              tabindex={0}
              role="button"
              aria-pressed={box.isMarked}
              aria-label={describeBox(store, box)}
              onKeyDown={(event) => onKeyDown(event, box)}
              onClick={(event) => {
                const member = (event.target as Element).closest("[data-member]")?.getAttribute("data-member");
                if (event.shiftKey || event.ctrlKey || event.metaKey) toggleMark(box);
                else store.select(member ? Number(member) : box.members[0]);
              }}
              onDblClick={() => rename(box)}
              onPointerEnter={() => store.hover(box.members[0])}
              onPointerLeave={() => store.hover(null)}
            >
              <title>{`${box.title}\n${describeMembers(store, box)}`}</title>
              <rect width={box.width} height={box.height} rx={7} />
              {textOf(store, box).map((line, i) => (
                <text key={i} class={line.isBold ? "title" : ""} x={box.width / 2} y={line.y} font-size={line.size} data-member={line.member ?? undefined}>
                  {`${line.text} `}
                </text>
              ))}
            </g>
          ))}
        </svg>
      </div>
    </section>
  );
}

/** What is written in a box, and then what it stands for in full. */
function describeBox(store: Store, box: Box): string {
  const written = textOf(store, box).map((line) => line.text).join(" ");
  return `${written}: ${describeMembers(store, box)}`;
}

function describeMembers(store: Store, box: Box): string {
  const members = box.members.map((i) => store.graph.data.nodes.label[i]).join(", ");
  return box.group === null ? members : `group of ${members}`;
}

/** A number, with its bounds where these differ. */
export function between(value: number, [low, high]: [number, number]): string {
  const isSure = high - low < 5e-4;
  return isSure ? value.toFixed(3) : `${value.toFixed(3)} [${low.toFixed(3)} to ${high.toFixed(3)}]`;
}

/** Group what is marked, or say how to mark. */
export function askGroup(store: Store, ask: Props["ask"]): void {
  const members = store.marked.filter((id) => store.numberOf(id) !== null);
  if (!members.length) return store.say("Mark boxes of the subgraph first: x on the keyboard, or Shift and a click.");
  const names = members.map((id) => store.labelOf(store.numberOf(id)!)).filter(Boolean);
  ask("Name of the group", names[0] ?? "", (name) => store.group(members, name));
}
