/** The first tab: a text that the model continues at the cursor. */

import { byId, everyPicture } from "../shared/dom.js";
import { counted } from "../shared/words.js";
import { Work } from "../shared/work.js";
import { Alternatives } from "./alternatives.js";
import { Branches } from "./branches.js";
import { forkAt, rivalsOf } from "./changes.js";
import { Choices } from "./choices.js";
import { bandOf, Editor } from "./editor.js";
import { Files } from "./files.js";
import { Manuscript } from "./manuscript.js";
import { runsOf, tokenAt } from "./pieces.js";
import { Rivals } from "./rivals.js";
import { Writing } from "./writing.js";

export class Write {
  constructor() {
    this.manuscript = new Manuscript(
      (what) => this.#changed(what),
      (old) => this.#replaced(old),
    );
    this.editor = new Editor(byId("text"), byId("mirror"));
    this.dock = byId("write-dock");
    this.work = new Work(this.dock, "Shorten what stands before the cursor, or ask for fewer tokens.");
    this.choices = new Choices();
    this.writing = new Writing(this.manuscript, this.work, {
      onGrow: (node) => this.alternatives.update(node),
      onRetry: () => this.continue(),
    });
    this.rivals = new Rivals({ onChoose: (...rival) => this.#branch(...rival), onClose: () => this.editor.pick(null) });
    this.alternatives = new Alternatives({
      onTake: (node) => this.#take(node),
      onThrowAway: (node) => this.#throwAway(node.id),
      onClose: () => this.#closeAlternatives(),
    });
    this.branches = new Branches(this.manuscript, {
      onGo: (id) => this.#go(id),
      onThrowAway: (id) => this.#throwAway(id),
    });
    this.files = new Files(this.manuscript, this.work, {
      body: () => this.choices.body,
      move: (act) => this.#move(act),
    });
    this.show = everyPicture(() => this.#show());
    this.#listen();
    this.#stand();
  }

  #listen() {
    const { area } = this.editor;
    area.addEventListener("input", () => this.#typed());
    area.addEventListener("beforeinput", (event) => this.#undoAsked(event));
    area.addEventListener("click", (event) => this.#openRivals(event));
    document.addEventListener("selectionchange", () => this.#pointed());
    window.addEventListener("pagehide", () => this.#saveNow());
    const acts = { continue: "continue", again: "again", undo: "undo", redo: "redo", others: "askForRivals" };
    for (const [id, act] of Object.entries(acts)) byId(id).addEventListener("click", () => this[act]());
    new ResizeObserver(() => this.rivals.close()).observe(area);
  }

  /** The page may be closed while the model writes. */
  #saveNow() {
    for (const node of this.writing.nodes) this.manuscript.save(node);
    this.manuscript.keepCursor();
  }

  /** In another window a new text was begun, or an old one brought back. */
  async #replaced(old) {
    await this.#move(() => {});
    this.files.offer("Another window has put another text here.", old);
  }

  // -- what is shown -----------------------------------------------------------------------------------------------

  #changed(what) {
    this.show?.();
    if (what === "tree") this.branches?.update();
  }

  #show() {
    const { manuscript, editor } = this;
    editor.show(manuscript.text, runsOf(manuscript.pieces, bandOf));
    if (this.writing.nodes.includes(manuscript.current)) editor.follow(manuscript.current.cursor, this.#bottom);
    this.#enable();
    byId("words").textContent = wordsOf(manuscript.text);
  }

  get #bottom() {
    return this.dock.getBoundingClientRect().top;
  }

  #enable() {
    const { manuscript } = this;
    byId("undo").disabled = !manuscript.canUndo;
    byId("redo").disabled = !manuscript.canRedo;
    byId("again").disabled = manuscript.current.kind !== "written";
    this.editor.area.readOnly = this.work.running;
  }

  /** Shows where the manuscript stands now, with the cursor where it stood there. */
  #stand() {
    this.rivals.close();
    const { manuscript, editor } = this;
    const cursor = Math.min(manuscript.current.cursor, manuscript.text.length);
    editor.show(manuscript.text, runsOf(manuscript.pieces, bandOf), cursor);
    this.show();
    this.branches.update();
  }

  // -- typing and moving -------------------------------------------------------------------------------------------

  #typed() {
    this.rivals.close();
    this.#closeAlternatives();
    this.manuscript.type(this.editor.area.value, this.editor.cursor);
    this.#show();
  }

