/**
 * All that became of a text: a tree of its states.
 *
 * A node is a change of its parent's text: at `at`, `cut` characters go and `text` comes. `kind` says whose it is:
 * "typed" or "written" (by the model, with `tokens`: [start in the text, log-probability, [[rival, its
 * log-probability]]], and `end`, why there are no more). `cursor` is where writing goes on, `gone` that it was thrown
 * away.
 */

const ROOT = { id: 0, parent: null, at: 0, cut: 0, text: "", kind: "typed", cursor: 0 };

export class Tree {
  #nodes = new Map();
  #children = new Map();
  #last = 0;

  /** `nodes` come in any order; those whose parents are missing are left out. */
  constructor(nodes = []) {
    for (const node of [ROOT, ...nodes].sort((one, other) => one.id - other.id)) this.put({ ...node });
  }

  get nodes() {
    return [...this.#nodes.values()];
  }

  node(id) {
    return this.#nodes.get(id);
  }

  /** The children that were not thrown away, oldest first. */
  children(id) {
    return (this.#children.get(id) ?? []).map((child) => this.node(child)).filter((node) => !node.gone);
  }

  /** Whether neither a node nor one that it came of was thrown away. */
  isShown(id) {
    return this.path(id).every(({ gone }) => !gone);
  }

  /** From the root to a node. */
  path(id) {
    const found = [];
    for (let node = this.node(id); node; node = this.node(node.parent)) found.push(node);
    return found.reverse();
  }

  /** `given` is how much of the text the model did not write: a rival that was chosen, and what was before it. */
  add(parent, { at, cut = 0, text = "", kind, tokens = null, given = 0 }) {
    return this.put({ id: this.#newId(), parent, at, cut, text, kind, tokens, given, cursor: at + text.length });
  }

  /** Lets a node go on under another id; its old one, and what came of that, is `known`'s, the node as it was. */
  part(node, known) {
    const { id } = node;
    node.id = this.#newId();
    this.#nodes.set(id, known);
    this.put(node);
  }

  /** By the time, so that another window's nodes have other ids, and children's are larger than their parents'. */
  #newId() {
    return Math.max(this.#last + 1, Date.now() * 1000 + Math.floor(Math.random() * 1000));
  }

  /** The ids of a node and of all that came of it, thrown away or not. */
  below(id) {
    const found = [id];
    for (const each of found) found.push(...(this.#children.get(each) ?? []));
    return found;
  }

  /** Takes a node and all that came of it out, for good; returns their ids. */
  remove(id) {
    const removed = this.below(id);
    const siblings = this.#children.get(this.node(id).parent);
    siblings.splice(siblings.indexOf(id), 1);
    for (const each of removed) {
      this.#nodes.delete(each);
      this.#children.delete(each);
    }
    return removed;
  }

  /** Puts a node where its parent is; returns null where that is missing. */
  put(node) {
    if (node.parent !== null && !this.node(node.parent)) return null;
    this.#nodes.set(node.id, node);
    if (node.parent !== null) this.#children.set(node.parent, [...(this.#children.get(node.parent) ?? []), node.id]);
    this.#last = Math.max(this.#last, node.id);
    return node;
  }
}
