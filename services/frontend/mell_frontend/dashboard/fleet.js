// A card for each GPU, and two canvases: over the cards what they hold, drawn when it changes; over the window, and so no
// larger than it, the moves.

import { byId, keep, make, say } from "./dom.js";
import { count, percent, plural, short, span } from "./format.js";
import { Bars } from "./bars.js";
import { Flights } from "./flights.js";
import { stillness } from "./theme.js";

// Thirty pictures a second are enough for what only flies by.
const FLIGHT_MS = 30;

export class Fleet {
  // `onOpen(worker, sequence)` when somebody wants to see more of a GPU.
  constructor(onOpen) {
    this.list = byId("fleet");
    this.stage = byId("stage");
    this.canvas = byId("canvas");
    this.sky = byId("sky");
    this.tip = byId("tip");
    this.onOpen = onOpen;
    this.cards = new Map();
    this.slots = new Map();
    this.bars = new Bars();
    this.flights = new Flights();
    this.drawing = this.flew = 0;
    this.sliding = this.flying = false;
    new ResizeObserver(() => this.measure()).observe(this.stage);
    addEventListener("resize", () => this.measure());
    addEventListener("scroll", () => this.next(), { passive: true });
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
    this.ratio = ratio;
    fit(this.canvas, stage.width, stage.height, ratio);
    fit(this.sky, document.documentElement.clientWidth, innerHeight, ratio);
    this.slots.clear();
    for (const [worker, card] of this.cards) {
      const box = card.bar.getBoundingClientRect();
      this.slots.set(worker, { x: box.x - stage.x, y: box.y - stage.y, width: box.width, height: box.height });
    }
    this.draw();
  }

  // Once more, all of it.
  draw() {
    this.sliding = true;
    this.next();
  }

  next() {
    this.drawing ||= requestAnimationFrame((now) => this.frame(now));
  }

  frame(now) {
    this.drawing = 0;
    const still = stillness.matches;
    if (this.sliding) this.sliding = this.bars.draw(this.clear(this.canvas), this.slots, now, still) && !still;
    if ((this.flights.flying.size || this.flying) && now - this.flew >= FLIGHT_MS) {
      this.flew = now;
      const pen = this.clear(this.sky), stage = this.stage.getBoundingClientRect();
      pen.translate(stage.x, stage.y);
      const edges = [-stage.x, document.documentElement.clientWidth - stage.x];
      this.flying = this.flights.draw(pen, this.slots, now, still, edges);
    }
    if (still && this.flying) this.later ||= setTimeout(() => ((this.later = 0), this.next()), 500);
    else if (this.sliding || this.flying) this.next();
  }

  clear(canvas) {
    const pen = canvas.getContext("2d");
    pen.setTransform(this.ratio, 0, 0, this.ratio, 0, 0);
    pen.clearRect(0, 0, canvas.width, canvas.height);
    return pen;
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
    say(this.tip, `${short(segment.sequence)}\n${segment.state}${where}, class ${segment.size}, ${plural(segment.tokens, "token")}, ${plural(segment.blocks, "KV block")}`);
    this.tip.style.left = `${Math.min(event.clientX + 12, innerWidth - this.tip.offsetWidth - 8)}px`;
    this.tip.style.top = `${event.clientY + 16}px`;
  }
}

function fit(canvas, width, height, ratio) {
  if (canvas.width === Math.round(width * ratio) && canvas.height === Math.round(height * ratio)) return;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
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
