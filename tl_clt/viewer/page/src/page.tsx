// The page: `mount` draws a graph and all that is done with it into an element.

import { render } from "preact";
import { useEffect, useLayoutEffect, useMemo, useReducer, useRef, useState } from "preact/hooks";

import { buildSubgraph, Subgraph } from "./boxes";
import { GraphCanvas } from "./canvas";
import { endPath, NodeCard } from "./card";
import { ComparePanel, sharedNodes } from "./compare";
import { Filters, findNodes, Prompt, Search } from "./controls";
import { changesOf, download, toJson, toPng, toPython, toSvg } from "./exports";
import { Scene } from "./picture";
import { number, Store } from "./store";
import { SteerPanel } from "./steer";
import "./style.css";
import { askGroup, between, pinnedScores, SubgraphPanel } from "./subgraph";
import { NodeTable } from "./table";
import { Options, PageData, Scores } from "./types";
import { findVisible, summarise, summariseFeatures } from "./visible";
import { scoreSubgraph, strongestPath } from "./walks";

/** What `mount` gives back; tests and shells look through it. */
export interface Handle {
  store: Store;
  /** Where a node is on the screen, in pixels of the window. */
  positionOf(node: number): [number, number] | null;
  scene(): Scene | null;
  subgraph(): Subgraph;
  /** Scores with only these features kept. */
  scoresOf(kept: number[]): Scores;
  pinnedScores(): Scores | null;
  path(): number[] | null;
  python(): string;
  json(): string;
  svg(what: "graph" | "subgraph"): string;
  /** Milliseconds from the start of the page to its first picture; null before. */
  firstPaint: number | null;
  unmount(): void;
}

declare global {
  interface Window {
    tlclt?: Handle;
  }
}

/** Draw a page into an element; `data` is what Python's `page_data` gives. */
export function mount(element: HTMLElement, data: PageData, options: Options = {}): Handle {
  if (data?.format !== "tl_clt.page") throw new Error("data is not what tl_clt.viewer.page_data gives");
  const store = new Store(data, options);
  element.classList.add("tlclt");
  let scene: Scene | null = null;
  const path = () => pathOf(store);
  const handle: Handle = {
    store,
    scene: () => scene,
    firstPaint: null,
    positionOf: (node) => {
      const canvas = element.querySelector(".canvas");
      if (!scene || !canvas) return null;
      const { left, top } = canvas.getBoundingClientRect();
      const { view, layout } = scene;
      return [left + layout.x[node] * view.k + view.x, top + layout.y[node] * view.k + view.y];
    },
    subgraph: () => buildSubgraph(store),
    scoresOf: (kept) => scoreSubgraph(store.graph, (i) => kept.includes(i)),
    pinnedScores: () => pinnedScores(store),
    path,
    python: () => toPython(store),
    json: () => toJson(store),
    svg: (what) => toSvg(store, scene!, what, path()),
    unmount: () => {
      store.close();
      render(null, element);
    },
  };
  const onScene = (drawn: Scene) => {
    scene = drawn;
    if (handle.firstPaint === null) {
      requestAnimationFrame(() => setTimeout(() => (handle.firstPaint ??= performance.now())));
    }
  };
  render(<Page store={store} element={element} onScene={onScene} ownsWindow={options.hash !== false} />, element);
  window.tlclt = handle;
  return handle;
}

/** The nodes of the path that is shown, from its lower end. */
function pathOf(store: Store): number[] | null {
  const ends = store.notes.path?.map((id) => store.numberOf(id));
  if (!ends || ends[0] === null || ends[1] === null) return null;
  return strongestPath(store.graph, ends[0], ends[1]) ?? strongestPath(store.graph, ends[1], ends[0]);
}

interface PageProps {
  store: Store;
  element: HTMLElement;
  onScene(scene: Scene): void;
  /** Whether the page is alone in its window, so that keys are its own wherever the focus is. */
  ownsWindow: boolean;
}

interface Asked {
  title: string;
  value: string;
  done(text: string): void;
}

type Tab = "node" | "compare" | "steer";

