// Two graphs of one model: which features both have, and how much influence each gives them.

import { useMemo, useState } from "preact/hooks";

import { Graph } from "./graph";
import { LongTable } from "./list";
import { number, Store } from "./store";

export interface Compared {
  key: string;
  /** A node of the feature in the graph shown; null where it has none. */
  node: number | null;
  there: number | null;
  /** Influence, summed over positions; null where the graph does not have the feature. */
  influence: number | null;
  influenceThere: number | null;
}

type Which = "all" | "both" | "here" | "there";

function byFeature(graph: Graph): Map<string, { node: number; influence: number }> {
  const found = new Map<string, { node: number; influence: number }>();
  const { influence } = graph.data.nodes;
  for (let i = 0; i < graph.n; i++) {
    const key = graph.featureKey(i);
    if (key === null) continue;
    const before = found.get(key);
    if (!before) found.set(key, { node: i, influence: influence[i] });
    else {
      if (influence[i] > influence[before.node]) before.node = i;
      before.influence += influence[i];
    }
  }
  return found;
}

/** All features of both graphs, those whose influence differs most first. */
export function compareGraphs(here: Graph, there: Graph): Compared[] {
  const [ours, theirs] = [byFeature(here), byFeature(there)];
  const rows = [...new Set([...ours.keys(), ...theirs.keys()])].map((key) => ({
    key,
    node: ours.get(key)?.node ?? null,
    there: theirs.get(key)?.node ?? null,
    influence: ours.get(key)?.influence ?? null,
    influenceThere: theirs.get(key)?.influence ?? null,
  }));
  const difference = (row: Compared) => Math.abs((row.influence ?? 0) - (row.influenceThere ?? 0));
  return rows.sort((a, b) => difference(b) - difference(a));
}

/** Nodes of the graph shown whose feature the other graph has, wherever in its prompt. */
export function sharedNodes(here: Graph, there: Graph): Set<number> {
  const theirs = byFeature(there);
  return new Set([...here.kind.keys()].filter((i) => theirs.has(here.featureKey(i) ?? "")));
}

export function ComparePanel({ store }: { store: Store }) {
  const other = store.state.compare;
  const [which, setWhich] = useState<Which>("all");
  const [active, setActive] = useState(-1);
  const there = other === null ? null : store.graphs[other];
  const all = useMemo(() => (there ? compareGraphs(store.graph, there) : []), [store.graph, there]);
  const isIn: Record<Which, (row: Compared) => boolean> = {
    all: () => true,
    both: (row) => row.node !== null && row.there !== null,
    here: (row) => row.there === null,
    there: (row) => row.node === null,
  };
  const rows = all.filter(isIn[which]);
  const count = (kind: Which) => all.filter(isIn[kind]).length;
  return (
    <div class="compare" data-testid="compare">
      <label>
        <span>Compare with</span>
        <select
          value={other ?? ""}
          data-testid="compare-with"
          onChange={(event) => store.set({ compare: event.currentTarget.value === "" ? null : Number(event.currentTarget.value) })}
        >
          <option value="">no other graph</option>
          {store.graphs.map((graph, i) => (i === store.state.graph ? null : (
            <option key={i} value={i}>
              {graph.data.name}
            </option>
          )))}
        </select>
      </label>
      {there && (
        <>
          <p class="quiet">
            {count("both")} features in both, {count("here")} here alone (drawn hollow), {count("there")} there alone. Influence is summed over positions.
          </p>
          <div class="choice" role="group" aria-label="Which features">
            {(["all", "both", "here", "there"] as Which[]).map((kind) => (
              <button key={kind} type="button" class="toggle" aria-pressed={which === kind} onClick={() => setWhich(kind)}>
                {{ all: "all", both: "in both", here: "here alone", there: "there alone" }[kind]} <span class="quiet">{count(kind)}</span>
              </button>
            ))}
          </div>
          <div class="compare-rows">
            <LongTable
              testId="compared"
              label="Features of both graphs"
              count={rows.length}
              rowHeight={28}
              active={active}
              onMove={setActive}
              onActivate={(row) => {
                setActive(row);
                const { node, there: elsewhere } = rows[row];
                if (node !== null) store.select(node);
                else if (elsewhere !== null && other !== null) {
                  store.set({ graph: other, compare: store.state.graph, selected: store.graphs[other].ids[elsewhere] });
                  store.load(elsewhere);
                }
              }}
              header={["Feature", "Here", "There", "Change"].map((title) => (
                <div key={title} class={`cell ${title === "Feature" ? "name" : "weight"}`} role="columnheader">
                  {title}
                </div>
              ))}
              row={(row) => {
                const { key, influence, influenceThere } = rows[row];
                const label = store.state.labels[key] ?? store.features[key]?.label ?? key.replace("/", ".");
                const difference = (influence ?? 0) - (influenceThere ?? 0);
                return (
                  <>
                    <div class="cell name" role="gridcell" title={key}>
                      {label}
                    </div>
                    <div class="cell weight" role="gridcell">
                      {influence === null ? "–" : number(influence)}
                    </div>
                    <div class="cell weight" role="gridcell">
                      {influenceThere === null ? "–" : number(influenceThere)}
                    </div>
                    <div class="cell weight" role="gridcell">
                      {difference > 0 ? "+" : "−"}
                      {number(Math.abs(difference))}
                    </div>
                  </>
                );
              }}
            />
          </div>
        </>
      )}
    </div>
  );
}
