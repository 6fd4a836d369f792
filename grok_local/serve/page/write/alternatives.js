/** Several continuations side by side, each to be taken or thrown away. */

import { arrowsMove, byId, make } from "../shared/dom.js";
import { bandOf, spanOf } from "./editor.js";
import { runsOf } from "./pieces.js";

export class Alternatives {
  #cards = new Map(); // by node

  constructor({ onTake, onThrowAway, onClose }) {
    Object.assign(this, { onTake, onThrowAway, place: byId("alternatives"), row: byId("cards") });
    byId("alternatives-close").addEventListener("click", onClose);
    this.row.addEventListener("keydown", (event) => this.#key(event));
    arrowsMove(this.row, () => [...this.row.children], ["ArrowLeft", "ArrowRight"]);
  }

  get isOpen() {
    return !this.place.hidden;
  }

  get nodes() {
    return [...this.#cards.keys()];
  }

  open(nodes) {
    this.#cards = new Map(nodes.map((node, index) => [node, this.#card(node, index)]));
    this.row.replaceChildren(...this.#cards.values());
    this.place.hidden = false;
    for (const node of nodes) this.update(node);
  }

  #card(node, index) {
    const take = make("button", { class: "take", onclick: () => this.onTake(node) }, "Take");
    const away = make("button", { class: "quiet", onclick: () => this.onThrowAway(node) }, "Throw away");
    const name = make("h3", {}, String(index + 1));
    const text = make("p", { class: "continuation" });
    const label = `Alternative ${index + 1}`;
    const head = make("header", {}, name, take, away);
    return make("article", { class: "card", tabIndex: 0, "aria-label": label }, head, text);
  }

  #key(event) {
    const node = this.nodes.find((each) => this.#cards.get(each) === event.target);
    if (!node) return;
    if (event.key === "Enter" && !event.ctrlKey && !event.metaKey) this.onTake(node);
    else if (event.key === "Delete" || event.key === "Backspace") this.onThrowAway(node);
    else return;
    event.preventDefault();
  }

  /** Takes a card away; the focus goes to its neighbour. */
  drop(node) {
    const card = this.#cards.get(node);
    if (!card) return;
    const neighbour = card.nextElementSibling ?? card.previousElementSibling;
    const hadFocus = card.contains(document.activeElement);
    this.#cards.delete(node);
    card.remove();
    if (!neighbour) this.close();
    else if (hadFocus) neighbour.focus();
  }

  /** A node has more text, or has ended. */
  update(node) {
    const card = this.#cards.get(node);
    if (!card) return;
    const runs = runsOf([{ node, from: 0, length: node.text.length }], bandOf);
    card.querySelector(".continuation").replaceChildren(...runs.map(spanOf));
    card.classList.toggle("ended", Boolean(node.end));
  }

  close() {
    this.#cards.clear();
    this.row.replaceChildren();
    this.place.hidden = true;
  }
}
