// The nodes shown, as a table; the same data for those who read rather than look.

import { useMemo, useState } from "preact/hooks";

import { LongTable } from "./list";
import { number, Store } from "./store";
import { Visible } from "./visible";

type Column = "kind" | "name" | "layer" | "token" | "activation" | "influence";
const COLUMNS: [Column, string][] = [
  ["kind", "Kind"],
  ["name", "Name"],
  ["layer", "Layer"],
  ["token", "Token"],
  ["activation", "Activation"],
  ["influence", "Influence"],
];

export function NodeTable({ store, visible, found }: { store: Store; visible: Visible; found: Set<number> }) {
  const [sorted, setSorted] = useState<{ by: Column; isDown: boolean }>({ by: "influence", isDown: true });
  const { graph } = store;
  const { nodes, tokens } = graph.data;
  const valueOf = (i: number): string | number => {
    switch (sorted.by) {
      case "kind":
        return graph.kind[i];
      case "name":
        return store.nameOf(i).toLowerCase();
      case "token":
        return nodes.pos[i];
      default:
        return nodes[sorted.by][i];
    }
  };
  const rows = useMemo(() => {
    const chosen = found.size ? visible.nodes.filter((i) => found.has(i)) : visible.nodes;
    const keyed = chosen.map((i) => [valueOf(i), i] as const);
    keyed.sort(([a, i], [b, j]) => (a < b ? -1 : a > b ? 1 : i - j));
    if (sorted.isDown) keyed.reverse();
    return keyed.map(([, i]) => i);
  }, [visible, sorted, found, store.state.labels, store.loaded]);
  const selected = store.selected;
  const pinned = new Set(store.notes.pinned);
  return (
    <LongTable
      testId="table"
      label={`Nodes of the graph, ${rows.length}`}
      count={rows.length}
      rowHeight={30}
      active={selected === null ? -1 : rows.indexOf(selected)}
      onActivate={(row) => store.select(rows[row])}
      onMove={(row) => store.select(rows[row])}
      rowClass={(row) => (pinned.has(graph.ids[rows[row]]) ? "pinned" : "")}
      header={COLUMNS.map(([column, title]) => (
        <div
          key={column}
          class={`cell ${column}`}
          role="columnheader"
          aria-sort={sorted.by === column ? (sorted.isDown ? "descending" : "ascending") : "none"}
        >
          <button
            type="button"
            onClick={() => setSorted({ by: column, isDown: sorted.by === column ? !sorted.isDown : column === "influence" || column === "activation" })}
          >
            {title}
            <span aria-hidden="true">{sorted.by === column ? (sorted.isDown ? " ↓" : " ↑") : ""}</span>
          </button>
        </div>
      ))}
      row={(row) => {
        const i = rows[row];
        const token = nodes.pos[i] < 0 ? "all" : `${nodes.pos[i]} ${tokens[nodes.pos[i]]?.trim() ?? ""}`;
        const cells: Record<Column, string> = {
          kind: graph.kind[i] === "logit" ? "output" : graph.kind[i],
          name: `${store.nameOf(i)}${pinned.has(graph.ids[i]) ? " (pinned)" : ""}`,
          layer: nodes.layer[i] < 0 ? "–" : String(nodes.layer[i]),
          token,
          activation: number(nodes.activation[i]),
          influence: number(nodes.influence[i]),
        };
        return COLUMNS.map(([column]) => (
          <div key={column} class={`cell ${column}`} role="gridcell" title={cells[column]}>
            {cells[column]}
          </div>
        ));
      }}
    />
  );
}