function Page({ store, element, onScene, ownsWindow }: PageProps) {
  const [, again] = useReducer((n: number) => n + 1, 0);
  const [query, setQuery] = useState("");
  const [asked, setAsked] = useState<Asked | null>(null);
  const [dialog, setDialog] = useState<"help" | "export" | null>(null);
  const [tab, setTab] = useState<Tab>("node");
  const scene = useRef<Scene | null>(null);
  useLayoutEffect(() => store.subscribe(() => again(0)), [store]);
  const { state, graph, notes } = store;
  const visible = useMemo(
    () => findVisible(graph, state),
    [graph, state.influence, state.minWeight, state.layers, state.hiddenTokens, state.sign, state.kinds],
  );
  const found = useMemo(() => findNodes(store, query), [query, graph, state.labels, store.loaded]);
  const foundSet = useMemo(() => new Set(query ? found : []), [found, query]);
  const path = useMemo(() => pathOf(store), [notes.path, graph]);
  const other = state.compare === null || state.compare === state.graph ? null : store.graphs[state.compare];
  const shared = useMemo(() => (other ? sharedNodes(graph, other) : null), [graph, other]);
  const ask = (title: string, value: string, done: (text: string) => void) => setAsked({ title, value, done });
  const tabs: [Tab, string][] = [["node", "Node"]];
  if (store.graphs.length > 1) tabs.push(["compare", "Compare"]);
  if (store.host.steer) tabs.push(["steer", "Steer"]);

  // Before anything is drawn, since the colours drawn with follow from it.
  if (element.dataset.theme !== state.theme) element.dataset.theme = state.theme;
  useLayoutEffect(() => setTab("node"), [state.selected]);

  const latest = useRef<(event: KeyboardEvent) => void>(() => {});
  latest.current = (event) => {
    const target = event.composedPath()[0] as HTMLElement;
    const isTyping = target.matches?.('input:not([type="range"]):not([type="checkbox"]), textarea, select');
    if (isTyping || asked || dialog || event.altKey) return;
    const isCommand = event.ctrlKey || event.metaKey;
    const node = store.hovered ?? store.selected;
    const key = isCommand ? `ctrl-${event.key.toLowerCase()}${event.shiftKey ? "-shift" : ""}` : event.key;
    const actions: Record<string, () => void> = {
      "/": () => element.querySelector<HTMLInputElement>(".search input")?.focus(),
      "?": () => setDialog("help"),
      p: () => node !== null && store.togglePin(node),
      g: () => askGroup(store, ask),
      x: () => node !== null && toggleMark(store, node),
      e: () => node !== null && ask(`Label of ${store.nameOf(node)}`, store.labelOf(node) ?? "", (label) => store.relabel(node, label)),
      t: () => {
        if (node === null) return;
        if (store.pathFrom === null || store.pathFrom === graph.ids[node]) {
          store.startPath(graph.ids[node]);
          store.say(`Path from ${store.nameOf(node)}: choose its other end, then t again.`);
        } else endPath(store, node);
      },
      l: () => store.note({ places: {} }),
      v: () => store.set({ view: state.view === "graph" ? "table" : "graph" }),
      u: () => store.undo(),
      r: () => store.redo(),
      "ctrl-z": () => store.undo(),
      "ctrl-z-shift": () => store.redo(),
      "ctrl-y": () => store.redo(),
      Escape: () => {
        if (store.pathFrom !== null) store.startPath(null);
        else if (notes.path) store.note({ path: null });
        else if (store.marked.length) store.mark([]);
        else store.select(null);
      },
    };
    if (!(key in actions)) return;
    event.preventDefault();
    actions[key]();
  };
  useEffect(() => {
    const listen = (event: KeyboardEvent) => latest.current(event);
    const where: HTMLElement | Document = ownsWindow ? document : element;
    where.addEventListener("keydown", listen as EventListener);
    return () => where.removeEventListener("keydown", listen as EventListener);
  }, []);

  return (
    <div class={ownsWindow ? "page whole" : "page"}>
      <header>
        <div class="titles">
          <h1 title={store.data.title}>{store.data.title}</h1>
          {store.graphs.length > 1 && (
            <select
              value={state.graph}
              aria-label="Graph shown"
              data-testid="which-graph"
              onChange={(event) => {
                const next = Number(event.currentTarget.value);
                store.hover(null);
                store.mark([]);
                store.set({ graph: next, selected: null, ...(state.compare === next ? { compare: state.graph } : {}) });
              }}
            >
              {store.graphs.map((entry, i) => (
                <option key={i} value={i}>
                  {entry.data.name}
                </option>
              ))}
            </select>
          )}
          <GraphScores store={store} />
        </div>
        <div class="tools">
          <Search store={store} query={query} onQuery={setQuery} found={found} />
          <button type="button" disabled={!store.canUndo} title="Undo (u, Ctrl-Z)" onClick={() => store.undo()} data-testid="undo">
            Undo
          </button>
          <button type="button" disabled={!store.canRedo} title="Redo (r, Ctrl-Shift-Z)" onClick={() => store.redo()} data-testid="redo">
            Redo
          </button>
          <button type="button" aria-pressed={state.view === "table"} title="The same as a table (v)" onClick={() => store.set({ view: state.view === "graph" ? "table" : "graph" })} data-testid="view">
            Table
          </button>
          <button type="button" onClick={() => setDialog("export")} data-testid="export">
            Export
          </button>
          <button
            type="button"
            title="Light, dark, or as the system has it"
            aria-label={`Colours: ${state.theme}`}
            onClick={() => store.set({ theme: state.theme === "auto" ? "dark" : state.theme === "dark" ? "light" : "auto" })}
            data-testid="theme"
          >
            {{ auto: "◐", dark: "☾", light: "☼" }[state.theme]}
          </button>
          <button type="button" title="All keys (?)" aria-label="Help" onClick={() => setDialog("help")} data-testid="help">
            ?
          </button>
        </div>
      </header>
      <div class="body">
        <main>
          <Filters store={store} visible={visible} />
          <Prompt store={store} />
          {state.view === "graph" ? (
            <GraphCanvas
              store={store}
              visible={visible}
              path={path}
              found={foundSet}
              shared={shared}
              onScene={(drawn) => {
                scene.current = drawn;
                onScene(drawn);
              }}
            />
          ) : (
            <NodeTable store={store} visible={visible} found={foundSet} />
          )}
          <p class="summary" role="status" data-testid="summary">
            {[summarise(graph, visible, store.countUnknown()), summariseFeatures(store.data, Boolean(store.host.loadFeature))].filter(Boolean).join(" ")}
          </p>
          <SubgraphPanel store={store} ask={ask} />
        </main>
        <aside aria-label="Details">
          {tabs.length > 1 && (
            <div class="tabs" role="tablist">
              {tabs.map(([name, title]) => (
                <button
                  key={name}
                  type="button"
                  role="tab"
                  id={`${store.uid}-tab-${name}`}
                  aria-selected={tab === name}
                  aria-controls={`${store.uid}-panel`}
                  data-testid={`tab-${name}`}
                  onClick={() => setTab(name)}
                >
                  {title}
                </button>
              ))}
            </div>
          )}
          <div
            class="panel"
            id={`${store.uid}-panel`}
            tabIndex={0}
            role={tabs.length > 1 ? "tabpanel" : "region"}
            aria-labelledby={tabs.length > 1 ? `${store.uid}-tab-${tab}` : undefined}
            aria-label={tabs.length > 1 ? undefined : "Node"}
          >
            {notes.path && tab === "node" && <PathCard store={store} path={path} />}
            {tab === "node" && <NodeCard store={store} />}
            {tab === "compare" && <ComparePanel store={store} />}
            {tab === "steer" && <SteerPanel store={store} />}
          </div>
        </aside>
      </div>
      <div class="unseen" role="status" aria-live="polite" data-testid="said">
        {store.said}
      </div>
      {asked && <AskDialog asked={asked} close={() => setAsked(null)} />}
      {dialog === "help" && <HelpDialog close={() => setDialog(null)} />}
      {dialog === "export" && <ExportDialog store={store} scene={scene.current} path={path} close={() => setDialog(null)} />}
    </div>
  );
}

