// The page's state: what is chosen, shown, pinned, grouped and named; with undo, the address and files to keep it in.

import { Graph } from "./graph";
import { FeatureData, Host, Kind, KINDS, Options, PageData } from "./types";

export interface Group {
  name: string;
  members: string[];
}

/** What a person has said of one graph. Nodes stand by their ids, see graph.ts. */
export interface Notes {
  pinned: string[];
  groups: Group[];
  /** Where boxes of the subgraph were dragged to, by id of a node or `group:` and a name. */
  places: Record<string, [number, number]>;
  /** Ends of the path that is shown. */
  path: [string, string] | null;
}

export interface State {
  graph: number;
  /** The graph that this one is compared with. */
  compare: number | null;
  notes: Notes[];
  /** Labels given by hand, by "layer/feature", or by id for other nodes. */
  labels: Record<string, string>;
  /** Nodes shown carry this share of the influence; tokens and outputs always are. */
  influence: number;
  /** |weight| of the weakest edge shown; null for as many of the strongest as are quick to draw. */
  minWeight: number | null;
  /** First and last layer shown; null for all. */
  layers: [number, number] | null;
  /** Positions that are not shown. */
  hiddenTokens: number[];
  sign: "both" | "positive" | "negative";
  kinds: Record<Kind, boolean>;
  selected: string | null;
  view: "graph" | "table";
  theme: "auto" | "light" | "dark";
}

/** What undo does not touch: where one looks, not what one made. */
const PASSING = ["selected", "view", "theme", "graph"] as const;
const LONGEST_HISTORY = 200;
const SAVE_AFTER = 600;
const FORMAT = "tl_clt.page_state";

export interface Exported {
  format: typeof FORMAT;
  version: 1;
  prompts: string[];
  state: Partial<State>;
}

export function emptyNotes(): Notes {
  return { pinned: [], groups: [], places: {}, path: null };
}

export function initialState(graphs: number): State {
  return {
    graph: 0,
    compare: null,
    notes: Array.from({ length: graphs }, emptyNotes),
    labels: {},
    influence: 1,
    minWeight: null,
    layers: null,
    hiddenTokens: [],
    sign: "both",
    kinds: Object.fromEntries(KINDS.map((kind) => [kind, true])) as Record<Kind, boolean>,
    selected: null,
    view: "graph",
    theme: "auto",
  };
}

let pages = 0;

export class Store {
  /** Begins the ids of elements, which several pages in one document must not share. */
  readonly uid = `tlclt-${++pages}`;
  readonly graphs: Graph[];
  readonly host: Host;
  state: State;
  /** The node under the pointer or the keyboard's cursor; not a part of the state. */
  hovered: number | null = null;
  /** Ids of pinned boxes that are marked to be grouped. */
  marked: string[] = [];
  /** What has just happened, for those who do not see it. */
  said = "";
  /** The first end of a path that is being chosen. */
  pathFrom: string | null = null;
  readonly features: Record<string, FeatureData | null>;
  /** How many features a shell has loaded; labels may have changed where this has. */
  loaded = 0;
  private past: State[] = [];
  private future: State[] = [];
  /** What the shell was last given to keep. */
  private kept: Pick<State, "notes" | "labels">;
  private mergeKey = "";
  private listeners = new Set<() => void>();
  private hoverListeners = new Set<() => void>();
  private saving = 0;
  private loading = new Set<string>();
  private readonly usesHash: boolean;
  private readonly onHash = () => this.readHash();

  constructor(
    readonly data: PageData,
    options: Options,
  ) {
    this.graphs = data.graphs.map((graph) => new Graph(graph));
    this.features = { ...data.features };
    this.host = options.host ?? {};
    this.state = { ...initialState(this.graphs.length), theme: options.theme ?? "auto" };
    this.usesHash = (options.hash ?? true) && /^(file|https?):$/.test(location.protocol);
    if (data.annotations) {
      try {
        this.state = this.admit(data.annotations);
      } catch (error) {
        this.said = `The annotations were left aside: ${(error as Error).message}`;
      }
    }
    this.kept = this.state;
    if (this.usesHash) {
      this.readHash();
      addEventListener("hashchange", this.onHash);
    }
  }

  close(): void {
    removeEventListener("hashchange", this.onHash);
    clearTimeout(this.saving);
  }

  get graph(): Graph {
    return this.graphs[this.state.graph];
  }

  get notes(): Notes {
    return this.state.notes[this.state.graph];
  }

  get selected(): number | null {
    return this.numberOf(this.state.selected);
  }

  numberOf(id: string | null): number | null {
    return id === null ? null : (this.graph.byId.get(id) ?? null);
  }

  /** Pinned nodes that this graph has. */
  get pinned(): number[] {
    return this.notes.pinned.map((id) => this.numberOf(id)).filter((i): i is number => i !== null);
  }

