/** What else could have come in a word's place, to choose from. */

import { arrowsMove, byId, make } from "../shared/dom.js";
import { percent } from "../shared/words.js";
import { rivalsOf } from "./changes.js";
import { isText } from "./completion.js";

export class Rivals {
  /** `onChoose(token, text, logprob)`; `onClose()` when the list goes, for whatever reason. */
  constructor({ onChoose, onClose }) {
    Object.assign(this, { onChoose, onClose, box: byId("rivals"), list: byId("rivals-list") });
    arrowsMove(this.box, () => [...this.list.querySelectorAll("button:enabled")]);
    document.addEventListener("pointerdown", (event) => {
      if (this.isOpen && !this.box.contains(event.target) && event.target.id !== "text") this.close();
    });
  }

  get isOpen() {
    return !this.box.hidden;
  }

  /** Opens below `place`, a rectangle on the screen. */
  open(token, place) {
    this.list.replaceChildren(...rivalsOf(token).map((rival) => this.#entry(token, rival)));
    this.box.hidden = false;
    const origin = this.box.offsetParent.getBoundingClientRect();
    const left = Math.min(place.left - origin.left, origin.width - this.box.offsetWidth);
    this.box.style.left = `${Math.max(left, 0)}px`;
    this.box.style.top = `${place.bottom - origin.top + 6}px`;
  }

  #entry(token, { text, logprob, chosen }) {
    const share = Math.exp(logprob);
    const word = make("span", { class: "word" }, shown(text));
    const bar = make("span", { class: "bar" });
    bar.style.setProperty("--share", share);
    const how = {
      type: "button",
      disabled: !isText(text),
      onclick: () => this.#choose(token, { text, logprob, chosen }),
    };
    const label = `${spoken(text)}, ${percent(share)}${chosen ? ", taken" : ""}`;
    const button = make(
      "button",
      { ...how, "aria-label": label, class: chosen ? "chosen" : "" },
      word,
      bar,
      percent(share),
    );
    return make("li", {}, button);
  }

  #choose(token, { text, logprob, chosen }) {
    this.close();
    if (!chosen) this.onChoose(token, text, logprob);
  }

  focus() {
    this.list.querySelector("button.chosen").focus();
  }

  close() {
    if (!this.isOpen) return;
    this.box.hidden = true;
    this.onClose();
  }
}

/** A word with its blanks to be seen. */
const shown = (text) =>
  isText(text) ? text.replace(/ /g, "·").replace(/\n/g, "↵").replace(/\t/g, "⇥") : unwritten(text);

const unwritten = (token) => (token.startsWith("bytes:") ? "(part of a sign)" : "(the end)");

const spoken = (text) => (isText(text) ? text.trim() : unwritten(text)) || (text.includes("\n") ? "new line" : "blank");
