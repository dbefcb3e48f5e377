// What is shown: filters, and the search.

import { useEffect, useRef, useState } from "preact/hooks";

import { Graph } from "./graph";
import { number, State, Store } from "./store";
import { Kind, KINDS, PLURAL } from "./types";
import { Visible } from "./visible";

export function Filters({ store, visible }: { store: Store; visible: Visible }) {
  const { state, graph } = store;
  const counts = new Map<Kind, number>();
  for (const kind of graph.kind) counts.set(kind, (counts.get(kind) ?? 0) + 1);
  const last = graph.data.n_layers - 1;
  const layers = state.layers ?? [0, last];
  const setLayer = (end: 0 | 1, layer: number) => {
    const next: [number, number] = [layers[0], layers[1]];
    next[end] = layer;
    if (next[0] > next[1]) next[1 - end] = layer;
    store.set({ layers: next[0] === 0 && next[1] === last ? null : next }, `layers ${end}`);
  };
  const isChanged =
    state.influence < 1 || state.minWeight !== null || state.layers !== null || state.hiddenTokens.length > 0 || state.sign !== "both" || KINDS.some((kind) => !state.kinds[kind]);
  return (
    <div class="filters" role="group" aria-label="What is shown">
      <label title="The most influential nodes up to this share of all influence; tokens and outputs always stay">
        <span>
          Influence <output>{Math.round(100 * state.influence)}%</output>
        </span>
        <input
          type="range"
          min={0}
          max={1}
          step={0.01}
          value={state.influence}
          aria-label="Share of the influence that the nodes shown carry"
          data-testid="influence"
          onInput={(event) => store.set({ influence: Number(event.currentTarget.value) }, "influence")}
          onChange={() => store.endMerge()}
        />
      </label>
      <label title="Edges of a smaller |weight| are not drawn">
        <span>
          Edges from <output>{number(visible.minWeight)}</output>
        </span>
        <input
          type="range"
          min={0}
          max={1}
          step={0.005}
          value={toSlider(graph, visible.minWeight)}
          aria-label="Smallest |weight| of the edges shown"
          aria-valuetext={number(visible.minWeight)}
          data-testid="min-weight"
          onInput={(event) => store.set({ minWeight: fromSlider(graph, Number(event.currentTarget.value)) }, "weight")}
          onChange={() => store.endMerge()}
        />
      </label>
      <label>
        <span>Sign</span>
        <select value={state.sign} data-testid="sign" onChange={(event) => store.set({ sign: event.currentTarget.value as State["sign"] })}>
          <option value="both">both</option>
          <option value="positive">positive</option>
          <option value="negative">negative</option>
        </select>
      </label>
      <fieldset class="layers">
        <legend>Layers</legend>
        {([0, 1] as const).map((end) => (
          <select
            key={end}
            value={layers[end]}
            aria-label={end === 0 ? "First layer shown" : "Last layer shown"}
            data-testid={end === 0 ? "first-layer" : "last-layer"}
            onChange={(event) => setLayer(end, Number(event.currentTarget.value))}
          >
            {Array.from({ length: last + 1 }, (_, layer) => (
              <option key={layer} value={layer}>
                {layer}
              </option>
            ))}
          </select>
        ))}
      </fieldset>
      <fieldset class="kinds">
        <legend>Kinds</legend>
        {KINDS.filter((kind) => counts.get(kind)).map((kind) => (
          <button
            key={kind}
            type="button"
            class="toggle"
            aria-pressed={state.kinds[kind]}
            data-testid={`kind-${kind}`}
            onClick={() => store.set({ kinds: { ...state.kinds, [kind]: !state.kinds[kind] } })}
          >
            {PLURAL[kind]} <span class="quiet">{counts.get(kind)}</span>
          </button>
        ))}
      </fieldset>
      {isChanged && (
        <button
          type="button"
          class="link"
          data-testid="show-all"
          onClick={() =>
            store.set({
              influence: 1,
              minWeight: null,
              layers: null,
              hiddenTokens: [],
              sign: "both",
              kinds: Object.fromEntries(KINDS.map((kind) => [kind, true])) as State["kinds"],
            })
          }
        >
          Show all
        </button>
      )}
    </div>
  );
}

/** Weights differ by orders of magnitude: the slider goes by their logarithm, from 1/10,000 of the largest; 0 shows all. */
const DECADES = 4;

