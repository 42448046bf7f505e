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
  theme.models = Array.from({ length: 8 }, (_, index) => colour(`model-${index}`));
}

export function onTheme(redraw) {
  read();
  dark.addEventListener("change", () => {
    read();
    redraw();
  });
}
