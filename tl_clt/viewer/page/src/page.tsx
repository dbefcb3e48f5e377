// The page: `mount` draws a graph and all that is done with it into an element.

import { render } from "preact";
import { useEffect, useMemo, useReducer, useRef } from "preact/hooks";

import { GraphCanvas } from "./canvas";
import { Scene } from "./picture";
import { Store } from "./store";
import "./style.css";
import { Options, PageData } from "./types";
import { findVisible, summarise } from "./visible";

export interface Handle {
  store: Store;
  /** Where a node is on the screen, in pixels of the window. */
  positionOf(node: number): [number, number] | null;
  scene(): Scene | null;
  /** Milliseconds from the start of the page to its first picture. */
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
    unmount: () => {
      store.close();
      render(null, element);
    },
  };
  const onScene = (drawn: Scene) => {
    scene = drawn;
    if (handle.firstPaint === null) requestAnimationFrame(() => (handle.firstPaint ??= performance.now()));
  };
  render(<Page store={store} element={element} onScene={onScene} />, element);
  window.tlclt = handle;
  return handle;
}

function Page({ store, element, onScene }: { store: Store; element: HTMLElement; onScene(scene: Scene): void }) {
  const [, again] = useReducer((n: number) => n + 1, 0);
  useEffect(() => store.subscribe(() => again(0)), [store]);
  const { state, graph } = store;
  const visible = useMemo(
    () => findVisible(graph, state),
    [graph, state.influence, state.minWeight, state.layers, state.hiddenTokens, state.sign, state.kinds],
  );
  const found = useRef(new Set<number>()).current;
  useEffect(() => {
    element.dataset.theme = state.theme;
  }, [state.theme]);
  return (
    <div class="page">
      <header>
        <h1>{store.data.title}</h1>
      </header>
      <main>
        <GraphCanvas store={store} visible={visible} path={null} found={found} shared={null} onScene={onScene} />
        <p class="summary">{summarise(graph, visible)}</p>
      </main>
    </div>
  );
}
