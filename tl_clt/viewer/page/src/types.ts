// What Python gives the page (tl_clt/viewer/html.py, page_data), and what a shell around the page may offer.

export type Kind = "feature" | "error" | "token" | "position" | "bias" | "logit";
export const KINDS: Kind[] = ["feature", "error", "token", "position", "bias", "logit"];
export const PLURAL: Record<Kind, string> = {
  feature: "features",
  error: "errors",
  token: "tokens",
  position: "positions",
  bias: "biases",
  logit: "outputs",
};

export interface GraphData {
  name: string;
  prompt: string;
  tokens: string[];
  n_layers: number;
  nodes: {
    kind: Kind[];
    layer: number[];
    pos: number[];
    index: number[];
    activation: number[];
    influence: number[];
    label: string[];
    /** 0 for features whose in-edges are not known. */
    traced: number[];
    /** Absolute input of each node along edges that are not in the graph. */
    dropped: number[];
  };
  edges: { target: number[]; source: number[]; weight: number[] };
  logits: string[];
  probabilities: number[];
  scores: Scores;
  unexplored: number;
  pruned: boolean;
  info: Record<string, string | number | boolean>;
}

export interface Scores {
  replacement: number;
  completeness: number;
  replacement_bounds: [number, number];
  completeness_bounds: [number, number];
}

export interface Example {
  quantile: string;
  tokens: string[];
  activations: number[];
  position: number;
}

export interface FeatureData {
  layer: number;
  feature: number;
  label: string | null;
  label_score: number | null;
  label_score_random: number | null;
  density: number;
  max_activation: number;
  histogram: { edges: number[]; counts: number[] };
  top_logits: [string, number][];
  bottom_logits: [string, number][];
  examples: Example[];
  connected: { layer: number; feature: number; weight: number }[];
}

export interface PageData {
  format: "tl_clt.page";
  version: number;
  title: string;
  graphs: GraphData[];
  /** By "layer/feature"; null where nothing is known of it. */
  features: Record<string, FeatureData | null>;
  /** Features of the graphs that are not in `features`. */
  features_left_out?: number;
  /** All features that the source knows, or null where it does not count them. */
  features_in_source?: number | null;
  /** What a shell saved before: as the page's own export, see `Exported` in store.ts. */
  annotations?: unknown;
}

/** A change of one feature, or of several of a layer and position; exactly one of scale and value. */
export interface InterventionData {
  layer: number;
  pos: number;
  feature: number[];
  scale?: number;
  value?: number;
}

export interface Steered {
  /** The most probable next tokens with the change, and how probable they were without. */
  top: { token: string; before: number; after: number }[];
  /** Changed features that are not active there, in words. */
  inactive?: string[];
}

/** What a shell offers; the page works without any of it. */
export interface Host {
  /** What is known of a feature, or null. */
  loadFeature?(layer: number, feature: number): Promise<FeatureData | null>;
  /** Keep pins, groups, labels and places; called some time after the last change. */
  saveAnnotations?(state: unknown): Promise<unknown>;
  /** Run the model with features changed. `graph` is the number of the graph whose prompt is meant. */
  steer?(interventions: InterventionData[], graph: number): Promise<Steered>;
}

export interface Options {
  host?: Host;
  /** Whether the state stands in the address; true where it is not said. */
  hash?: boolean;
  theme?: "auto" | "light" | "dark";
}
