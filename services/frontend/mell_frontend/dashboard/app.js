// Puts the page together: the feed in, figures, bars and moves out, orders back.

import * as api from "./api.js";
import { spark, timeline } from "./charts.js";
import { byId, keep, make, say, toast } from "./dom.js";
import { Fleet } from "./fleet.js";
import { loadText } from "./flights.js";
import { bytes, count, gpuHours, percent, plural, short, span } from "./format.js";
import { CLASSES, Cluster } from "./model.js";
import { Panel } from "./panel.js";
import { onTheme, theme } from "./theme.js";

const HIDDEN_MS = 30_000;
const MOST_MOVES = 30;

const cluster = new Cluster();
const fleet = new Fleet((worker, sequence) => {
  panel.open(worker, sequence, cluster);
  fleet.opened(worker);
});
const panel = new Panel((worker) => {
  fleet.opened("");
  fleet.focus(worker);
}, askForKey);
const moveRows = new Map();
let heard_ms = 0;
let settled = false; // whether what is shown is of a scheduler that knew everybody

const feed = new api.Feed({
  state(state) {
    // A scheduler that leads only now does not know everybody yet: the last state is nearer to the truth.
    if (!state.status.settled && settled) {
      link("trouble", "new scheduler", "A scheduler has just begun to lead and hears from the workers.", "");
      return;
    }
    settled = state.status.settled;
    heard_ms = Date.now();
    const fresh = cluster.take(state);
    link("live", "live");
    fleet.update(cluster, fresh);
    panel.update(cluster);
    show();
  },
  trouble: (message) => link("trouble", "no state", `The scheduler gives no state: ${message}.`),
  lost: (message) => link("trouble", "not connected", `Not connected: ${message}.`),
  denied(message, status) {
    link("trouble", "no access", message, status === 401 ? "Give it by “Admin key”." : "");
    if (status === 401) askForKey({ message: "" });
  },
});

// --- the link

function link(kind, text, trouble = "", again = "Trying again by itself.") {
  byId("link").dataset.link = kind;
  say(byId("link-text"), text);
  byId("trouble").hidden = !trouble;
  const age = heard_ms ? ` What you see is ${span((Date.now() - heard_ms) / 1000)} old.` : "";
  say(byId("trouble"), trouble && `${trouble}${age} ${again}`);
  byId("main").classList.toggle("stale", Boolean(trouble) && heard_ms > 0);
  byId("pause").disabled = Boolean(trouble);
}

function askForKey({ message }) {
  if (message) toast(message, true);
  const dialog = byId("key-dialog");
  if (!dialog.open) dialog.showModal();
}

function setKey(value) {
  api.setKey(value);
  byId("key-input").value = "";
  byId("key-dialog").close();
  feed.retry();
}

// --- figures

function show() {
  const { status, frontend, lately } = cluster.state;
  say(byId("about"), `${status.scheduler} · ${status.policy} · ${frontend.frontend}`);
  showUse(status.gpu_use, lately);
  const memory = cluster.memory(), queued = cluster.queued();
  say(byId("rate"), count(frontend.tokens_per_s));
  say(byId("rate-note"), `${plural(frontend.streams, "stream")} of this frontend`);
  say(byId("ttft"), frontend.first_tokens ? span(frontend.ttft_p50_s) : "–");
  say(byId("ttft-note"), frontend.first_tokens ? `median; 99%: ${span(frontend.ttft_p99_s)}` : "none in the last minute");
  say(byId("waiting"), count(cluster.waiting()));
  say(byId("waiting-note"), `${count(queued)} for room, ${count(cluster.waiting() - queued)} preempted`);
  say(byId("memory"), memory.blocks ? percent(memory.used / memory.blocks) : "–");
  say(byId("memory-note"), memory.bytes ? `${bytes(memory.usedBytes)} of ${bytes(memory.bytes)}` : `${count(memory.used)} of ${count(memory.blocks)} blocks`);
  showKeys();
  showMoves();
  showCharts();
  byId("pause").disabled = false;
  byId("pause").setAttribute("aria-pressed", String(cluster.paused));
  say(byId("pause"), cluster.paused ? "Resume moving" : "Pause moving");
  document.title = `${status.gpu_use?.used ?? "?"}/${cluster.gpus.size} GPUs · Mell`;
}

function showUse(use, lately) {
  const standing = cluster.standing();
  const parts = Object.entries(standing).filter(([, number]) => number).map(([state, number]) => `${count(number)} ${state}`);
  say(byId("standing"), parts.join(", ") || "none yet");
  say(byId("used"), use ? count(use.used) : "–");
  say(byId("up"), `of ${count(cluster.gpus.size)}`);
  if (!use) return;
  const compared = Boolean(use.shadow_policy) && use.shadow_gpu_s > 0;
  const saved = compared ? 1 - use.used_gpu_s / use.shadow_gpu_s : 0;
  say(byId("saved"), compared ? percent(saved).replace("-", "−") : "–");
  byId("saved").parentElement.classList.toggle("good", !compared || Math.round(100 * saved) >= 0);
  say(byId("saved-of"), compared ? `of ${use.shadow_policy}'s GPU-time` : "");
  const against = compared ? `, ${use.shadow_policy} ${gpuHours(use.shadow_gpu_s)}` : ", compared with nothing";
  say(byId("hours"), `${gpuHours(use.used_gpu_s)} used${against}`);
  byId("shadow-key").hidden = byId("saved-key").hidden = !lately.shadow.length;
  say(byId("shadow-name"), `${use.shadow_policy}: ${count(use.shadow)}`);
  byId("timeline").setAttribute("aria-label", `GPUs in use over the last minutes: now ${use.used}${compared ? `, ${use.shadow_policy} would use ${use.shadow}` : ""}`);
}

