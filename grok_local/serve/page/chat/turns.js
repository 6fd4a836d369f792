/** How turns look: who, what, and what can be done with it. */

import { copy, make } from "../shared/dom.js";
import { textOf } from "./conversation.js";

/** The element of a turn. `acts` has edit, again and show; `isLast` says whether another answer can be asked for. */
export function turnElement(turn, acts, isLast) {
  const who = turn.role === "user" ? "You" : "Model";
  const text = make("p", { class: "said" }, textOf(turn));
  const buttons = turn.role === "user" ? userButtons(turn, acts) : modelButtons(turn, acts, isLast);
  const foot = make("footer", {}, ...(turn.coming ? [] : buttons));
  const how = { class: `turn ${turn.role} ${turn.coming ? "coming" : ""}`, "aria-label": who, tabIndex: -1 };
  return make("article", how, make("h3", {}, who), text, foot);
}

const button = (label, onclick, more = {}) => make("button", { class: "quiet", onclick, ...more }, label);

function userButtons(turn, acts) {
  return [button("Edit", (event) => edit(turn, acts, event.target.closest(".turn")))];
}

function modelButtons(turn, acts, isLast) {
  const copying = button("Copy", (event) => copied(turn, event.target));
  const again = button("Another answer", () => acts.again());
  return [...versionButtons(turn, acts), copying, ...(isLast ? [again] : [])];
}

function versionButtons(turn, { show }) {
  const { versions, shown } = turn;
  if (versions.length < 2) return [];
  const back = button("‹", () => show(turn, shown - 1), { disabled: shown === 0, "aria-label": "The answer before" });
  const on = button("›", () => show(turn, shown + 1), {
    disabled: shown === versions.length - 1,
    "aria-label": "The next answer",
  });
  return [back, make("span", { class: "version" }, `${shown + 1} of ${versions.length}`), on];
}

async function copied(turn, target) {
  target.textContent = (await copy(textOf(turn))) ? "Copied" : "The browser does not let it be copied";
}

/** A turn becomes a field, and then another turn or itself again. */
function edit(turn, { sayInstead, redraw }, element) {
  const area = make("textarea", { class: "field-text", value: textOf(turn), "aria-label": "Your message" });
  const send = button("Send again", () => sayInstead(turn, area.value), { class: "" });
  const cancel = button("Cancel", () => redraw(turn));
  area.addEventListener("keydown", (event) => {
    if (event.key === "Escape") redraw(turn);
    else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) sayInstead(turn, area.value);
    else return;
    event.preventDefault();
    event.stopPropagation();
  });
  element.querySelector(".said").replaceWith(area);
  element.querySelector("footer").replaceChildren(send, cancel);
  area.focus();
}