function toSlider(graph: Graph, weight: number): number {
  return weight <= 0 || !graph.maxWeight ? 0 : Math.max(1 + Math.log10(weight / graph.maxWeight) / DECADES, 0);
}

function fromSlider(graph: Graph, at: number): number {
  return at <= 0 ? 0 : graph.maxWeight * 10 ** ((at - 1) * DECADES);
}

/** The prompt's tokens; a click hides or shows what stands at one. */
export function Prompt({ store }: { store: Store }) {
  const { graph, state } = store;
  const selected = store.selected;
  const here = selected === null ? -1 : graph.data.nodes.pos[selected];
  return (
    <div class="prompt" role="group" aria-label="Tokens of the prompt; a click hides or shows the nodes at one">
      {graph.data.tokens.map((token, pos) => {
        const isHidden = state.hiddenTokens.includes(pos);
        return (
          <button
            key={pos}
            type="button"
            class={`prompt-token ${pos === here ? "here" : ""}`}
            aria-pressed={!isHidden}
            title={isHidden ? "Show the nodes at this token" : "Hide the nodes at this token"}
            data-testid={`token-${pos}`}
            onClick={() => store.set({ hiddenTokens: isHidden ? state.hiddenTokens.filter((other) => other !== pos) : [...state.hiddenTokens, pos] })}
          >
            {token.trim() || "␣"}
          </button>
        );
      })}
    </div>
  );
}

/** Nodes whose label, number, token or description has all words of a query. */
export function findNodes(store: Store, query: string): number[] {
  const words = query.toLowerCase().split(/\s+/).filter(Boolean);
  if (!words.length) return [];
  const { graph } = store;
  const { label, influence } = graph.data.nodes;
  const text = (i: number) => `${store.nameOf(i)} ${label[i]} ${graph.kind[i] === "logit" ? "output" : graph.kind[i]}`.toLowerCase();
  const matches = [...graph.kind.keys()].filter((i) => {
    const own = text(i);
    return words.every((word) => own.includes(word));
  });
  return matches.sort((a, b) => influence[b] - influence[a]);
}

const MOST_FOUND = 12;

interface SearchProps {
  store: Store;
  query: string;
  onQuery(query: string): void;
  found: number[];
}

export function Search({ store, query, onQuery, found }: SearchProps) {
  const [active, setActive] = useState(0);
  const [isOpen, setIsOpen] = useState(false);
  const input = useRef<HTMLInputElement>(null);
  useEffect(() => setActive(0), [query]);
  const shown = found.slice(0, MOST_FOUND);
  const choose = (node: number) => {
    store.select(node);
    setIsOpen(false);
  };
  const onKeyDown = (event: KeyboardEvent) => {
    if (event.key === "ArrowDown") setActive(Math.min(active + 1, shown.length - 1));
    else if (event.key === "ArrowUp") setActive(Math.max(active - 1, 0));
    else if (event.key === "Enter" && shown[active] !== undefined) choose(shown[active]);
    else if (event.key === "Escape") {
      onQuery("");
      setIsOpen(false);
      input.current?.blur();
    } else return;
    event.preventDefault();
    event.stopPropagation();
  };
  const isListed = isOpen && shown.length > 0;
  return (
    <div class="search">
      <input
        ref={input}
        type="text"
        role="combobox"
        autocomplete="off"
        placeholder="Search  /"
        aria-label="Search nodes by label, number or token"
        aria-expanded={isListed}
        aria-controls={`${store.uid}-found`}
        aria-activedescendant={isListed ? `${store.uid}-found-${active}` : undefined}
        data-testid="search"
        value={query}
        onInput={(event) => {
          onQuery(event.currentTarget.value);
          setIsOpen(true);
        }}
        onFocus={() => setIsOpen(true)}
        onBlur={() => setIsOpen(false)}
        onKeyDown={onKeyDown}
      />
      <ul id={`${store.uid}-found`} role="listbox" aria-label="Nodes found" hidden={!isListed}>
        {shown.map((node, i) => (
          <li
            key={node}
            id={`${store.uid}-found-${i}`}
            role="option"
            aria-selected={i === active}
            onPointerDown={(event) => {
              event.preventDefault();
              choose(node);
            }}
          >
            <span>{store.nameOf(node)}</span> <span class="quiet">{store.graph.data.nodes.label[node]}</span>
          </li>
        ))}
      </ul>
      {query && (
        <span class="quiet" role="status">
          {found.length} found
        </span>
      )}
    </div>
  );
}
