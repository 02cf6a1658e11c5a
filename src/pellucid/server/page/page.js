"use strict";

const STAGES = {
  starting: "starting",
  wait: "another process is fetching the model",
  download: "fetching the model",
  extract: "unpacking the model",
  load: "reading the model into memory",
};
const SECONDS = { ready: 10, draining: 2, failed: 2, loading: 1, unreachable: 5 };

// Not relative to the page's address: that may have a name and a password in it, which fetch refuses.
const base = location.origin + location.pathname;
const at = (path) => new URL(path, base);

const element = (id) => document.getElementById(id);

function show(state, detail) {
  if (element("state").textContent !== state) {
    element("state").textContent = state;
  }
  if (element("detail").textContent !== detail) {
    element("detail").textContent = detail;
  }
  element("dot").className = `dot ${state}`;
}

const megabytes = (bytes) => (bytes / 1e6).toFixed(1);

function showProgress(progress) {
  const bar = element("progress");
  bar.hidden = progress === undefined;
  if (progress !== undefined && progress.total > 0) {
    bar.max = progress.total;
    bar.value = progress.done;
    element("amount").textContent = `${megabytes(progress.done)} of ${megabytes(progress.total)} MB`;
  } else {
    bar.removeAttribute("value");
    element("amount").textContent = "";
  }
}

async function showContext() {
  const answer = await fetch(at("v1/models"));
  if (answer.ok) {
    const [model] = (await answer.json()).data;
    element("context").textContent = `${model.max_model_len.toLocaleString("en")} tokens`;
  }
}

async function refresh() {
  let state = "unreachable";
  try {
    const answer = await (await fetch(at("ready"))).json();
    state = answer.state;
    let detail = answer.error ? `: ${answer.error}` : "";
    if (answer.progress) {
      detail = `: ${STAGES[answer.progress.stage] ?? answer.progress.stage}`;
    }
    if (state === "ready") {
      detail = `, loaded in ${answer.load_seconds.toFixed(2)} s`;
    }
    show(state, detail);
    showProgress(answer.progress);
    if (state === "ready") {
      await showContext();
    }
  } catch {
    show("unreachable", ": the server does not answer");
    showProgress(undefined);
  }
  setTimeout(refresh, SECONDS[state] * 1000);
}

// As the browser reached it: a proxy before the server may speak HTTPS, of which the server knows nothing.
for (const shown of document.querySelectorAll(".base")) {
  shown.textContent = base.replace(/\/$/, "");
}
refresh();
