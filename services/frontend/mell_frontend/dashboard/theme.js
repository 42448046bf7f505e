// The stylesheet's colours for canvases, read again when the system changes between light and dark.

export const theme = {};
export const stillness = matchMedia("(prefers-reduced-motion: reduce)");

const dark = matchMedia("(prefers-color-scheme: dark)");

function read() {
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(`--${name}`).trim();
  for (const name of ["page", "card", "text", "muted", "accent", "good", "warn", "bad", "other", "track"]) {
    theme[name] = colour(name);
  }
  theme.goodSoft = colour("good-soft");
  // A hue for each model, and its tones for the classes of sizes: the larger, the nearer to that of text.
  theme.models = Array.from({ length: 8 }, (_, index) => {
    const hue = colour(`model-${index}`);
    return { T: hue, S: mix(hue, theme.text, 0.2), M: mix(hue, theme.text, 0.4), L: mix(hue, theme.text, 0.6) };
  });
}

// Two colours as #rgb or #rrggbb, and how much of the second one.
function mix(one, other, part) {
  const [from, to] = [one, other].map((colour) => {
    const digits = colour.length === 4 ? colour.replace(/[^#]/g, "$&$&") : colour;
    return [1, 3, 5].map((at) => parseInt(digits.slice(at, at + 2), 16));
  });
  return `rgb(${from.map((value, index) => Math.round(value + (to[index] - value) * part)).join(" ")})`;
}

export function onTheme(redraw) {
  read();
  dark.addEventListener("change", () => {
    read();
    redraw();
  });
}
