/** The turns as they are drawn: one whose looks stay is left alone, and with it what is written or focused in it. */

import { textOf } from "./conversation.js";
import { turnElement } from "./turns.js";

export class Talk {
  #drawn = []; // {turn, looks, element}, in their order

  constructor(place, acts) {
    Object.assign(this, { place, acts });
  }

  /** Shows turns; `anew` is one that is drawn again in any case. */
  show(turns, anew = null) {
    for (const [index, turn] of turns.entries()) this.#at(index, turn, { isLast: turn === turns.at(-1), anew });
    for (const { element } of this.#drawn.splice(turns.length)) element.remove();
  }

  #at(index, turn, { isLast, anew }) {
    const old = this.#drawn[index];
    const looks = looksOf(turn, isLast);
    const stays = old?.turn === turn && turn !== anew && old.looks === looks;
    if (!stays) this.#draw(index, { turn, looks, element: turnElement(turn, this.acts, isLast) });
    else if (turn.coming) old.element.querySelector(".said").textContent = textOf(turn);
  }

  #draw(index, drawn) {
    const old = this.#drawn[index];
    this.#drawn[index] = drawn;
    if (!old) return void this.place.append(drawn.element);
    const had = old.element.contains(document.activeElement) ? document.activeElement : null;
    old.element.replaceWith(drawn.element);
    if (had) focusLike(had, drawn.element);
  }
}

/** All that a turn's looks depend on; of one that is coming only the words change. */
function looksOf(turn, isLast) {
  const { versions, shown, coming, role } = turn;
  return JSON.stringify(coming ? [true, shown] : [versions.length, shown, textOf(turn), isLast && role !== "user"]);
}

/** The focus stays with the button that had it, or the one beside. */
function focusLike(had, element) {
  const buttons = [...element.querySelectorAll("button:enabled")];
  const same = buttons.find(({ textContent }) => textContent === had.textContent);
  const arrow = had.ariaLabel && had.matches("button") && buttons.find(({ ariaLabel }) => ariaLabel);
  (same ?? (arrow || buttons.at(-1)) ?? element).focus();
}
