// What is known of the node selected: its label, its inputs and outputs, and, of a feature, what it fires on and writes.

import { scaleLinear, scaleLog } from "d3-scale";
import { Fragment } from "preact";
import { useEffect, useLayoutEffect, useRef, useState } from "preact/hooks";

import { LongTable } from "./list";
import { number, Store } from "./store";
import { Example, FeatureData } from "./types";

export function NodeCard({ store }: { store: Store }) {
  const node = store.selected;
  if (node === null) {
    return (
      <div class="empty">
        <p>Point at a node to see its edges, click it to read about it.</p>
        <p>
          Keys: arrows move, <kbd>Enter</kbd> selects, <kbd>p</kbd> pins, <kbd>/</kbd> searches, <kbd>?</kbd> shows all.
        </p>
        <Strongest store={store} />
      </div>
    );
  }
  const { graph } = store;
  const { nodes } = graph.data;
  const isPinned = store.notes.pinned.includes(graph.ids[node]);
  const feature = store.featureOf(node);
  const key = graph.featureKey(node);
  return (
    <div class="card" data-testid="card">
      <p class="kind">{nodes.label[node]}</p>
      <LabelField store={store} node={node} />
      {feature && <LabelScore feature={feature} isByHand={key !== null && key in store.state.labels} />}
      <dl class="facts">
        <div>
          <dt>Activation</dt>
          <dd>{number(nodes.activation[node])}</dd>
        </div>
        <div>
          <dt>Influence</dt>
          <dd>{(100 * nodes.influence[node]).toPrecision(3)}%</dd>
        </div>
        {graph.kind[node] === "logit" && (
          <div>
            <dt>Probability</dt>
            <dd>{graph.outputWeight[node].toFixed(3)}</dd>
          </div>
        )}
        {feature && (
          <div>
            <dt>Density</dt>
            <dd>{percent(feature.density)}</dd>
          </div>
        )}
      </dl>
      <div class="buttons">
        <button type="button" aria-pressed={isPinned} onClick={() => store.togglePin(node)} data-testid="pin">
          {isPinned ? "Unpin" : "Pin"} <kbd>p</kbd>
        </button>
        <PathButtons store={store} node={node} />
      </div>
      <EdgeTables store={store} node={node} />
      {key !== null && <FeatureCard store={store} feature={feature} keyName={key} />}
    </div>
  );
}

function percent(share: number): string {
  return share === 0 ? "0" : `${number(100 * share)}%`;
}

/** The features of most influence, to begin with. */
function Strongest({ store }: { store: Store }) {
  const { graph } = store;
  const { influence } = graph.data.nodes;
  const top = [...graph.kind.keys()]
    .filter((i) => graph.kind[i] === "feature")
    .sort((a, b) => influence[b] - influence[a])
    .slice(0, 8);
  return (
    <section>
      <h3>Features of most influence</h3>
      <ol class="strongest">
        {top.map((i) => (
          <li key={i}>
            <button type="button" class="link" title={store.nameOf(i)} onClick={() => store.select(i)}>
              {store.nameOf(i)}
            </button>{" "}
            <span class="quiet">at {graph.data.tokens[graph.data.nodes.pos[i]]?.trim()}</span>{" "}
            <span class="number">{(100 * influence[i]).toPrecision(2)}%</span>
          </li>
        ))}
      </ol>
    </section>
  );
}

function LabelField({ store, node }: { store: Store; node: number }) {
  const given = store.labelOf(node) ?? "";
  const [text, setText] = useState(given);
  useLayoutEffect(() => setText(given), [node, given]);
  const field = useRef<HTMLTextAreaElement>(null);
  useLayoutEffect(() => {
    // As high as what is written in it; the style says where it begins to scroll.
    const area = field.current!;
    area.style.height = "auto";
    area.style.height = `${area.scrollHeight + area.offsetHeight - area.clientHeight}px`;
  }, [text]);
  const save = () => {
    if (text !== given) store.relabel(node, text === store.featureOf(node)?.label ? "" : text);
  };
  return (
    <form
      class="label"
      onSubmit={(event) => {
        event.preventDefault();
        save();
        store.say(`Label: ${text || "none"}.`);
      }}
    >
      <label>
        <span class="unseen">Label of this node</span>
        <textarea
          ref={field}
          value={text}
          rows={1}
          placeholder={`${store.nameOf(node)}: give it a label`}
          onInput={(event) => setText(event.currentTarget.value)}
          onKeyDown={(event) => {
            if (event.key !== "Enter") return;
            event.preventDefault();
            event.currentTarget.form!.requestSubmit();
          }}
          onBlur={save}
          data-testid="label"
        />
      </label>
    </form>
  );
}

