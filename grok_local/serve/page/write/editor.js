/**
 * The text under the cursor: a plain text area, and behind it a mirror that has the same text in colours.
 *
 * The area is what is written in, so that everything an input can do works: other scripts, dictation, a phone's
 * keyboard. The mirror gives it its height.
 */

import { make } from "../shared/dom.js";

export class Editor {
  #runs = [];

  constructor(area, mirror) {
    this.area = area;
    this.mirror = mirror;
    this.end = make("span", {}, "\u200b"); // a last empty line has a height too
    this.picked = make("div", { class: "picked" });
    mirror.append(this.end);
  }

  get cursor() {
    return this.area.selectionEnd;
  }

  get isSelecting() {
    return this.area.selectionStart !== this.area.selectionEnd;
  }

  /** Shows a text and its runs. The cursor stays unless a place is given. */
  show(text, runs, cursor = null) {
    replaceValue(this.area, text);
    if (cursor !== null) this.area.setSelectionRange(cursor, cursor);
    this.colour(runs);
  }

  /** Takes over new runs, touching only those that differ. */
  colour(runs) {
    const [from, tail] = alike(this.#runs, runs);
    const old = [...this.mirror.childNodes].slice(from, this.#runs.length - tail);
    const next = this.mirror.childNodes[this.#runs.length - tail];
    for (const node of old) node.remove();
    for (const run of runs.slice(from, runs.length - tail)) this.mirror.insertBefore(spanOf(run), next);
    this.#runs = runs;
  }

  /** Where a part of the text is on the screen: a rectangle for each line. */
  placesOf(start, end) {
    const range = document.createRange();
    range.setStart(...this.#point(start));
    range.setEnd(...this.#point(end));
    return [...range.getClientRects()];
  }

  #point(offset) {
    for (const [index, { text }] of this.#runs.entries()) {
      if (offset <= text.length) return [this.mirror.childNodes[index].firstChild, offset];
      offset -= text.length;
    }
    return [this.end.firstChild, 0];
  }

  /** Marks a part of the text, or nothing. */
  pick(token) {
    this.picked.remove();
    if (!token) return;
    const at = this.mirror.getBoundingClientRect();
    const boxes = this.placesOf(token.start, token.end).map((place) => boxAt(place, at));
    this.picked.replaceChildren(...boxes);
    this.mirror.parentElement.append(this.picked);
  }

  /** Brings the cursor's line into view, if it is `below` the bottom of what is seen. */
  follow(offset, below) {
    const place = this.placesOf(offset, offset)[0] ?? this.end.getBoundingClientRect();
    const over = place.bottom - below;
    if (over > 0) window.scrollBy({ top: over + 24 });
  }
}

/** How many runs are the same at the start, and how many at the end. */
function alike(before, now) {
  const most = Math.min(before.length, now.length);
  let start = 0;
  while (start < most && isSame(before[start], now[start])) start++;
  let end = 0;
  while (end < most - start && isSame(before.at(-1 - end), now.at(-1 - end))) end++;
  return [start, end];
}

const isSame = (one, other) => one.band === other.band && one.text === other.text;

export const spanOf = ({ band, text }) => make("span", band ? { class: band } : {}, text);

function boxAt(place, origin) {
  const box = make("div");
  const sizes = {
    left: place.left - origin.left,
    top: place.top - origin.top,
    width: place.width,
    height: place.height,
  };
  for (const [name, value] of Object.entries(sizes)) box.style[name] = `${value}px`;
  return box;
}

/** Changes what differs only: that keeps the cursor, and is quick. */
function replaceValue(area, text) {
  const old = area.value;
  if (old === text) return;
  const most = Math.min(old.length, text.length);
  let start = 0;
  while (start < most && old.charCodeAt(start) === text.charCodeAt(start)) start++;
  let end = 0;
  while (end < most - start && old.charCodeAt(old.length - 1 - end) === text.charCodeAt(text.length - 1 - end)) end++;
  area.setRangeText(text.slice(start, text.length - end), start, old.length - end, "preserve");
}

const BANDS = [0.9, 0.6, 0.3, 0.1]; // probabilities down to which a token is of the first, second, ... band

/** The class of a token's colour. */
export function bandOf(logprob) {
  const found = BANDS.findIndex((least) => Math.exp(logprob) >= least);
  return `band${found < 0 ? BANDS.length : found}`;
}