  /** How many pinned nodes this graph, or all graphs, do not have: pruned away, or of another graph. */
  countUnknown(which: number[] = [this.state.graph]): number {
    return which.reduce((n, i) => n + this.state.notes[i].pinned.filter((id) => !this.graphs[i].byId.has(id)).length, 0);
  }

  subscribe(listener: () => void): () => void {
    this.listeners.add(listener);
    return () => this.listeners.delete(listener);
  }

  onHover(listener: () => void): () => void {
    this.hoverListeners.add(listener);
    return () => this.hoverListeners.delete(listener);
  }

  hover(node: number | null): void {
    if (node === this.hovered) return;
    this.hovered = node;
    this.hoverListeners.forEach((listener) => listener());
  }

  say(text: string): void {
    this.said = text;
    this.emit();
  }

  mark(ids: string[]): void {
    this.marked = ids;
    this.emit();
  }

  startPath(id: string | null): void {
    this.pathFrom = id;
    this.emit();
  }

  /**
   * Change the state. Changes of what one makes can be undone; those in a row with the same `merge` count as one, so
   * that a slider that is drawn is undone at once.
   */
  set(change: Partial<State>, merge = ""): void {
    const isMade = Object.keys(change).some((key) => !(PASSING as readonly string[]).includes(key));
    if (isMade) {
      if (!merge || merge !== this.mergeKey) {
        this.past.push(this.state);
        if (this.past.length > LONGEST_HISTORY) this.past.shift();
      }
      this.mergeKey = merge;
      this.future = [];
    }
    this.become({ ...this.state, ...change });
  }

  /** The next change is undone on its own, whatever came before it. */
  endMerge(): void {
    this.mergeKey = "";
  }

  note(change: Partial<Notes>, merge = ""): void {
    const notes = this.state.notes.slice();
    notes[this.state.graph] = { ...this.notes, ...change };
    this.set({ notes }, merge);
  }

  get canUndo(): boolean {
    return this.past.length > 0;
  }

  get canRedo(): boolean {
    return this.future.length > 0;
  }

  undo(): void {
    const before = this.past.pop();
    if (!before) return;
    this.future.push(this.state);
    this.mergeKey = "";
    this.said = "Undone.";
    this.become(this.keepPassing(before));
  }

  redo(): void {
    const after = this.future.pop();
    if (!after) return;
    this.past.push(this.state);
    this.mergeKey = "";
    this.said = "Done again.";
    this.become(this.keepPassing(after));
  }

  select(node: number | null): void {
    this.set({ selected: node === null ? null : this.graph.ids[node] });
    if (node !== null) this.said = this.describe(node);
    if (node !== null) this.load(node);
    this.emit();
  }

  togglePin(node: number): void {
    const id = this.graph.ids[node];
    const { pinned, groups } = this.notes;
    const isPinned = pinned.includes(id);
    this.said = `${this.nameOf(node)} ${isPinned ? "taken out of" : "pinned to"} the subgraph.`;
    if (!isPinned) return this.note({ pinned: [...pinned, id] });
    this.marked = this.marked.filter((marked) => marked !== id);
    this.note({ pinned: pinned.filter((pin) => pin !== id), groups: without(groups, [id]) });
  }

  /** Make a supernode of pinned nodes; those of them that are in another leave it. */
  group(members: string[], name: string): void {
    const { pinned, groups } = this.notes;
    const wanted = name.trim() || "group";
    const taken = new Set(without(groups, members).map((group) => group.name));
    let unique = wanted;
    for (let n = 2; taken.has(unique); n++) unique = `${wanted} ${n}`;
    const missing = members.filter((id) => !pinned.includes(id));
    this.marked = [];
    this.said = `${members.length} nodes grouped as ${unique}.`;
    this.note({
      pinned: [...pinned, ...missing],
      groups: [...without(groups, members), { name: unique, members: [...members] }],
    });
  }

  ungroup(name: string): void {
    this.said = `The group ${name} is dissolved.`;
    this.note({ groups: this.notes.groups.filter((group) => group.name !== name) });
  }

  renameGroup(from: string, to: string): void {
    const { groups, places } = this.notes;
    const name = to.trim();
    if (!name || name === from || groups.some((group) => group.name === name)) return;
    const moved = { ...places };
    if (`group:${from}` in moved) {
      moved[`group:${name}`] = moved[`group:${from}`];
      delete moved[`group:${from}`];
    }
    this.note({ groups: groups.map((group) => (group.name === from ? { ...group, name } : group)), places: moved });
  }

  /** Give a node a label by hand; an empty one takes it away. */
  relabel(node: number, label: string): void {
    const key = this.labelKey(node);
    const labels = { ...this.state.labels };
    if (label.trim()) labels[key] = label.trim();
    else delete labels[key];
    this.set({ labels });
  }

