// Small charts on canvases of their own: the timeline of GPUs, and lines without axes.

import { theme } from "./theme.js";

function prepare(canvas) {
  const ratio = devicePixelRatio || 1;
  const { clientWidth: width, clientHeight: height } = canvas;
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
  }
  const pen = canvas.getContext("2d");
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.clearRect(0, 0, width, height);
  return { pen, width, height };
}

function steps(values, x, y) {
  const path = [];
  values.forEach((value, index) => {
    if (index) path.push([x(index), y(values[index - 1])]);
    path.push([x(index), y(value)]);
  });
  return path;
}

function trace(pen, path) {
  pen.beginPath();
  path.forEach(([x, y], index) => (index ? pen.lineTo(x, y) : pen.moveTo(x, y)));
}

// GPUs in use as a filled step line, the shadow's as a dashed one, and what lies below that one as the saving.
export function timeline(canvas, lately) {
  const { pen, width, height } = prepare(canvas);
  const left = 26, bottom = height - 16, top = 8, right = width - 4;
  const most = Math.max(2, ...lately.used, ...lately.shadow);
  const length = Math.max(60, lately.used.length);
  const offset = length - lately.used.length;
  const x = (index) => left + ((index + offset) / (length - 1)) * (right - left);
  const y = (value) => bottom - (value / most) * (bottom - top);
  pen.font = "11px system-ui, sans-serif";
  pen.fillStyle = pen.strokeStyle = theme.muted;
  pen.textBaseline = "middle";
  pen.textAlign = "right";
  for (const value of new Set([0, Math.round(most / 2), most])) {
    pen.fillText(value, left - 6, y(value));
    pen.globalAlpha = 0.25;
    pen.fillRect(left, Math.round(y(value)), right - left, 1);
    pen.globalAlpha = 1;
  }
  const seconds = (length - 1) * lately.sample_s;
  pen.textAlign = "left";
  pen.fillText(seconds < 120 ? `${Math.round(seconds)} s ago` : `${Math.round(seconds / 60)} min ago`, left, height - 6);
  pen.textAlign = "right";
  pen.fillText("now", right, height - 6);
  if (!lately.used.length) return;
  const used = steps(lately.used, x, y), shadow = steps(lately.shadow, x, y);
  if (shadow.length === used.length) {
    const upper = steps(lately.used.map((value, index) => Math.max(value, lately.shadow[index])), x, y);
    trace(pen, [...upper, ...used.slice().reverse()]);
    pen.fillStyle = theme.goodSoft;
    pen.fill();
  }
  trace(pen, [[used[0][0], bottom], ...used, [used.at(-1)[0], bottom]]);
  pen.fillStyle = theme.accent;
  pen.globalAlpha = 0.16;
  pen.fill();
  pen.globalAlpha = 1;
  pen.lineWidth = 2;
  pen.lineJoin = "round";
  if (shadow.length) {
    pen.setLineDash([5, 4]);
    trace(pen, shadow);
    pen.strokeStyle = theme.muted;
    pen.stroke();
    pen.setLineDash([]);
  }
  trace(pen, used);
  pen.strokeStyle = theme.accent;
  pen.stroke();
}

export function spark(canvas, values, most = 0) {
  const { pen, width, height } = prepare(canvas);
  if (values.length < 2) return;
  const highest = Math.max(most, ...values) || 1;
  const x = (index) => ((index + 120 - values.length) / 119) * (width - 4) + 2;
  const path = values.map((value, index) => [x(index), height - 3 - (value / highest) * (height - 8)]);
  trace(pen, [[path[0][0], height], ...path, [path.at(-1)[0], height]]);
  pen.fillStyle = pen.strokeStyle = theme.accent;
  pen.globalAlpha = 0.12;
  pen.fill();
  pen.globalAlpha = 1;
  pen.lineWidth = 1.5;
  pen.lineJoin = "round";
  trace(pen, path);
  pen.stroke();
}
