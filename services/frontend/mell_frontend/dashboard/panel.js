// One GPU in full: its facts, its requests, and what an operator can do with them.

import * as api from "./api.js";
import { byId, keep, make, say, toast } from "./dom.js";
import { bytes, count, percent, plural, short, span } from "./format.js";

export class Panel {
  // `onClose(worker)` when it is closed; `onDenied(error)` when the key is not right.
  constructor(onClose, onDenied) {
    this.root = byId("panel");
    this.worker = "";
    this.picked = "";
    this.rows = new Map();
    this.targets = "";
    this.onClose = onClose;
    this.onDenied = onDenied;
    byId("panel-close").addEventListener("click", () => this.close());
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && !byId("key-dialog").open) this.close();
    });
    byId("drain").addEventListener("click", () => this.rehearse());
    byId("drain-now").addEventListener("click", () => this.drain());
    byId("drain-not").addEventListener("click", () => this.hidePlan());
    byId("undrain").addEventListener("click", () => this.undrain());
    byId("explain").addEventListener("click", () => this.explain());
    byId("mover").addEventListener("submit", (event) => {
      event.preventDefault();
      this.move();
    });
  }

  open(worker, sequence, cluster) {
    this.worker = worker;
    this.hidePlan();
    this.pick(sequence ?? "");
    this.update(cluster);
    this.root.hidden = false;
    byId("panel-title").focus();
  }

  close() {
    if (!this.worker) return;
    const worker = this.worker;
    this.worker = "";
    this.root.hidden = true;
    this.onClose(worker);
  }

  update(cluster) {
    if (!this.worker) return;
    this.cluster = cluster;
    const gpu = cluster.gpus.get(this.worker);
    if (!gpu) {
      toast(`${this.worker} has left`);
      this.close();
      return;
    }
    say(byId("panel-title"), gpu.name);
    say(byId("panel-state"), gpu.state);
    byId("panel-state").dataset.state = gpu.state;
    this.steer(gpu.state === "draining" || gpu.state === "drained");
    this.facts(gpu);
    this.requests(gpu);
    this.offer(cluster, gpu);
  }

  // Offers the one order that makes sense now; who was on the other is on this one.
  steer(drains) {
    const [offered, other] = drains ? ["undrain", "drain"] : ["drain", "undrain"];
    const lost = document.activeElement === byId(other) || (drains && byId("plan").contains(document.activeElement));
    byId(offered).hidden = false;
    byId(other).hidden = true;
    if (drains) this.hidePlan();
    if (lost) byId(offered).focus();
  }

  facts(gpu) {
    const size = gpu.kv_bytes_per_token * gpu.block_tokens;
    const room = size ? `, ${bytes(gpu.used_blocks * size)} of ${bytes(gpu.kv_blocks * size)}` : "";
    const facts = {
      Id: gpu.worker,
      Model: gpu.model,
      On: `${gpu.host}, ${gpu.device} (${gpu.engine})`,
      KV: `${percent(gpu.used_blocks / gpu.kv_blocks)}: ${count(gpu.used_blocks)} of ${count(gpu.kv_blocks)} blocks${room}`,
      Requests: `${count(gpu.running)} running, ${count(gpu.waiting)} preempted, ${count(gpu.leaving)} leaving, ${count(gpu.coming)} coming`,
      Step: gpu.step_us ? `${(gpu.step_us / 1000).toFixed(1)} ms` : "–",
      Moves: gpu.migration_modes.join(", ") || "none: it moves nothing",
      Heard: `${span(gpu.report_age_s)} ago`,
    };
    const list = byId("panel-facts");
    if (!list.children.length) {
      for (const name of Object.keys(facts)) list.append(make("dt", { textContent: name }), make("dd"));
    }
    Object.values(facts).forEach((text, index) => say(list.children[2 * index + 1], text));
  }

  requests(gpu) {
    say(byId("panel-requests"), plural(gpu.segments.length, "request"));
    const largest = [...gpu.segments].sort((one, other) => other.blocks - one.blocks).slice(0, 200);
    const create = (segment) => {
      const pick = make("button", { className: "pick", type: "button", textContent: short(segment.sequence), title: segment.sequence });
      pick.addEventListener("click", () => this.pick(this.picked === segment.sequence ? "" : segment.sequence));
      const cells = ["state", "tokens", "blocks"].map((name) => make("td", { className: name === "state" ? "" : "number" }));
      return { root: make("tr", {}, make("td", {}, pick), ...cells), pick, cells };
    };
    const update = ({ pick, cells }, segment) => {
      pick.setAttribute("aria-pressed", String(segment.sequence === this.picked));
      say(cells[0], segment.target ? `to ${this.cluster.gpus.get(segment.target)?.name ?? "elsewhere"}` : segment.state);
      say(cells[1], count(segment.tokens));
      say(cells[2], count(segment.blocks));
    };
    keep(byId("panel-rows"), this.rows, largest, (segment) => segment.sequence, create, update);
  }

  pick(sequence) {
    this.picked = sequence;
    byId("mover").hidden = !sequence;
    byId("story").replaceChildren();
    say(byId("mover-what"), sequence);
    for (const [name, row] of this.rows) row.pick.setAttribute("aria-pressed", String(name === sequence));
  }

  // Where the picked request could go. The list is left alone while it says the same: it may be open.
  offer(cluster, gpu) {
    const here = gpu.segments.some((segment) => segment.sequence === this.picked);
    if (this.picked && !here) this.pick("");
    const fit = [...cluster.gpus.values()].filter(
      (other) => other !== gpu && other.model === gpu.model && (other.state === "active" || other.state === "standby"),
    );
    const targets = fit.map((other) => other.worker).join();
    byId("mover-go").disabled = !fit.length;
    if (targets === this.targets) return;
    this.targets = targets;
    byId("mover-to").replaceChildren(...fit.map((other) => make("option", { value: other.worker, textContent: other.name })));
  }

  hidePlan() {
    byId("plan").hidden = true;
  }

  async rehearse() {
    const reply = await this.order(() => api.drain(this.worker, true));
    if (!reply) return;
    const stay = reply.sequences.filter((row) => !row.target);
    const parts = [reply.sequences.length ? `${plural(reply.sequences.length, "request")} would move while running.` : "It is empty."];
    if (stay.length) parts.push(`${count(stay.length)} of them would stay for now: ${stay[0].why}.`);
    say(byId("plan-text"), `${parts.join(" ")} It takes nothing new until it is undrained.`);
    byId("plan").hidden = false;
    byId("drain-now").focus();
  }

  async drain() {
    const reply = await this.order(() => api.drain(this.worker, false));
    if (reply) toast(`${reply.name} is being emptied`);
    this.hidePlan();
  }

  async undrain() {
    const reply = await this.order(() => api.undrain(this.worker));
    if (reply) toast(`${reply.name} takes work again`);
  }

  async move() {
    const reply = await this.order(() => api.move(this.picked, byId("mover-to").value, byId("mover-mode").value));
    for (const { state, message, sequence } of reply?.moves ?? []) {
      if (state === "committed") toast(`${short(sequence)} has moved`);
      else toast(message || `${short(sequence)}: ${state}`, state !== "there");
    }
  }

  async explain() {
    const reply = await this.order(() => api.explain(this.picked));
    const happenings = reply?.stories[0]?.happenings ?? [];
    byId("story").replaceChildren(...happenings.map((happening) => make("li", { textContent: told(happening) })));
  }

  // Does what is asked, with its button at rest meanwhile; undefined if it was refused.
  async order(work) {
    const buttons = [...this.root.querySelectorAll(".row button")];
    buttons.forEach((button) => (button.disabled = true));
    try {
      return await work();
    } catch (error) {
      if (error.status === 401 || error.status === 403) this.onDenied(error);
      else toast(error.message, true);
      return undefined;
    } finally {
      buttons.forEach((button) => (button.disabled = false));
    }
  }
}

function told({ what, worker, why, ago_s, move }) {
  const where = move ? `${move.source} to ${move.target} by ${move.mode}` : worker;
  return `${span(ago_s)} ago: ${what}, ${where}${why ? ` (${why})` : ""}`;
}
