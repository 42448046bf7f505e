// What each GPU holds, as segments of its bar that grow, shrink and slide to their places: the hue is the model's, the
// tone the request's class.

import { theme } from "./theme.js";

const SLIDE_MS = 450;

// A frame's time may lie before the state that it shows first.
const ease = (part) => 1 - (1 - Math.min(1, Math.max(0, part))) ** 3;

export class Bars {
  constructor() {
    this.gpus = new Map();
    this.took = 0;
  }

  // Lays out a new state; what was drawn last is where the sliding begins.
  take(cluster, now) {
    const part = ease((now - this.took) / SLIDE_MS);
    const before = this.gpus;
    this.gpus = new Map();
    for (const gpu of cluster.gpus.values()) {
      const old = before.get(gpu.worker)?.shapes ?? new Map();
      const scale = (gpu.held > gpu.used_blocks && gpu.used_blocks ? gpu.used_blocks / gpu.held : 1) / gpu.kv_blocks;
      const shapes = new Map();
      let x = 0;
      for (const segment of gpu.segments) {
        const width = segment.blocks * scale;
        shapes.set(segment.sequence, shape(segment, old.get(segment.sequence), part, x, width));
        x += width;
      }
      for (const [sequence, gone] of old) {
        if (shapes.has(sequence) || gone.dying) continue;
        shapes.set(sequence, { ...shape(gone.segment, gone, part, gone.x1, 0), dying: true });
      }
      this.gpus.set(gpu.worker, {
        shapes, hue: cluster.hue(gpu.model), end: Math.min(1, x), other: Math.max(0, gpu.used_blocks / gpu.kv_blocks - x),
        coming: gpu.incoming / gpu.kv_blocks, quiet: gpu.state === "silent",
      });
    }
    this.took = now;
  }

  at(worker, share) {
    for (const { x1, w1, segment, dying } of this.gpus.get(worker)?.shapes.values() ?? []) {
      if (!dying && share >= x1 && share <= x1 + w1) return segment;
    }
    return undefined;
  }

  // The middle of a sequence's segment, or the end of what is used, as shares of the bar.
  place(worker, sequence) {
    const gpu = this.gpus.get(worker);
    const found = gpu?.shapes.get(sequence);
    return found ? found.x1 + found.w1 / 2 : (gpu?.end ?? 0);
  }

  // Returns whether it must be drawn again.
  draw(pen, slots, now, still) {
    const since = now - this.took;
    const part = still ? 1 : ease(since / SLIDE_MS);
    const hatch = hatching(pen);
    for (const [worker, slot] of slots) {
      const gpu = this.gpus.get(worker);
      if (gpu) this.bar(pen, gpu, slot, part, hatch);
    }
    pen.globalAlpha = 1;
    return since < SLIDE_MS;
  }

  bar(pen, gpu, slot, part, hatch) {
    const tones = theme.models[gpu.hue];
    const { x: left, y: top, width: length, height } = slot;
    for (const one of gpu.shapes.values()) {
      const x = left + length * (one.x0 + (one.x1 - one.x0) * part);
      const width = length * (one.w0 + (one.w1 - one.w0) * part);
      if (width < 0.2) continue;
      const { state, size } = one.segment;
      const shown = width > 3 ? width - 1 : width > 1.5 ? width - 0.5 : width;
      pen.globalAlpha = (one.dying ? 1 - part : 1) * (state === "placed" ? 0.45 : gpu.quiet ? 0.4 : 1);
      pen.fillStyle = tones[size];
      pen.fillRect(x, top, shown, height);
      if (state === "moving" && !one.dying) {
        pen.fillStyle = hatch;
        pen.fillRect(x, top, shown, height);
      }
    }
    const end = left + length * gpu.end;
    pen.globalAlpha = 0.5;
    pen.fillStyle = theme.other;
    if (gpu.other > 0.004) pen.fillRect(end, top, length * Math.min(gpu.other, 1 - gpu.end), height);
    if (gpu.coming > 0) {
      pen.globalAlpha = 1;
      pen.strokeStyle = tones.T;
      pen.lineWidth = 1.5;
      pen.setLineDash([3, 3]);
      const width = Math.max(3, length * Math.min(gpu.coming, 1 - gpu.end) - 1.5);
      pen.strokeRect(Math.min(end + 0.75, left + length - width), top + 0.75, width, height - 1.5);
      pen.setLineDash([]);
    }
  }
}

function shape(segment, old, part, x1, w1) {
  const x0 = old ? old.x0 + (old.x1 - old.x0) * part : x1;
  const w0 = old ? old.w0 + (old.w1 - old.w0) * part : 0;
  return { segment, x0, w0, x1, w1, dying: false };
}

let tile = null, pattern = null;

function hatching(pen) {
  if (pattern && tile.colour === theme.card) return pattern;
  tile = document.createElement("canvas");
  tile.width = tile.height = 6;
  tile.colour = theme.card;
  const brush = tile.getContext("2d");
  brush.strokeStyle = theme.card;
  brush.globalAlpha = 0.75;
  brush.lineWidth = 1.6;
  for (const shift of [-6, 0, 6]) {
    brush.beginPath();
    brush.moveTo(shift, 6);
    brush.lineTo(shift + 6, 0);
    brush.stroke();
  }
  pattern = pen.createPattern(tile, "repeat");
  return pattern;
}