function LabelScore({ feature, isByHand }: { feature: FeatureData; isByHand: boolean }) {
  if (isByHand) return <p class="quiet">Label given by hand; it has no score.</p>;
  if (feature.label === null) return <p class="quiet">No label was found.</p>;
  if (feature.label_score === null) return <p class="quiet">The label has no score.</p>;
  const beside = feature.label_score_random === null ? "" : `; a random dictionary's ${feature.label_score_random.toFixed(2)}`;
  return (
    <p class="quiet" data-testid="label-score" title="Balanced accuracy of the label on contexts it has not seen">
      Label score {feature.label_score.toFixed(2)} (chance 0.50{beside})
    </p>
  );
}

function PathButtons({ store, node }: { store: Store; node: number }) {
  const id = store.graph.ids[node];
  const { pathFrom } = store;
  if (pathFrom === null || pathFrom === id || store.numberOf(pathFrom) === null) {
    return (
      <button type="button" aria-pressed={pathFrom === id} onClick={() => store.startPath(pathFrom === id ? null : id)} data-testid="path-from">
        Path from here <kbd>t</kbd>
      </button>
    );
  }
  return (
    <button type="button" onClick={() => endPath(store, node)} data-testid="path-to">
      Path to here <kbd>t</kbd>
    </button>
  );
}

/** Show the path between the node chosen before and this one. */
export function endPath(store: Store, node: number): void {
  const from = store.pathFrom;
  if (from === null) return;
  store.startPath(null);
  store.note({ path: [from, store.graph.ids[node]] });
}

/** In- and out-edges, the strongest first. */
function EdgeTables({ store, node }: { store: Store; node: number }) {
  const { graph } = store;
  return (
    <>
      <EdgeTable store={store} title="Inputs" edges={graph.inEdges(node)} end={graph.source} share={(e) => graph.share(e)} dropped={graph.data.nodes.dropped[node] / graph.input[node]} />
      <EdgeTable store={store} title="Outputs" edges={graph.outEdges(node)} end={graph.target} share={(e) => graph.share(e)} dropped={0} />
    </>
  );
}

interface EdgeTableProps {
  store: Store;
  title: "Inputs" | "Outputs";
  edges: Int32Array;
  end: Int32Array;
  share(edge: number): number;
  /** Share of the node's input that is not in the graph. */
  dropped: number;
}

const MOST_ROWS_IN_SIGHT = 8;
const ROW = 26;