/** Mark a node to be grouped; one that is not pinned is pinned with it. */
function toggleMark(store: Store, node: number): void {
  const id = store.graph.ids[node];
  if (store.marked.includes(id)) store.mark(store.marked.filter((other) => other !== id));
  else {
    if (!store.notes.pinned.includes(id)) store.togglePin(node);
    store.mark([...store.marked, id]);
  }
  store.say(`${store.nameOf(node)} ${store.marked.includes(id) ? "marked" : "no longer marked"}; ${store.marked.length} nodes marked.`);
}

function GraphScores({ store }: { store: Store }) {
  const { scores, unexplored } = store.graph.data;
  return (
    <p class="scores" data-testid="scores">
      <span title="Share of influence that starts at tokens rather than errors; in brackets, between which values the whole graph's lies">
        replacement {between(scores.replacement, scores.replacement_bounds)}
      </span>
      <span title="Share of inputs that are not errors, weighted by influence; in brackets, between which values the whole graph's lies">
        completeness {between(scores.completeness, scores.completeness_bounds)}
      </span>
      {unexplored > 0 && <span title="Share of influence that goes where this graph does not follow it">{(100 * unexplored).toFixed(1)}% unexplored</span>}
    </p>
  );
}

function PathCard({ store, path }: { store: Store; path: number[] | null }) {
  const { graph } = store;
  const close = (
    <button type="button" class="link" onClick={() => store.note({ path: null })} data-testid="path-close">
      Close
    </button>
  );
  if (!path) {
    return (
      <section class="path" data-testid="path">
        <p>No edges lead from one of the two nodes to the other. {close}</p>
      </section>
    );
  }
  const edges = path.slice(1).map((to, i) => [...graph.inEdges(to)].find((e) => graph.source[e] === path[i])!);
  const share = edges.reduce((product, e) => product * graph.share(e), 1);
  const isPositive = edges.filter((e) => graph.weight[e] < 0).length % 2 === 0;
  return (
    <section class="path" data-testid="path">
      <h3>Strongest path {close}</h3>
      <ol>
        {path.map((node, i) => (
          <li key={node}>
            <button type="button" class="link" onClick={() => store.select(node)}>
              {store.nameOf(node)}
            </button>
            {i < edges.length && (
              <span class="number">
                {graph.weight[edges[i]] > 0 ? "+" : "−"}
                {number(Math.abs(graph.weight[edges[i]]))} ({(100 * graph.share(edges[i])).toFixed(1)}%) ↓
              </span>
            )}
          </li>
        ))}
      </ol>
      <p class="quiet">
        Product of shares {(100 * share).toPrecision(2)}%, sign {isPositive ? "+" : "−"}.{" "}
        <button type="button" class="link" onClick={() => store.note({ pinned: [...new Set([...store.notes.pinned, ...path.map((i) => graph.ids[i])])] })} data-testid="pin-path">
          Pin its nodes
        </button>
      </p>
    </section>
  );
}

