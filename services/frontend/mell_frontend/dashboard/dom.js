// The few things done to the document: always by text and properties, never by markup.

export const byId = (id) => document.getElementById(id);

export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  const { data, ...rest } = properties;
  Object.assign(element, rest);
  Object.assign(element.dataset, data);
  element.append(...children);
  return element;
}

// Brings the children of a list in step with items: those that stay are kept, so that focus is too.
export function keep(list, shown, items, keyOf, create, update) {
  const keys = new Set(items.map(keyOf));
  for (const [key, entry] of shown) {
    if (keys.has(key)) continue;
    entry.root.remove();
    shown.delete(key);
  }
  let before = list.firstElementChild;
  for (const item of items) {
    const key = keyOf(item);
    let entry = shown.get(key);
    if (!entry) shown.set(key, (entry = create(item)));
    update(entry, item);
    if (entry.root === before) before = before.nextElementSibling;
    else list.insertBefore(entry.root, before);
  }
}

export function toast(message, bad = false) {
  const element = make("p", { className: bad ? "toast bad" : "toast", textContent: message });
  const toasts = byId("toasts");
  toasts.append(element);
  while (toasts.children.length > 3) toasts.firstElementChild.remove();
  setTimeout(() => element.remove(), bad ? 9_000 : 5_000);
}
