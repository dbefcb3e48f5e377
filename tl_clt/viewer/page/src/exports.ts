// What one takes away: pictures, data, and Python that makes the interventions.

import { boundsOf, buildSubgraph, drawSubgraph } from "./boxes";
import { CanvasPainter, drawScene, Painter, Scene, SvgPainter } from "./picture";
import { Store } from "./store";
import { pinnedScores } from "./subgraph";
import { InterventionData } from "./types";

export type Picture = "graph" | "subgraph";

interface Drawing {
  width: number;
  height: number;
  draw(painter: Painter): void;
}

function drawingOf(store: Store, scene: Scene, what: Picture, path: number[] | null): Drawing {
  if (what === "graph") return { width: scene.width, height: scene.height, draw: (painter) => drawScene(painter, scene, path) };
  const subgraph = buildSubgraph(store);
  const [, , width, height] = boundsOf(subgraph.boxes);
  return { width, height, draw: (painter) => drawSubgraph(painter, store, subgraph, scene.palette) };
}

export function toSvg(store: Store, scene: Scene, what: Picture, path: number[] | null): string {
  const drawing = drawingOf(store, scene, what, path);
  const painter = new SvgPainter(drawing.width, drawing.height, store.graph.data.prompt);
  drawing.draw(painter);
  return painter.toString();
}

/** At twice the size, for print. */
export function toPng(store: Store, scene: Scene, what: Picture, path: number[] | null): Promise<Blob> {
  const drawing = drawingOf(store, scene, what, path);
  const canvas = document.createElement("canvas");
  canvas.width = Math.ceil(drawing.width * 2);
  canvas.height = Math.ceil(drawing.height * 2);
  const context = canvas.getContext("2d")!;
  context.scale(2, 2);
  drawing.draw(new CanvasPainter(context));
  return new Promise((resolve, reject) => {
    canvas.toBlob((blob) => (blob ? resolve(blob) : reject(new Error("The picture is too large to be written."))), "image/png");
  });
}

/** The state, which can be read again, and the subgraph that it means, in plain values. */
export function toJson(store: Store): string {
  const { graph, notes } = store;
  const { nodes } = graph.data;
  const pinned = store.pinned;
  const isPinned = new Set(pinned);
  const subgraph = {
    prompt: graph.data.prompt,
    nodes: pinned.map((i) => ({
      id: graph.ids[i],
      number: i,
      kind: graph.kind[i],
      layer: nodes.layer[i],
      pos: nodes.pos[i],
      index: nodes.index[i],
      activation: nodes.activation[i],
      influence: nodes.influence[i],
      label: store.labelOf(i),
    })),
    edges: pinned.flatMap((i) =>
      [...graph.inEdges(i)]
        .filter((e) => isPinned.has(graph.source[e]))
        .map((e) => ({ source: graph.ids[graph.source[e]], target: graph.ids[i], weight: graph.weight[e] })),
    ),
    groups: notes.groups,
    scores: pinnedScores(store),
  };
  return `${JSON.stringify({ ...store.export(), subgraph }, null, 1)}\n`;
}

/** One change for each layer and position of what is pinned, by group; of the selected feature where none is pinned. */
export interface Change {
  name: string;
  intervention: InterventionData;
}

export function changesOf(store: Store): Change[] {
  const { graph, notes } = store;
  const { layer, pos, index } = graph.data.nodes;
  const isFeature = (i: number | null): i is number => i !== null && graph.kind[i] === "feature";
  const inGroup = new Set(notes.groups.flatMap((group) => group.members));
  const single = notes.pinned.filter((id) => !inGroup.has(id)).map((id) => store.numberOf(id)).filter(isFeature);
  const parts: [string, number[]][] = [
    ...notes.groups.map((group): [string, number[]] => [group.name, group.members.map((id) => store.numberOf(id)).filter(isFeature)]),
    ...single.map((i): [string, number[]] => [store.nameOf(i), [i]]),
  ];
  if (!parts.some(([, members]) => members.length) && isFeature(store.selected)) {
    parts.push([store.nameOf(store.selected), [store.selected]]);
  }
  const changes: Change[] = [];
  for (const [name, members] of parts) {
    const places = new Map<string, InterventionData>();
    for (const i of members) {
      const key = `${layer[i]} ${pos[i]}`;
      const change = places.get(key) ?? { layer: layer[i], pos: pos[i], feature: [], scale: 0 };
      change.feature.push(index[i]);
      places.set(key, change);
    }
    for (const intervention of places.values()) changes.push({ name, intervention });
  }
  return changes;
}

/** A Python literal: no character of the text can end it. */
function quoted(text: string): string {
  return JSON.stringify(text).replace(/[\u{7f}-\u{10ffff}]/gu, (sign) => {
    const code = sign.codePointAt(0)!.toString(16);
    return code.length > 4 ? `\\U${code.padStart(8, "0")}` : `\\u${code.padStart(4, "0")}`;
  });
}

/** For a comment: no character of the text can end it. */
function oneLine(text: string): string {
  return text.replace(/[\u0000-\u001f\u007f-\u009f\u2028\u2029]+/g, " ");
}

/** Python that ablates what is pinned, group by group, and looks at what follows. */
export function toPython(store: Store): string {
  const changes = changesOf(store);
  if (!changes.length) return "# Pin or select features first: only features can be changed.\n";
  const { graph } = store;
  const modelName = String(graph.data.info.model_name ?? "...");
  const tokens = graph.data.tokens.map((_, pos) => {
    const node = graph.kind.findIndex((kind, i) => kind === "token" && graph.data.nodes.pos[i] === pos);
    return node < 0 ? null : graph.data.nodes.index[node];
  });
  const prompt = tokens.includes(null) ? quoted(graph.data.prompt) : `[${tokens.join(", ")}]`;
  const lines = changes.map(({ name, intervention }) => {
    const { layer, pos, feature, scale, value } = intervention;
    const features = feature.length === 1 ? feature[0] : `[${feature.join(", ")}]`;
    const setter = value === undefined ? `scale=${scale ?? 0}` : `value=${value}`;
    return `    Intervention(layer=${layer}, pos=${pos}, feature=${features}, ${setter}),  # ${oneLine(name)}`;
  });
  return [
    "from tl_clt import CrossLayerTranscoder, Intervention, intervene, load_model",
    "",
    "# model and clt are those that the graph was traced with:",
    `# model = load_model(${quoted(modelName)})`,
    '# clt = CrossLayerTranscoder.from_pretrained("folder or name of the CLT")',
    `prompt = ${prompt}  # ${oneLine(graph.data.prompt)}`,
    "interventions = [",
    ...lines,
    "]",
    "effect = intervene(model, clt, prompt, interventions)",
    "print(effect.top_changes(10))",
    "",
  ].join("\n");
}

/** Give a file to the reader. */
export function download(name: string, content: string | Blob, type: string): void {
  const url = URL.createObjectURL(content instanceof Blob ? content : new Blob([content], { type }));
  const link = document.createElement("a");
  link.href = url;
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}