interface DialogProps {
  title: string;
  close(): void;
  children: preact.ComponentChildren;
}

function Dialog({ title, close, children }: DialogProps) {
  const box = useRef<HTMLDialogElement>(null);
  // Whoever opened it by keyboard goes on from where they were.
  useLayoutEffect(() => {
    const before = (box.current!.getRootNode() as Document | ShadowRoot).activeElement;
    box.current!.showModal();
    return () => {
      if (before instanceof HTMLElement || before instanceof SVGElement) before.focus();
    };
  }, []);
  return (
    <dialog
      ref={box}
      aria-label={title}
      onClose={close}
      onClick={(event) => {
        if (event.target === box.current) close();
      }}
    >
      <div class="dialog">
        <div class="bar">
          <h2>{title}</h2>
          <span class="fill" />
          <button type="button" aria-label="Close" onClick={close}>
            ✕
          </button>
        </div>
        {children}
      </div>
    </dialog>
  );
}

function AskDialog({ asked, close }: { asked: Asked; close(): void }) {
  const [text, setText] = useState(asked.value);
  return (
    <Dialog title={asked.title} close={close}>
      <form
        onSubmit={(event) => {
          event.preventDefault();
          asked.done(text);
          close();
        }}
      >
        <input autoFocus value={text} aria-label={asked.title} onInput={(event) => setText(event.currentTarget.value)} data-testid="asked" />
        <button type="submit" class="main">
          Keep
        </button>
      </form>
    </Dialog>
  );
}