  labelKey(node: number, graph = this.graph): string {
    return graph.featureKey(node) ?? graph.ids[node];
  }

  featureOf(node: number, graph = this.graph): FeatureData | null | undefined {
    const key = graph.featureKey(node);
    return key === null ? undefined : this.features[key];
  }

  /** The label of a feature or other node: by hand, or from what is known of the feature; null where there is none. */
  labelOf(node: number, graph = this.graph): string | null {
    return this.state.labels[this.labelKey(node, graph)] ?? this.featureOf(node, graph)?.label ?? null;
  }

  /** A node in few words: its label, or its number. */
  nameOf(node: number, graph = this.graph): string {
    const label = this.labelOf(node, graph);
    if (label) return label;
    const { layer, index, pos } = graph.data.nodes;
    switch (graph.kind[node]) {
      case "feature":
        return `${layer[node]}.${index[node]}`;
      case "error":
        return `error ${layer[node]}`;
      case "token":
        return graph.data.tokens[pos[node]]?.trim() || "␣";
      case "position":
        return `pos ${pos[node]}`;
      case "bias":
        return layer[node] === graph.data.n_layers ? "output bias" : `bias ${layer[node]}`;
      case "logit":
        return (graph.data.logits[this.outputNumber(node, graph)] ?? "").trim() || graph.data.nodes.label[node];
    }
  }

  outputNumber(node: number, graph = this.graph): number {
    let number = 0;
    for (let i = 0; i < node; i++) if (graph.kind[i] === "logit") number++;
    return number;
  }

  /** A node in a sentence. */
  describe(node: number): string {
    const { label, activation, influence } = this.graph.data.nodes;
    const named = this.labelOf(node);
    const pinned = this.notes.pinned.includes(this.graph.ids[node]) ? ", pinned" : "";
    const said = named ? `${named}: ${label[node]}` : label[node];
    return `${said}, activation ${number(activation[node])}, influence ${number(influence[node])}${pinned}.`;
  }

  /** Load what is known of a feature, where a shell can. */
  load(node: number): void {
    const key = this.graph.featureKey(node);
    if (key === null || key in this.features || !this.host.loadFeature || this.loading.has(key)) return;
    this.loading.add(key);
    const [layer, feature] = key.split("/").map(Number);
    this.host.loadFeature(layer, feature).then(
      (record) => {
        this.features[key] = record ?? null;
        this.loaded++;
        this.loading.delete(key);
        this.emit();
      },
      (error) => {
        this.loading.delete(key);
        this.say(`Feature ${layer}.${feature} could not be loaded: ${error?.message ?? error}`);
      },
    );
  }

  isLoading(key: string): boolean {
    return this.loading.has(key);
  }

  export(): Exported {
    return { format: FORMAT, version: 1, prompts: this.graphs.map((graph) => graph.data.prompt), state: this.state };
  }

  /** Take over an exported state; an error says what is wrong with it. */
  import(given: unknown): void {
    const state = this.admit(given);
    this.set(state);
    this.sayRead();
  }

  /** Say that a state was read, and how much of it is of nodes that are not here. */
  private sayRead(): void {
    const n = this.countUnknown([...this.graphs.keys()]);
    const unknown = n ? ` ${n} of its pinned nodes ${n === 1 ? "is" : "are"} unknown here.` : "";
    this.say(`The state was read.${unknown}`);
  }

  /** The state that an export means, each part checked. */
  private admit(given: unknown): State {
    if (!isRecord(given) || given.format !== FORMAT || !isRecord(given.state)) {
      throw new Error("This is no state that the page has exported.");
    }
    return clean(given.state, this.graphs.length, this.state);
  }

  /** What differs from the start, for the address. */
  toHash(): string {
    const start = initialState(this.graphs.length);
    const changed = Object.fromEntries(
      Object.entries(this.state).filter(([key, value]) => {
        return JSON.stringify(value) !== JSON.stringify(start[key as keyof State]);
      }),
    );
    return Object.keys(changed).length ? `#${encodeURIComponent(JSON.stringify(changed))}` : "";
  }

  private readHash(): void {
    if (location.hash === this.toHash() || location.hash.length < 2) return;
    let found: unknown;
    try {
      found = JSON.parse(decodeURIComponent(location.hash.slice(1)));
    } catch {
      this.say("The address has no state that can be read; it is left aside.");
      return;
    }
    if (!isRecord(found)) return;
    const theme = "theme" in found ? {} : { theme: this.state.theme };
    this.state = clean({ ...found, ...theme }, this.graphs.length, initialState(this.graphs.length));
    const node = this.selected;
    if (node !== null) this.load(node);
    this.sayRead();
  }

