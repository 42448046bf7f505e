// A card for each GPU, and over all of them one canvas with what they hold.

import { byId, keep, make, say } from "./dom.js";
import { count, percent, plural, short, span } from "./format.js";
import { Bars } from "./bars.js";
import { Flights } from "./flights.js";
import { stillness } from "./theme.js";

export class Fleet {
  // `onOpen(worker, sequence)` when somebody wants to see more of a GPU.
  constructor(onOpen) {
    this.list = byId("fleet");
    this.stage = byId("stage");
    this.canvas = byId("canvas");
    this.tip = byId("tip");
    this.onOpen = onOpen;
    this.cards = new Map();
    this.slots = new Map();
    this.bars = new Bars();
    this.flights = new Flights();
    this.drawing = 0;
    new ResizeObserver(() => this.measure()).observe(this.stage);
    addEventListener("scroll", () => this.draw(), { passive: true });
    this.list.addEventListener("pointermove", (event) => this.point(event));
    this.list.addEventListener("pointerleave", () => (this.tip.hidden = true));
  }

  update(cluster, fresh) {
    const gpus = [...cluster.gpus.values()];
    const density = gpus.length <= 8 ? "roomy" : gpus.length <= 40 ? "normal" : "dense";
    this.list.dataset.density = density;
    this.cluster = cluster;
    const before = this.cards.size;
    const known = [...this.cards.keys()].join();
    keep(this.list, this.cards, gpus, (gpu) => gpu.worker, (gpu) => this.card(gpu), fill);
    const now = performance.now();
    this.bars.take(cluster, now);
    if (before !== this.cards.size || known !== [...this.cards.keys()].join()) this.measure();
    this.flights.take(cluster, fresh, this.bars, now);
    this.draw();
  }

  card(gpu) {
    const parts = {};
    for (const name of ["name", "badge", "share", "bar", "facts"]) parts[name] = make("span", { className: name });
    const line = make("span", { className: "line" }, parts.name, parts.badge, parts.share);
    const button = make("button", { className: "gpu", type: "button" }, line, parts.bar, parts.facts);
    button.setAttribute("aria-expanded", "false");
    button.addEventListener("click", (event) => this.onOpen(gpu.worker, this.under(gpu.worker, event)?.sequence));
    return { root: make("li", {}, button), button, ...parts };
  }

  opened(worker) {
    for (const [name, card] of this.cards) card.button.setAttribute("aria-expanded", String(name === worker));
  }

  focus(worker) {
    this.cards.get(worker)?.button.focus();
  }

  // Where each bar is, relative to the canvas. Only when the page's layout has changed.
  measure() {
    const ratio = Math.min(2, devicePixelRatio || 1);
    const stage = this.stage.getBoundingClientRect();
    const width = Math.round(stage.width * ratio), height = Math.round(stage.height * ratio);
    if (this.canvas.width !== width || this.canvas.height !== height) {
      Object.assign(this.canvas, { width, height });
      this.canvas.style.width = `${stage.width}px`;
      this.canvas.style.height = `${stage.height}px`;
    }
    this.ratio = ratio;
    this.slots.clear();
    for (const [worker, card] of this.cards) {
      const box = card.bar.getBoundingClientRect();
      this.slots.set(worker, { x: box.x - stage.x, y: box.y - stage.y, width: box.width, height: box.height });
    }
    this.draw();
  }

  draw() {
    this.drawing ||= requestAnimationFrame((now) => this.frame(now));
  }

  frame(now) {
    this.drawing = 0;
    const pen = this.canvas.getContext("2d");
    const top = -this.stage.getBoundingClientRect().y;
    pen.setTransform(this.ratio, 0, 0, this.ratio, 0, 0);
    pen.clearRect(0, 0, this.canvas.width, this.canvas.height);
    const still = stillness.matches;
    const view = { top: top - 80, bottom: top + innerHeight + 80 };
    const moving = this.bars.draw(pen, this.slots, view, now, still);
    const flying = this.flights.draw(pen, this.slots, now, still);
    if (still && flying) this.later ||= setTimeout(() => ((this.later = 0), this.draw()), 500);
    else if (!still && (moving || flying)) this.draw();
  }

  under(worker, event) {
    const slot = this.slots.get(worker);
    if (!slot || event.clientX === undefined) return undefined;
    const stage = this.stage.getBoundingClientRect();
    const x = event.clientX - stage.x - slot.x, y = event.clientY - stage.y - slot.y;
    if (x < 0 || y < -4 || x > slot.width || y > slot.height + 4) return undefined;
    return this.bars.at(worker, x / slot.width);
  }

  point(event) {
    const button = event.target.closest(".gpu");
    const worker = button && [...this.cards].find(([, card]) => card.button === button)?.[0];
    const segment = worker && this.under(worker, event);
    this.tip.hidden = !segment;
    if (!segment) return;
    const where = segment.target ? ` to ${this.cluster.gpus.get(segment.target)?.name ?? segment.target}` : "";
    say(this.tip, `${short(segment.sequence)}\n${segment.state}${where}, ${plural(segment.tokens, "token")}, ${plural(segment.blocks, "KV block")}`);
    this.tip.style.left = `${Math.min(event.clientX + 12, innerWidth - this.tip.offsetWidth - 8)}px`;
    this.tip.style.top = `${event.clientY + 16}px`;
  }
}

function fill(card, gpu) {
  const share = gpu.used_blocks / gpu.kv_blocks;
  const { button } = card;
  say(card.name, gpu.name);
  say(card.badge, gpu.state);
  say(card.share, percent(share));
  say(card.facts, facts(gpu));
  if (card.badge.dataset.state !== gpu.state) {
    card.badge.classList.add("badge");
    button.dataset.state = card.badge.dataset.state = gpu.state;
  }
  button.classList.toggle("full", share > 0.95);
  const label = `${gpu.name}: ${gpu.state}, KV ${percent(share)} used, ${facts(gpu)}`;
  if (button.getAttribute("aria-label") !== label) button.setAttribute("aria-label", label);
}

function facts(gpu) {
  if (gpu.state === "silent") return `silent for ${span(gpu.report_age_s)}`;
  if (!gpu.sequences && !gpu.coming) return gpu.state === "standby" ? "ready and empty" : "empty";
  const parts = [`${count(gpu.running)} running`];
  if (gpu.waiting) parts.push(`${count(gpu.waiting)} preempted`);
  if (gpu.leaving) parts.push(`${count(gpu.leaving)} leaving`);
  if (gpu.coming) parts.push(`${count(gpu.coming)} coming`);
  if (gpu.step_us && gpu.running) parts.push(`${(gpu.step_us / 1000).toFixed(gpu.step_us < 10_000 ? 1 : 0)} ms a step`);
  return parts.join(" · ");
}
