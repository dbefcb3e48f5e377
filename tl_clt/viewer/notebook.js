// The end of the widget's module, after page.js: draws the page into a notebook's output, and gives it its host.

let questions = 0;

function render({ model, el }) {
  const asked = new Map();

  function ask(what, content) {
    const number = ++questions;
    return new Promise((resolve, reject) => {
      asked.set(number, { resolve, reject });
      model.send({ what, number, asked: content });
    });
  }

  function onMessage(message) {
    const waiting = asked.get(message.number);
    if (!waiting) return;
    asked.delete(message.number);
    if ("error" in message) waiting.reject(new Error(message.error));
    else waiting.resolve(message.answer);
  }

  const can = model.get("can");
  const host = { saveAnnotations: (exported) => ask("annotate", exported) };
  if (can.features) host.loadFeature = (layer, feature) => ask("feature", { layer, feature });
  if (can.steer) host.steer = (interventions, graph) => ask("steer", { graph, interventions });
  model.on("msg:custom", onMessage);
  el.style.height = `${model.get("height")}px`;
  el.classList.add("tlclt-notebook");
  const handle = tlcltPage.mount(el, JSON.parse(model.get("data")), { host, hash: false });
  return () => {
    model.off("msg:custom", onMessage);
    handle.unmount();
  };
}

export default { render };
