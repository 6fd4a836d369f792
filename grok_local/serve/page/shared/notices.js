/** Sentences about what happened, where they are looked for. */

import { byId, make } from "./dom.js";

/** A notice at the top of the page, until it is closed or another comes; `help` is a button: {label, onclick}. */
export function notify(sentence, help = null) {
  const place = byId("notice");
  const close = make("button", { class: "quiet", onclick: () => place.replaceChildren() }, "Close");
  const button = help && make("button", { onclick: () => (place.replaceChildren(), help.onclick()) }, help.label);
  place.replaceChildren(make("p", {}, sentence), ...(button ? [button] : []), close);
}

let said = false;

/** The browser keeps no more: said once a visit. */
export function announceFull() {
  if (said) return;
  said = true;
  notify(
    "The browser's store is full: what comes now is lost when the page is closed. Export the tree, begin a new text.",
  );
}