function showKeys() {
  const keys = byId("keys"), wanted = `${cluster.models.join()}`;
  byId("empty").hidden = cluster.gpus.size > 0;
  say(byId("empty"), "No GPU has joined yet. Start a worker: mell serve gpu-worker");
  if (keys.dataset.models === wanted) return;
  keys.dataset.models = wanted;
  const models = cluster.models.map((model) => {
    return make("span", {}, make("i", { className: "swatch" }), model);
  });
  const tones = CLASSES.map((size) => {
    const swatch = make("i", { className: "swatch" });
    swatch.dataset.size = size;
    return swatch;
  });
  const sizes = make("span", { title: "Tones: the share of its GPU that a request takes (classes T, S, M, L)" }, ...tones, "up to ¼, ⅓, ½ of a GPU, more");
  const states = { placed: "placed, not yet reported", moving: "moving", other: "held for others" };
  const kinds = Object.entries(states).map(([state, text]) => make("span", {}, make("i", { className: `swatch ${state}` }), text));
  keys.replaceChildren(...models, sizes, ...kinds);
  paintKeys();
}

// The tones of the first model stand for those of all.
function paintKeys() {
  for (const swatch of byId("keys").querySelectorAll("[data-size]")) swatch.style.background = theme.models[0][swatch.dataset.size];
  cluster.models.forEach((model, index) => {
    byId("keys").children[index].firstElementChild.style.background = theme.models[cluster.hue(model)].T;
  });
}

function showMoves() {
  const { status } = cluster.state;
  const paused = status.moves_paused ? "; paused" : "";
  say(byId("moves-note"), `${count(status.migrating)} under way, ${count(status.migrated)} made, ${count(status.migrations_failed)} failed${paused}`);
  const moves = cluster.moves.slice(0, MOST_MOVES);
  byId("no-moves").hidden = moves.length > 0;
  const create = () => {
    const outcome = make("span", { className: "outcome" });
    const where = make("span", { className: "where" }), how = make("span");
    const [when, what, why] = [0, 1, 2].map(() => make("span", { className: "sub" }));
    const cells = [[outcome, when], [where, what], [how, why]].map((pair) => make("td", {}, ...pair));
    return { root: make("tr", {}, ...cells), outcome, when, where, what, how, why };
  };
  keep(byId("moves"), moveRows, moves, (move) => move.migration, create, fillMove);
}

function fillMove(row, move) {
  const name = (worker) => cluster.gpus.get(worker)?.name ?? worker;
  const over = move.outcome !== "moving";
  say(row.outcome, move.outcome);
  row.outcome.dataset.outcome = move.outcome;
  say(row.when, over ? `${span(move.ago_s)} ago` : `for ${span(move.took_s)}`);
  say(row.where, `${name(move.source)} → ${name(move.target)}`);
  say(row.what, short(move.sequence));
  say(row.how, loadText(move, cluster.gpus.get(move.source) ?? cluster.gpus.get(move.target)));
  const stopped = move.stopped_s ? `, stopped ${span(move.stopped_s)}` : "";
  const because = over && move.outcome !== "committed" && move.why ? `: ${move.why}` : "";
  say(row.why, `${move.reason}${stopped}${because}`);
}

function showCharts() {
  if (!cluster.state) return;
  timeline(byId("timeline"), cluster.state.lately);
  for (const name of ["rate", "ttft", "waiting", "memory"]) {
    spark(byId(`${name}-line`), cluster.rates[name], name === "memory" ? 1 : 0);
  }
}

// --- what people do

byId("pause").addEventListener("click", async () => {
  try {
    const { paused } = await api.pause(!cluster.paused);
    toast(paused ? "No moves are planned until you resume" : "Moves are planned again");
  } catch (error) {
    if (error.status === 401 || error.status === 403) askForKey(error);
    else toast(error.message, true);
  }
});
byId("key").addEventListener("click", () => askForKey({ message: "" }));
byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey(byId("key-input").value);
});
byId("key-forget").addEventListener("click", () => setKey(""));
byId("key-cancel").addEventListener("click", () => byId("key-dialog").close());

let resting = 0;
document.addEventListener("visibilitychange", () => {
  clearTimeout(resting);
  if (document.hidden) resting = setTimeout(() => feed.sleep(true), HIDDEN_MS);
  else feed.sleep(false);
});
new ResizeObserver(showCharts).observe(byId("main"));
onTheme(() => {
  paintKeys();
  showCharts();
  fleet.draw();
});
feed.run();