function EdgeTable({ store, title, edges, end, share, dropped }: EdgeTableProps) {
  const { graph } = store;
  const [active, setActive] = useState(-1);
  const rows = [...edges].sort((a, b) => Math.abs(graph.weight[b]) - Math.abs(graph.weight[a]));
  useEffect(() => setActive(-1), [edges]);
  if (!rows.length && dropped === 0) return null;
  const most = rows.length ? Math.abs(graph.weight[rows[0]]) : 1;
  return (
    <section class="edges">
      <h3>
        {title} <span class="quiet">{rows.length}</span>
        {dropped > 0.0005 && <span class="quiet"> · {(100 * dropped).toFixed(1)}% of the input is not in this graph</span>}
      </h3>
      <div class="edge-rows" style={{ height: `${(Math.min(rows.length, MOST_ROWS_IN_SIGHT) + 1) * ROW + 2}px` }}>
        <LongTable
          testId={title.toLowerCase()}
          label={title}
          count={rows.length}
          rowHeight={ROW}
          active={active}
          onMove={(row) => {
            setActive(row);
            store.hover(end[rows[row]]);
          }}
          onActivate={(row) => store.select(end[rows[row]])}
          header={
            <>
              <div class="cell name" role="columnheader">
                Node
              </div>
              <div class="cell token" role="columnheader">
                Token
              </div>
              <div class="cell weight" role="columnheader">
                Weight
              </div>
              <div class="cell share" role="columnheader" title={title === "Inputs" ? "Share of this node's input" : "Share of that node's input"}>
                Share
              </div>
            </>
          }
          row={(row) => {
            const e = rows[row];
            const other = end[e];
            const weight = graph.weight[e];
            const position = graph.data.nodes.pos[other];
            return (
              <>
                <div class="cell name" role="gridcell" title={`${store.nameOf(other)} (${graph.data.nodes.label[other]})`}>
                  {store.nameOf(other)}
                </div>
                <div class="cell token" role="gridcell">
                  {position < 0 ? "all" : graph.data.tokens[position]?.trim()}
                </div>
                <div class="cell weight" role="gridcell">
                  <span class={weight > 0 ? "bar plus" : "bar minus"} style={{ width: `${(34 * Math.abs(weight)) / most}px` }} />
                  {weight > 0 ? "+" : "−"}
                  {number(Math.abs(weight))}
                </div>
                <div class="cell share" role="gridcell">
                  {(100 * share(e)).toFixed(1)}%
                </div>
              </>
            );
          }}
        />
      </div>
    </section>
  );
}

function FeatureCard({ store, feature, keyName }: { store: Store; feature: FeatureData | null | undefined; keyName: string }) {
  const name = keyName.replace("/", ".");
  if (store.isLoading(keyName)) return <p class="quiet">Loading what is known of feature {name} …</p>;
  if (!feature) {
    const isLeftOut = !(keyName in store.features) && Boolean(store.data.features_left_out);
    const why = isLeftOut
      ? "What this feature fires on was left out of this file: save_html(..., max_features=None) puts all in."
      : Object.keys(store.features).length
        ? "Nothing is known of this feature."
        : "No features were given with this graph: save_html(path, features=store) adds what they fire on.";
    return <p class="quiet apart">{why}</p>;
  }
  return (
    <section class="feature" data-testid="feature">
      <h3>Feature {name}</h3>
      <div class="logits">
        <Logits title="Promotes" entries={feature.top_logits} isPlus={true} />
        <Logits title="Suppresses" entries={feature.bottom_logits} isPlus={false} />
      </div>
      <Histogram feature={feature} />
      <Examples feature={feature} />
      <Connected store={store} feature={feature} />
    </section>
  );
}

function Logits({ title, entries, isPlus }: { title: string; entries: [string, number][]; isPlus: boolean }) {
  if (!entries.length) return null;
  const most = Math.max(...entries.map(([, value]) => Math.abs(value)), 1e-9);
  return (
    <div>
      <h4>{title}</h4>
      <ul>
        {entries.slice(0, 8).map(([token, value], i) => (
          <li key={i}>
            <code>{token.trim() || "␣"}</code>
            <span class={isPlus ? "bar plus" : "bar minus"} style={{ width: `${(30 * Math.abs(value)) / most}px` }} />
            <span class="number">
              {value < 0 ? "−" : "+"}
              {Math.abs(value).toFixed(2)}
            </span>
          </li>
        ))}
      </ul>
    </div>
  );
}

