/** The text, where in its tree it is, and the way there and back. It is kept with every change. */

import { changeOf, goneOnWith } from "./changes.js";
import { changed, piecesOf, textOf } from "./pieces.js";
import { Shelf } from "./shelf.js";
import { Tree } from "./tree.js";

const PAUSE = 1200; // milliseconds after which typing on is a step of its own
const STEPS = 500; // that can be undone

export class Manuscript {
  #past = [];
  #future = [];
  #typed = new Set(); // steps of typing since the text was last gone to, which nothing but undo has left
  #made = new Set(); // ids of what came in this window, whose text no other changes
  #growing = new Set(); // nodes the model writes on now
  #waiting = []; // nodes from other windows whose parents are still to come
  #isPlaced = true;
  #typedAt = 0;
  #base = [];

  /** `onChange(what)` is told "text" or "tree", `onOther(old)` that another window put another text in this one's place. */
  constructor(onChange, onOther = () => {}) {
    Object.assign(this, { onChange, onOther });
    this.shelf = new Shelf({
      onNode: (id, node) => this.#heard(id, node),
      onText: () => this.#follow(),
      onPlace: (place) => this.#place(place),
    });
    const { current = 0, past = [], future = [] } = this.shelf.place;
    this.#put({ tree: new Tree(this.shelf.nodes), current, past, future });
  }

  #put({ tree = new Tree(), current = 0, past = [], future = [] }) {
    Object.assign(this, { tree, current: null });
    this.#past = past;
    this.#future = future;
    this.#typed.clear();
    this.#typedAt = 0;
    this.#waiting = [];
    this.#stand(tree.node(current) ?? tree.node(0));
  }

  // -- other windows -----------------------------------------------------------------------------------------------

  #heard(id, node) {
    if (id === 0) return;
    const own = this.tree.node(id);
    if (node) this.#take(node);
    else if (own) this.#lose(own);
    this.#standAnew();
    this.onChange("tree");
  }

  #take(node) {
    const own = this.tree.node(node.id);
    if (own) this.#takeOver(own, node);
    else this.#takeIn(node);
  }

  #takeOver(own, { cursor, ...node }) {
    const isMade = this.#made.has(own.id);
    const { gone, names } = node;
    const isStale = isMade && node.text.length < own.text.length;
    Object.assign(own, isMade ? { gone, names } : node, own === this.current ? {} : { cursor });
    if (isStale) this.save(own);
  }

  #takeIn(node) {
    const parent = this.tree.node(node.parent);
    if (this.#growing.has(parent)) this.#part(parent);
    if (!this.tree.put(node)) return void this.#waiting.push(node);
    const ready = this.#waiting.filter(({ parent: id }) => id === node.id);
    this.#waiting = this.#waiting.filter(({ parent: id }) => id !== node.id);
    return ready.forEach((each) => this.#take(each));
  }

  /** Another window goes on from what it knows of a node that grows here: that stays, and this grows beside it. */
  #part(node) {
    this.tree.part(node, this.shelf.node(node.id) ?? { ...node });
    this.#made.add(node.id);
    this.save(node);
    this.#keepPlace();
  }

  /** What is needed here comes back there. */
  #lose(own) {
    const isNeeded = this.tree.below(own.id).length > 1 || (own === this.current && own.text);
    if (isNeeded || this.#growing.has(own)) return this.save(own);
    if (own === this.current) this.#leave(own);
    return this.tree.remove(own.id);
  }

  #follow() {
    const { old } = this;
    this.#put({});
    this.#isPlaced = false;
    this.onChange("tree");
    this.onOther(old);
  }

  /** The place that comes with another text is this window's too, until something is done here. */
  #place({ current = 0 }) {
    if (!this.#isPlaced) this.#put({ tree: this.tree, current });
    this.#isPlaced = true;
    this.onChange("tree");
  }

  #standAnew() {
    const { current } = this;
    this.current = null;
    this.#stand(current);
  }

  // -- where it stands ---------------------------------------------------------------------------------------------

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
    const node = this.#make(this.current.id, { ...change, kind: "typed" });
    this.#typed.add(node.id);
    this.#leaveFor(node.id);
  }

  #mayGoOn() {
    const { id, kind } = this.current;
    return this.#made.has(id) && kind === "typed" && !this.tree.children(id).length && Date.now() - this.#typedAt < PAUSE;
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
    for (const each of this.tree.remove(id)) this.shelf.forget(each);
  }

  /** Adds a node below `parent`; the text stays where it is. */
  add(parent, change) {
    const node = this.#make(parent, change);
    this.onChange("tree");
    return node;
  }

  #make(parent, change) {
    const node = this.tree.add(parent, change);
    this.#made.add(node.id);
    this.save(node);
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
    this.keepCursor();
    this.#typedAt = 0;
    this.#stand(this.tree.node(id));
    this.#isPlaced = true;
    this.#keepPlace();
    this.onChange("tree");
  }

  /** The model wrote on: `text` and `tokens` are all of the node so far. */
  grow(node, { text, tokens }) {
    this.#growing.add(node);
    Object.assign(node, { text, tokens, cursor: node.at + text.length });
    if (node === this.current) this.#stand(node);
    this.onChange(node === this.current ? "text" : "tree");
  }

  /** A node is as it will be. */
  settle(node) {
    this.#growing.delete(node);
    this.save(node);
    this.onChange("tree");
  }

  /** What lines of a batch call a node: the first name is what it is exported as. */
  name(node, name) {
    const { names = [] } = node;
    if (names.includes(name)) return;
    node.names = [...names, name];
    this.shelf.amend(node.id, { names: node.names });
  }

  /** Where the cursor stands, so that it stands there again. */
  point(cursor) {
    this.current.cursor = cursor;
  }

  keepCursor() {
    this.shelf.amend(this.current.id, { cursor: this.current.cursor });
  }

  throwAway(id) {
    const node = this.tree.node(id);
    if (this.path.includes(node)) this.go(node.parent);
    this.#mark(node, true);
    this.onChange("tree");
  }

  #mark(node, gone) {
    node.gone = gone;
    this.shelf.amend(node.id, { gone });
  }

  get thrownAway() {
    return this.tree.nodes.filter((node) => node.gone);
  }

  bringBack() {
    for (const node of this.thrownAway) this.#mark(node, false);
    this.onChange("tree");
  }

  /** Drops a node in which nothing came. */
  discard(node) {
    this.#growing.delete(node);
    if (node === this.current) this.#leave(node);
    this.#remove(node.id);
    this.onChange("tree");
  }

  #leave(node) {
    this.#past = this.#past.slice(0, -1);
    this.#stand(this.tree.node(node.parent));
    this.#keepPlace();
  }

  get old() {
    return { tree: this.tree, current: this.current.id, past: this.#past, future: this.#future };
  }

  /** Puts another tree in this one's place; returns what puts this one back. */
  replace(other = {}) {
    const { old } = this;
    this.shelf.clear();
    this.#put(other);
    for (const node of this.tree.nodes) if (node.id) this.save(node);
    this.#keepPlace();
    this.onChange("tree");
    return old;
  }

  /** Keeps a node as it is now, if it is still this text's. */
  save(node) {
    if (this.tree.node(node.id) === node) this.shelf.keep(node);
  }

  #keepPlace() {
    this.shelf.place = { current: this.current.id, past: this.#past, future: this.#future };
  }
}
