/** The text, where in its tree it is, and the way there and back. It is kept with every change. */

import { forget, keep, kept, recall } from "../shared/store.js";
import { changeOf, goneOnWith } from "./changes.js";
import { changed, piecesOf, textOf } from "./pieces.js";
import { Tree } from "./tree.js";

const PAUSE = 1200; // milliseconds after which typing on is a step of its own
const STEPS = 500; // that can be undone

export class Manuscript {
  #past = [];
  #future = [];
  #typed = new Set(); // steps of typing since the text was last gone to, which nothing but undo has left
  #typedAt = 0;
  #base = [];

  /** `onChange(what)` is told "text" or "tree". */
  constructor(onChange) {
    this.onChange = onChange;
    this.#recall();
  }

  #recall() {
    const { current = 0, past = [], future = [] } = recall("write", {});
    const nodes = kept("write/")
      .map((name) => recall(name))
      .filter(Boolean);
    this.tree = new Tree(nodes);
    this.#past = past;
    this.#future = future;
    this.#stand(this.tree.node(current) ?? this.tree.node(0));
  }

  /** What a node stands on is worked out only where it changes: that of a long way is long. */
  #stand(node) {
    if (node !== this.current) this.#base = this.#standsOn(node);
    this.current = node;
    this.pieces = changed(this.#base, node);
    this.text = textOf(this.pieces);
  }

  #standsOn(node) {
    if (this.current && node.parent === this.current.id) return this.pieces;
    return piecesOf(this.tree.path(node.id).slice(0, -1));
  }

  get path() {
    return this.tree.path(this.current.id);
  }

  get canUndo() {
    return this.#past.some((id) => this.tree.node(id));
  }

  get canRedo() {
    return this.#future.some((id) => this.tree.node(id));
  }

  /** The text of a node's state. */
  textAt(id) {
    return textOf(piecesOf(this.tree.path(id)));
  }

  /** Takes over what somebody typed. */
  type(now, cursor) {
    const change = changeOf(this.text, now, cursor);
    const longer = this.#mayGoOn() && goneOnWith(this.current, change);
    if (longer) this.#amend(longer);
    else this.#begin(change);
    this.#typedAt = Date.now();
  }

  #begin(change) {
    this.#dropUndone();
    const node = this.tree.add(this.current.id, { ...change, kind: "typed" });
    this.#typed.add(node.id);
    this.#leaveFor(node.id);
  }

  #mayGoOn() {
    const { id, kind } = this.current;
    return id > 0 && kind === "typed" && !this.tree.children(id).length && Date.now() - this.#typedAt < PAUSE;
  }

  #amend(longer) {
    Object.assign(this.current, longer, { cursor: longer.at + longer.text.length });
    this.#stand(this.current);
    this.save(this.current);
    this.onChange("text");
  }

  /** Typing that was undone and then replaced is nobody's branch, if it is all there is: a visit is no typing. */
  #dropUndone() {
    const undone = new Set(this.#future.filter((id) => this.#typed.has(id)));
    for (const id of undone) {
      if (this.tree.node(id) && this.tree.below(id).every((each) => undone.has(each))) this.#remove(id);
      this.#typed.delete(id);
    }
  }

  #remove(id) {
    for (const each of this.tree.remove(id)) forget(`write/${each}`);
  }

  /** Adds a node below `parent`; the text stays where it is. */
  add(parent, change) {
    const node = this.tree.add(parent, change);
    this.save(node);
    this.onChange("tree");
    return node;
  }

  /** Goes to another state; undo leads back. */
  go(id) {
    if (id === this.current.id) return;
    this.#typed.clear();
    this.#leaveFor(id);
  }

  #leaveFor(id) {
    this.#past = [...this.#past.slice(-STEPS), this.current.id];
    this.#future = [];
    this.#arrive(id);
  }

  undo() {
    this.#step(this.#past, this.#future);
  }

  redo() {
    this.#step(this.#future, this.#past);
  }

  #step(from, to) {
    while (from.length && !this.tree.node(from.at(-1))) from.pop();
    if (!from.length) return;
    to.push(this.current.id);
    this.#arrive(from.pop());
  }

  #arrive(id) {
    this.save(this.current);
    this.#typedAt = 0;
    this.#stand(this.tree.node(id));
    this.save(this.current);
    this.#keepPlace();
    this.onChange("tree");
  }

  /** The model wrote on: `text` and `tokens` are all of the node so far. */
  grow(node, { text, tokens }) {
    Object.assign(node, { text, tokens, cursor: node.at + text.length });
    if (node === this.current) this.#stand(node);
    this.onChange(node === this.current ? "text" : "tree");
  }

  /** A node is as it will be. */
  settle(node) {
    this.save(node);
    this.onChange("tree");
  }

  /** What lines of a batch call a node. */
  name(node, name) {
    node.name = name;
    this.save(node);
  }

  /** Where the cursor stands, so that it stands there again. */
  point(cursor) {
    this.current.cursor = cursor;
  }

  throwAway(id) {
    const node = this.tree.node(id);
    if (this.path.includes(node)) this.go(node.parent);
    node.gone = true;
    this.settle(node);
  }

  get thrownAway() {
    return this.tree.nodes.filter((node) => node.gone);
  }

  bringBack() {
    for (const node of this.thrownAway) {
      node.gone = false;
      this.save(node);
    }
    this.onChange("tree");
  }

  /** Drops a node in which nothing came. */
  discard(node) {
    if (node === this.current) this.#leave(node);
    this.#remove(node.id);
    this.onChange("tree");
  }

  #leave(node) {
    this.#past = this.#past.slice(0, -1);
    this.#stand(this.tree.node(node.parent));
    this.#keepPlace();
  }

  /** Puts another tree in this one's place; returns what puts this one back. */
  replace({ tree = new Tree(), current = 0, past = [], future = [] } = {}) {
    const old = { tree: this.tree, current: this.current.id, past: this.#past, future: this.#future };
    for (const name of kept("write/")) forget(name);
    Object.assign(this, { tree, current: null });
    this.#past = past;
    this.#future = future;
    this.#typed.clear();
    this.#stand(tree.node(current));
    this.saveAll();
    this.onChange("tree");
    return old;
  }

  saveAll() {
    for (const node of this.tree.nodes) this.save(node);
    this.#keepPlace();
  }

  /** Keeps a node as it is now. */
  save(node) {
    keep(`write/${node.id}`, node);
  }

  #keepPlace() {
    keep("write", { current: this.current.id, past: this.#past, future: this.#future });
  }
}
