// Moves as they happen: a curve from bar to bar, what travels on it, and a label with mode and size.

import { bytes, count } from "./format.js";
import { load } from "./model.js";
import { theme } from "./theme.js";

const FLY_MS = 900;
const LINGER_MS = 2_200;
const MOST_LABELS = 8;
// Where on their curves labels stand in turn, so that those of neighbours lie less on each other.
const PLACES = [0.5, 0.3, 0.7];

export function loadText(move, gpu) {
  const { bytes: size, tokens } = load(move, gpu);
  const parts = [move.mode];
  if (size) parts.push(bytes(size));
  if (tokens) parts.push(`${count(tokens)} tokens`);
  return parts.join(" · ");
}

export class Flights {
  constructor() {
    this.flying = new Map();
  }

  take(cluster, fresh, bars, now) {
    for (const move of fresh) {
      this.flying.set(move.migration, {
        move, born: now, ended: 0,
        from: bars.place(move.source, move.sequence), to: bars.place(move.target, ""),
      });
    }
    for (const move of cluster.moves) {
      const flight = this.flying.get(move.migration);
      if (!flight) continue;
      flight.move = move;
      flight.text = loadText(move, cluster.gpus.get(move.source) ?? cluster.gpus.get(move.target));
      // What came out between two states is shown from its beginning all the same.
      if (move.outcome !== "moving") flight.ended ||= Math.max(now, flight.born + FLY_MS);
    }
    const known = new Set(cluster.moves.map((move) => move.migration));
    for (const [name, flight] of this.flying) {
      if (!known.has(name)) flight.ended ||= now;
    }
  }

  // Returns whether any is still to be seen. Labels stay between the edges, left and right.
  draw(pen, slots, now, still, edges) {
    let labels = 0;
    const linger_ms = this.flying.size > MOST_LABELS ? LINGER_MS / 2 : LINGER_MS;
    for (const [name, flight] of this.flying) {
      const source = slots.get(flight.move.source), target = slots.get(flight.move.target);
      const over = flight.ended && now > flight.ended + linger_ms;
      if (over || !source || !target) {
        if (over) this.flying.delete(name);
        continue;
      }
      const path = curve(source, target, flight);
      const ink = flight.ended && now > flight.ended ? Math.max(0, 1 - (now - flight.ended) / linger_ms) : 1;
      line(pen, path, flight, ink, now, still);
      if (labels < MOST_LABELS) label(pen, on(path, PLACES[labels % PLACES.length]), flight, ink, edges);
      labels += 1;
    }
    pen.globalAlpha = 1;
    return this.flying.size > 0;
  }
}

function line(pen, path, flight, ink, now, still) {
  const landed = flight.ended && now >= flight.ended;
  const failed = landed && flight.move.outcome !== "committed";
  pen.globalAlpha = ink;
  pen.beginPath();
  pen.moveTo(path.x0, path.y0);
  pen.quadraticCurveTo(path.cx, path.cy, path.x1, path.y1);
  pen.strokeStyle = theme.card;
  pen.lineWidth = 5;
  pen.stroke();
  pen.strokeStyle = pen.fillStyle = failed ? theme.bad : landed ? theme.good : theme.accent;
  pen.lineWidth = 2;
  pen.setLineDash(landed ? [] : [6, 5]);
  pen.lineDashOffset = still || landed ? 0 : -now / 30;
  pen.stroke();
  pen.setLineDash([]);
  dot(pen, path, landed ? (failed ? 0 : 1) : still ? 0.5 : (Math.max(0, now - flight.born) % FLY_MS) / FLY_MS);
}

function curve(source, target, flight) {
  const x0 = source.x + source.width * flight.from, y0 = source.y + source.height / 2;
  const x1 = target.x + target.width * flight.to, y1 = target.y + target.height / 2;
  const length = Math.hypot(x1 - x0, y1 - y0) || 1;
  const lift = Math.min(70, 20 + length * 0.18);
  const side = x1 >= x0 ? 1 : -1;
  return {
    x0, y0, x1, y1,
    cx: (x0 + x1) / 2 + (side * lift * (y1 - y0)) / length,
    cy: (y0 + y1) / 2 - (side * lift * (x1 - x0)) / length,
  };
}

function on({ x0, y0, cx, cy, x1, y1 }, part) {
  const rest = 1 - part;
  return [
    rest * rest * x0 + 2 * rest * part * cx + part * part * x1,
    rest * rest * y0 + 2 * rest * part * cy + part * part * y1,
  ];
}

function dot(pen, path, part) {
  const [x, y] = on(path, part);
  pen.beginPath();
  pen.arc(x, y, 5, 0, 2 * Math.PI);
  pen.fill();
  pen.lineWidth = 2;
  pen.strokeStyle = theme.card;
  pen.stroke();
}

function label(pen, [middle, y], flight, ink, [left, right]) {
  pen.globalAlpha = ink;
  pen.font = "600 12px system-ui, sans-serif";
  const { width } = pen.measureText(flight.text);
  const x = Math.max(left + width / 2 + 10, Math.min(middle, right - width / 2 - 10));
  pen.fillStyle = theme.card;
  pen.strokeStyle = theme.accent;
  pen.lineWidth = 1;
  pen.beginPath();
  pen.roundRect(x - width / 2 - 8, y - 11, width + 16, 22, 11);
  pen.fill();
  pen.stroke();
  pen.fillStyle = theme.text;
  pen.textAlign = "center";
  pen.textBaseline = "middle";
  pen.fillText(flight.text, x, y + 0.5);
}