  private keepPassing(state: State): State {
    const kept = Object.fromEntries(PASSING.map((key) => [key, this.state[key]]));
    return { ...state, ...kept };
  }

  private become(state: State): void {
    this.state = state;
    this.emit();
    clearTimeout(this.saving);
    this.saving = window.setTimeout(() => this.save(), SAVE_AFTER);
  }

  /** Put the state into the address, and give it to the shell. */
  save(): void {
    clearTimeout(this.saving);
    if (this.usesHash) history.replaceState(null, "", this.toHash() || location.pathname + location.search);
    const { notes, labels } = this.state;
    if (notes === this.kept.notes && labels === this.kept.labels) return;
    this.kept = { notes, labels };
    this.host.saveAnnotations?.(this.export()).catch((error) => {
      this.say(`Annotations could not be saved: ${error?.message ?? error}`);
    });
  }

  private emit(): void {
    this.listeners.forEach((listener) => listener());
  }
}

/** Groups less some members; groups that this empties go. */
function without(groups: Group[], members: string[]): Group[] {
  return groups
    .map((group) => ({ ...group, members: group.members.filter((id) => !members.includes(id)) }))
    .filter((group) => group.members.length > 0);
}

export function number(value: number): string {
  return Math.abs(value) >= 1000 || (value !== 0 && Math.abs(value) < 0.001)
    ? value.toExponential(1)
    : String(Number(value.toPrecision(3)));
}

function isRecord(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

const isText = (value: unknown): value is string => typeof value === "string";
const isNumber = (value: unknown): value is number => typeof value === "number" && Number.isFinite(value);
const isPair = (value: unknown, is: (part: unknown) => boolean) =>
  Array.isArray(value) && value.length === 2 && value.every(is);
const texts = (value: unknown): string[] => (Array.isArray(value) ? value.filter(isText) : []);

function cleanNotes(given: unknown): Notes {
  if (!isRecord(given)) return emptyNotes();
  const pinned = [...new Set(texts(given.pinned))];
  const taken = new Set<string>();
  const names = new Set<string>();
  const groups: Group[] = [];
  for (const group of Array.isArray(given.groups) ? given.groups : []) {
    if (!isRecord(group) || !isText(group.name) || names.has(group.name)) continue;
    const members = texts(group.members).filter((id) => pinned.includes(id) && !taken.has(id));
    if (!members.length) continue;
    members.forEach((id) => taken.add(id));
    names.add(group.name);
    groups.push({ name: group.name, members });
  }
  const places = Object.entries(isRecord(given.places) ? given.places : {}).filter(([, at]) => isPair(at, isNumber));
  return {
    pinned,
    groups,
    places: Object.fromEntries(places) as Notes["places"],
    path: isPair(given.path, isText) ? (given.path as [string, string]) : null,
  };
}

/** A state of what was read, part by part; what is missing or wrong is as in `base`. */
function clean(given: Record<string, unknown>, graphs: number, base: State): State {
  const isGraph = (value: unknown): value is number => Number.isInteger(value) && Number(value) >= 0 && Number(value) < graphs;
  const state = { ...base };
  if (isGraph(given.graph)) state.graph = given.graph;
  if (given.compare === null || isGraph(given.compare)) state.compare = given.compare;
  if (Array.isArray(given.notes)) {
    const notes = given.notes;
    state.notes = Array.from({ length: graphs }, (_, i) => cleanNotes(notes[i]));
  }
  if (isRecord(given.labels)) {
    state.labels = Object.fromEntries(Object.entries(given.labels).filter(([, label]) => isText(label))) as Record<string, string>;
  }
  if (isNumber(given.influence)) state.influence = Math.min(Math.max(given.influence, 0), 1);
  if (given.minWeight === null || isNumber(given.minWeight)) state.minWeight = given.minWeight;
  if (given.layers === null || isPair(given.layers, isNumber)) state.layers = given.layers as State["layers"];
  if (Array.isArray(given.hiddenTokens)) state.hiddenTokens = given.hiddenTokens.filter(isNumber);
  if (["both", "positive", "negative"].includes(given.sign as string)) state.sign = given.sign as State["sign"];
  if (isRecord(given.kinds)) {
    const kinds = given.kinds;
    const known = KINDS.map((kind) => [kind, typeof kinds[kind] === "boolean" ? kinds[kind] : base.kinds[kind]]);
    state.kinds = Object.fromEntries(known) as State["kinds"];
  }
  if (given.selected === null || isText(given.selected)) state.selected = given.selected;
  if (given.view === "graph" || given.view === "table") state.view = given.view;
  if (["auto", "light", "dark"].includes(given.theme as string)) state.theme = given.theme as State["theme"];
  return state;
}