const KEYS: [string, string][] = [
  ["← → ↑ ↓", "move along a row, to the row above or below"],
  ["Enter", "select the node"],
  ["p, Shift-click", "pin to the subgraph, or take out of it"],
  ["x", "mark (and pin) a node, to be grouped"],
  ["g", "group what is marked, and name it"],
  ["e", "edit the label of a node, or the name of a group"],
  ["l", "lay the subgraph out anew"],
  ["t, then t", "strongest path between two nodes"],
  ["/", "search"],
  ["v", "graph or table"],
  ["+ − 0", "larger, smaller, the whole graph"],
  ["u, Ctrl-Z", "undo"],
  ["r, Ctrl-Shift-Z", "redo"],
  ["Esc", "close the path, unmark, or unselect"],
  ["Delete", "in the subgraph: unpin a box, or dissolve a group"],
  ["?", "this list"],
];

function HelpDialog({ close }: { close(): void }) {
  return (
    <Dialog title="How to read and use this page" close={close}>
      <p>
        Tokens stand along x, layers along y. Circles are features, diamonds errors (what the transcoder leaves unexplained), squares tokens, hexagons outputs,
        triangles positions and biases. Larger nodes have more influence on the outputs.
      </p>
      <p>
        <span class="key plus">Blue, solid</span> edges push up, <span class="key minus">orange, dashed</span> ones push down; the thicker, the stronger. With a
        node selected, others are coloured by their edge with it.
      </p>
      <p>
        Scores in brackets are bounds: what the graph does not hold counts once as error, once as explained. The subgraph's scores count features that are not
        pinned as errors.
      </p>
      <table class="keys">
        <tbody>
          {KEYS.map(([key, what]) => (
            <tr key={key}>
              <th scope="row">
                <kbd>{key}</kbd>
              </th>
              <td>{what}</td>
            </tr>
          ))}
        </tbody>
      </table>
    </Dialog>
  );
}

interface ExportProps {
  store: Store;
  scene: Scene | null;
  path: number[] | null;
  close(): void;
}

function ExportDialog({ store, scene, path, close }: ExportProps) {
  const [error, setError] = useState("");
  const isSubgraph = store.pinned.length > 0;
  const python = toPython(store);
  const isChange = changesOf(store).length > 0;
  const png = (what: "graph" | "subgraph") =>
    toPng(store, scene!, what, path).then(
      (blob) => download(`${what}.png`, blob, "image/png"),
      (problem) => setError(problem.message),
    );
  const read = async (file: File | undefined) => {
    if (!file) return;
    try {
      store.import(JSON.parse(await file.text()));
      close();
    } catch (problem) {
      setError(`${file.name} was not read: ${(problem as Error).message}`);
    }
  };
  return (
    <Dialog title="Export and import" close={close}>
      <div class="exports">
        {scene && (
          <>
            <h3>The graph as it is shown</h3>
            <button type="button" onClick={() => download("graph.svg", toSvg(store, scene, "graph", path), "image/svg+xml")} data-testid="graph-svg">
              SVG
            </button>
            <button type="button" onClick={() => png("graph")} data-testid="graph-png">
              PNG
            </button>
          </>
        )}
        {scene && isSubgraph && (
          <>
            <h3>The subgraph</h3>
            <button type="button" onClick={() => download("subgraph.svg", toSvg(store, scene, "subgraph", path), "image/svg+xml")} data-testid="subgraph-svg">
              SVG
            </button>
            <button type="button" onClick={() => png("subgraph")} data-testid="subgraph-png">
              PNG
            </button>
          </>
        )}
        <h3>Pins, groups, labels and filters</h3>
        <button type="button" onClick={() => download("graph-state.json", toJson(store), "application/json")} data-testid="state-json">
          JSON
        </button>
        <label class="button">
          Read a file
          <input type="file" accept=".json,application/json" onChange={(event) => read(event.currentTarget.files?.[0])} data-testid="import" />
        </label>
        <h3>Python that ablates what is pinned or selected</h3>
        <textarea readOnly rows={Math.min(python.split("\n").length + 1, 12)} value={python} aria-label="Python" data-testid="python" />
        <button type="button" disabled={!isChange} onClick={() => download("interventions.py", python, "text/x-python")} data-testid="python-file">
          Download
        </button>
        <button
          type="button"
          disabled={!isChange}
          onClick={() =>
            navigator.clipboard.writeText(python).then(
              () => store.say("The Python was copied."),
              () => setError("The browser does not allow copying: select the text and copy it by hand."),
            )
          }
        >
          Copy
        </button>
        {error && (
          <p role="alert" class="alert">
            {error}
          </p>
        )}
      </div>
    </Dialog>
  );
}
