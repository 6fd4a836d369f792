/** What the browser keeps of the text: a node under each name, and where one stood. Other windows change it too. */

import { forget, hear, keep, kept, recall } from "../shared/store.js";

const nameOf = (id) => `write/${id}`;

export class Shelf {
  /** Of other windows: `onNode(id, node)`, null for one that is gone, `onText()` before another text comes, `onPlace`. */
  constructor({ onNode, onText, onPlace }) {
    hear("write", (name, value) => {
      if (name === "write-text") onText();
      else if (name === "write") onPlace(value ?? {});
      else if (name.startsWith(nameOf(""))) onNode(Number(name.slice(nameOf("").length)), value);
    });
  }

  get nodes() {
    return kept(nameOf(""))
      .map((name) => recall(name))
      .filter(Boolean);
  }

  get place() {
    return recall("write", {});
  }

  set place(place) {
    keep("write", place);
  }

  /** A node as all windows know it. */
  node(id) {
    return recall(nameOf(id));
  }

  keep(node) {
    keep(nameOf(node.id), node);
  }

  /** Keeps a change alone: the node may be another window's, and longer there. */
  amend(id, change) {
    const known = this.node(id);
    if (known && Object.keys(change).some((name) => known[name] !== change[name])) this.keep({ ...known, ...change });
  }

  forget(id) {
    forget(nameOf(id));
  }

  /** Forgets the text, in every window. */
  clear() {
    keep("write-text", `${Date.now()} ${Math.random()}`);
    for (const name of kept(nameOf(""))) forget(name);
  }
}