function Histogram({ feature }: { feature: FeatureData }) {
  const { edges, counts } = feature.histogram;
  if (!counts.length || edges.length !== counts.length + 1) return null;
  const [width, height] = [340, 54];
  const ends: [number, number] = [edges[0], edges[edges.length - 1]];
  // Activations that span orders of magnitude come in bins that grow with them; so do counts, whose logarithm is drawn.
  const x = ends[0] > 0 && ends[1] / ends[0] > 50 ? scaleLog(ends, [0, width]) : scaleLinear(ends, [0, width]);
  const y = scaleLinear([0, Math.log1p(Math.max(...counts))], [0, height]);
  const said = `Activations: ${percent(feature.density)} of tokens, at most ${number(feature.max_activation)}`;
  return (
    <figure>
      <figcaption>{said} (counts as logarithms)</figcaption>
      <svg viewBox={`0 0 ${width} ${height + 14}`} role="img" aria-label={said}>
        {counts.map((count, i) => (
          <rect key={i} class="histogram" x={x(edges[i]) + 0.5} width={Math.max(x(edges[i + 1]) - x(edges[i]) - 1, 0.5)} y={height - y(Math.log1p(count))} height={y(Math.log1p(count))}>
            <title>{`${number(edges[i])} to ${number(edges[i + 1])}: ${count}`}</title>
          </rect>
        ))}
        <text x={0} y={height + 12}>
          {number(edges[0])}
        </text>
        <text x={width} y={height + 12} text-anchor="end">
          {number(edges[edges.length - 1])}
        </text>
      </svg>
    </figure>
  );
}

const FIRST_EXAMPLES = 5;

function Examples({ feature }: { feature: FeatureData }) {
  const quantiles = [...new Set(feature.examples.map((example) => example.quantile))];
  const [isAll, setIsAll] = useState(false);
  useEffect(() => setIsAll(false), [feature]);
  if (!quantiles.length) return <p class="quiet">It was active in no context.</p>;
  const shown = isAll ? quantiles : quantiles.slice(0, 1);
  return (
    <div class="examples">
      {shown.map((quantile) => (
        <div key={quantile}>
          <h4>{quantile === "top" ? "Strongest contexts" : `Contexts of quantile ${quantile}`}</h4>
          {feature.examples
            .filter((example) => example.quantile === quantile)
            .slice(0, isAll ? undefined : FIRST_EXAMPLES)
            .map((example, i) => (
              <Context key={i} example={example} most={feature.max_activation} />
            ))}
        </div>
      ))}
      {feature.examples.length > FIRST_EXAMPLES && (
        <button type="button" class="link" aria-expanded={isAll} onClick={() => setIsAll(!isAll)}>
          {isAll ? "Fewer contexts" : `All ${feature.examples.length} contexts`}
        </button>
      )}
    </div>
  );
}

/** A context; the stronger the feature at a token, the stronger its background. */
function Context({ example, most }: { example: Example; most: number }) {
  // Tokens that are whole words bring no spaces of their own, though names of several words have some within.
  const gap = example.tokens.some((token) => /^\s|\s$/.test(token)) ? "" : " ";
  return (
    <p class="context" dir="auto">
      {example.tokens.map((token, i) => {
        const activation = example.activations[i] ?? 0;
        const share = most > 0 ? Math.min(Math.max(activation / most, 0), 1) : 0;
        const style = share > 0 ? { "--share": `${Math.round(8 + 50 * share)}%` } : undefined;
        return (
          <Fragment key={i}>
            {i > 0 && gap}
            <span class={share > 0 ? (i === example.position ? "on here" : "on") : ""} style={style} title={share > 0 ? number(activation) : undefined}>
              {token}
            </span>
          </Fragment>
        );
      })}
    </p>
  );
}

function Connected({ store, feature }: { store: Store; feature: FeatureData }) {
  if (!feature.connected.length) return null;
  return (
    <div class="connected">
      <h4>Most connected over all prompts</h4>
      <ul>
        {feature.connected.slice(0, 10).map((other, i) => {
          const key = `${other.layer}/${other.feature}`;
          const label = store.state.labels[key] ?? store.features[key]?.label ?? `${other.layer}.${other.feature}`;
          const node = [...store.graph.kind.keys()].find((i) => store.graph.featureKey(i) === key);
          return (
            <li key={i}>
              {node === undefined ? (
                <span title={label}>{label}</span>
              ) : (
                <button type="button" class="link" title={label} onClick={() => store.select(node)}>
                  {label}
                </button>
              )}
              <span class="number">
                {other.weight > 0 ? "+" : "−"}
                {number(Math.abs(other.weight))}
              </span>
            </li>
          );
        })}
      </ul>
    </div>
  );
}