  /** The browser's own undo knows nothing of branches. */
  #undoAsked(event) {
    const act = { historyUndo: "undo", historyRedo: "redo" }[event.inputType];
    if (!act) return;
    event.preventDefault();
    this[act]();
  }

  #pointed() {
    if (document.activeElement === this.editor.area && !this.work.running) this.manuscript.point(this.editor.cursor);
  }

  undo() {
    return this.#move(() => this.manuscript.undo());
  }

  redo() {
    return this.#move(() => this.manuscript.redo());
  }

  #go(id) {
    return this.#move(() => this.manuscript.go(id));
  }

  /** To the branch before (-1) or after (1) this one, where the text last parted. */
  async sibling(by) {
    const { tree, path } = this.manuscript;
    const node = path.findLast(({ id, parent }) => id && tree.children(parent).length > 1);
    if (!node) return;
    const all = tree.children(node.parent);
    await this.#go(all[(all.indexOf(node) + by + all.length) % all.length].id);
  }

  /** What moves the text stops the writing first. */
  async #move(act) {
    await this.writing.stop();
    this.alternatives.close();
    const done = act();
    this.#stand();
    return done;
  }

  // -- the model writes --------------------------------------------------------------------------------------------

  /** Continues the text at the cursor: in it, or as alternatives beside. */
  async continue() {
    const { manuscript, editor } = this;
    if (this.work.running || !this.#mayAsk(editor.area.value.slice(0, editor.cursor))) return;
    this.rivals.close();
    await this.#continueFrom(manuscript.current.id, { at: editor.cursor, kind: "written", tokens: [] });
  }

  #mayAsk(before) {
    const wrong = this.choices.wrong;
    if (wrong) this.work.say(`“${wrong}” is not a number that is possible there.`);
    else if (!before.trim()) this.work.say("Write a beginning first: what stands before the cursor is continued.");
    return !wrong && Boolean(before.trim());
  }

  async #continueFrom(parent, change) {
    const count = this.choices.count;
    const nodes = Array.from({ length: count }, () => this.manuscript.add(parent, { ...change }));
    if (count === 1) this.manuscript.go(nodes[0].id);
    else this.alternatives.open(nodes);
    await this.#write(nodes);
  }

  async #write(nodes, missing = this.choices.length) {
    const run = this.writing.goOn(nodes, { ...this.choices.body, max_tokens: missing });
    this.#stand();
    const outcome = await run;
    this.#ended(nodes, outcome);
  }

  #ended(nodes, outcome) {
    const empty = nodes.filter(({ text, id }) => !text || !this.manuscript.tree.node(id));
    for (const node of empty) this.alternatives.drop(node);
    if (outcome === "done" && empty.length === nodes.length) this.work.tell("The model ends the text here.");
    if (!this.work.running) this.#stand();
  }

  /** Another attempt from where this one began. */
  async again() {
    const { current, tree } = this.manuscript;
    if (current.kind !== "written") return;
    await this.writing.stop();
    const { parent, at, cut, given = 0 } = current;
    const change = {
      at,
      cut,
      text: current.text.slice(0, given),
      tokens: current.tokens.filter(([start]) => start < given),
    };
    this.manuscript.go(parent);
    await this.#continueFrom(tree.node(parent).id, { ...change, given, kind: "written" });
  }

  async #take(node) {
    if (!node.text) return this.work.say("Nothing has come of that one yet.");
    const wasGrowing = this.writing.nodes.includes(node) && !node.end;
    await this.#move(() => this.manuscript.go(node.id));
    this.editor.area.focus();
    const missing = this.choices.length - node.tokens.length;
    return wasGrowing && missing > 0 ? this.#write([node], missing) : undefined;
  }

  async #throwAway(id) {
    const { manuscript, writing } = this;
    if (manuscript.path.some((node) => node.id === id)) await writing.stop();
    const node = manuscript.tree.node(id);
    if (!node) return;
    manuscript.throwAway(id);
    this.alternatives.drop(node);
    if (writing.nodes.length && writing.nodes.every(({ gone }) => gone)) await writing.stop();
    this.#stand();
    this.work.tell("Thrown away. Below the branches it can be brought back.");
  }

  #closeAlternatives() {
    if (!this.alternatives.isOpen) return;
    this.work.stop();
    this.alternatives.close();
    this.editor.area.focus();
  }

  // -- other words -------------------------------------------------------------------------------------------------

  /** The word that was clicked on; one that was not written by the model has no rivals. */
  #openRivals({ clientX: x, clientY: y }) {
    const { cursor, isSelecting } = this.editor;
    const near = isSelecting ? [] : [cursor, cursor - 1].map((place) => tokenAt(this.manuscript.pieces, place));
    const hit = near.find(
      (token) => token && this.editor.placesOf(token.start, token.end).some((at) => holds(at, x, y)),
    );
    if (hit) this.#openAt(hit);
    else this.rivals.close();
  }

  /** The word at the cursor, or the one it stands behind. */
  askForRivals() {
    const { cursor } = this.editor;
    const token = tokenAt(this.manuscript.pieces, cursor) ?? tokenAt(this.manuscript.pieces, cursor - 1);
    if (!token) return this.work.tell("The cursor is in no word of the model's: those are the coloured ones.");
    this.#openAt(token);
    return this.rivals.focus();
  }

  #openAt(token) {
    this.editor.pick(token);
    this.rivals.open(token, this.editor.placesOf(token.start, token.end).at(-1));
  }

  closeRivals() {
    if (!this.rivals.isOpen) return false;
    this.rivals.close();
    this.editor.area.focus();
    return true;
  }

  /** Cuts the text at a token, puts another in its place, and goes on from there. */
  async #branch(token, text, logprob) {
    const path = this.manuscript.path;
    await this.writing.stop();
    const { parent, at, cut, text: before, tokens } = forkAt(path, token);
    const rivals = rivalsOf(token).filter((rival) => rival.text !== text);
    const put = [before.length, logprob, rivals.map((rival) => [rival.text, rival.logprob])];
    const change = { at, cut, text: before + text, tokens: [...tokens, put], kind: "written" };
    const node = this.manuscript.add(parent, { ...change, given: before.length + text.length });
    this.alternatives.close();
    this.manuscript.go(node.id);
    this.editor.area.focus();
    if (this.#mayAsk(this.manuscript.text.slice(0, node.cursor))) await this.#write([node]);
  }
}

const holds = (place, x, y) => x >= place.left && x <= place.right && y >= place.top && y <= place.bottom;

const wordsOf = (text) => counted(text.split(/\s+/).filter(Boolean).length, "word");
