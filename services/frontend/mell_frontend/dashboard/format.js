// Figures as people read them. Pure.

export function count(value) {
  return Math.round(value).toLocaleString("en-US");
}

export function percent(share) {
  return `${Math.round(100 * share)}%`;
}

export function span(seconds) {
  if (seconds > 0 && seconds < 0.001) return "<1 ms";
  if (seconds < 0.9995) return `${Math.round(1000 * seconds)} ms`;
  if (seconds < 120) return `${seconds.toFixed(1)} s`;
  if (seconds < 7200) return `${Math.round(seconds / 60)} min`;
  return `${(seconds / 3600).toFixed(1)} h`;
}

export function bytes(amount) {
  let left = amount;
  for (const unit of ["B", "KiB", "MiB"]) {
    if (left < 1024) return `${Math.round(left)} ${unit}`;
    left /= 1024;
  }
  return `${left.toFixed(1)} GiB`;
}

export function gpuHours(seconds) {
  return seconds >= 360 ? `${(seconds / 3600).toFixed(2)} GPU-hours` : `${Math.round(seconds)} GPU-seconds`;
}

// chatcmpl-4f2a19bd77.0.0 -> 4f2a19bd77.0.0: what tells requests apart.
export function short(sequence) {
  const name = sequence.replace(/^(chat)?cmpl-/, "");
  return name.length > 22 ? `${name.slice(0, 10)}…${name.slice(-8)}` : name;
}

export function plural(number, word) {
  return `${count(number)} ${word}${number === 1 ? "" : "s"}`;
}
