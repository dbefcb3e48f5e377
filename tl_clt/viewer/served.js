// Runs in the page that `tl-clt view` serves, after page.js: fetches the graphs, and gives the page its host.
"use strict";

(async () => {
  const token = new URLSearchParams(location.search).get("token");
  const element = document.getElementById("page");

  async function ask(path, body) {
    const request = { headers: { Authorization: `Bearer ${token}` }, cache: "no-store", credentials: "omit" };
    if (body !== undefined) {
      request.method = "POST";
      request.headers["Content-Type"] = "application/json";
      request.body = JSON.stringify(body);
    }
    let response;
    try {
      response = await fetch(path, request);
    } catch {
      throw new Error("The server does not answer. Is tl-clt view still running?");
    }
    const answer = await response.json();
    if (!response.ok) {
      throw new Error(answer.error);
    }
    return answer;
  }

  try {
    const { data, can } = await ask("data");
    document.title = data.title;
    const host = {};
    if (can.features) host.loadFeature = (layer, feature) => ask(`features/${layer}/${feature}`);
    if (can.annotate) host.saveAnnotations = (exported) => ask("annotations", exported);
    if (can.steer) host.steer = (interventions, graph) => ask(`steer/${graph}`, { interventions });
    tlcltPage.mount(element, data, { host });
  } catch (error) {
    element.setAttribute("role", "alert");
    element.textContent = error.message;
  }
})();
