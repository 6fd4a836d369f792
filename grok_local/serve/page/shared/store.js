/** What the browser keeps between visits; where it keeps nothing, the page works on without. */

import { announceFull } from "./notices.js";

const PREFIX = "grok-local:";

export function recall(name, otherwise = null) {
  try {
    return read(localStorage.getItem(PREFIX + name)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

const read = (text) => (text === null ? null : JSON.parse(text));

/** Tells `told(name, value)` what another window keeps under names that begin with `start`; null is what it forgot. */
export function hear(start, told) {
  addEventListener("storage", ({ key, newValue, storageArea }) => {
    if (storageArea === localStorage && key?.startsWith(PREFIX + start)) told(key.slice(PREFIX.length), read(newValue));
  });
}

export function keep(name, value) {
  try {
    localStorage.setItem(PREFIX + name, JSON.stringify(value));
  } catch {
    announceFull();
  }
}

export function forget(name) {
  try {
    localStorage.removeItem(PREFIX + name);
  } catch {
    // Nothing is kept here, so there is nothing to forget.
  }
}

/** The names under which something is kept that begin with `start`. */
export function kept(start) {
  try {
    return Object.keys(localStorage)
      .filter((name) => name.startsWith(PREFIX + start))
      .map((name) => name.slice(PREFIX.length));
  } catch {
    return [];
  }
}
