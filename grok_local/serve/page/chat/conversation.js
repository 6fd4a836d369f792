/** What was said, with every version of an answer; kept with every change, and undone step by step. */

import { hear, keep, recall } from "../shared/store.js";
import { joined, withOwn } from "./meeting.js";

const STEPS = 50;

export class Conversation {
  #past = [];
  #heard = null; // what another window kept while an answer came here

  /** A turn is {role, versions, shown}. */
  constructor(onChange) {
    this.onChange = onChange;
    Object.assign(this, { system: "", turns: [], ...recall("chat", {}) });
    hear("chat", (name, kept) => name === "chat" && kept && this.#follow(kept));
  }

  get #isComing() {
    return this.turns.some(({ coming }) => coming);
  }

  /** Another window changed the conversation, which is this one's too; an answer that comes here is put to it. */
  #follow({ system, turns }) {
    this.system = system;
    if (this.#isComing) this.#heard = turns;
    else this.#become(withOwn(turns, this.turns));
    this.onChange();
  }

  #become(turns) {
    this.#past = [...this.#past.slice(-STEPS), this.turns];
    this.turns = turns;
  }

  /** What the server is sent to answer; an answer that is coming is no part of it. */
  get messages() {
    const said = this.turns.filter(({ coming }) => !coming).map((turn) => ({ role: turn.role, content: textOf(turn) }));
    return this.system.trim() ? [{ role: "system", content: this.system }, ...said] : said;
  }

  get canUndo() {
    return this.#past.length > 0;
  }

  instruct(system) {
    this.system = system;
    this.save();
  }

  say(text) {
    this.#change([...this.turns, { role: "user", versions: [text], shown: 0 }]);
  }

  /** Says something else in a turn's place; what came after it goes. */
  sayInstead(turn, text) {
    this.#change([...this.turns.slice(0, this.turns.indexOf(turn)), { role: "user", versions: [text], shown: 0 }]);
  }

  /** A place for an answer; of the last one another version, if there is one already. */
  awaitAnswer() {
    const last = this.turns.at(-1);
    if (last?.role !== "assistant")
      this.#change([...this.turns, { role: "assistant", versions: [""], shown: 0, coming: true }]);
    else
      this.#change([
        ...this.turns.slice(0, -1),
        { ...last, versions: [...last.versions, ""], shown: last.versions.length, coming: true },
      ]);
    return this.turns.at(-1);
  }

  grow(turn, text) {
    turn.versions[turn.shown] += text;
    this.onChange();
  }

  /** An answer is whole, or was stopped; an empty one is none. */
  settle(turn) {
    delete turn.coming;
    if (!textOf(turn)) this.#withdraw(turn);
    this.#meet();
    this.save();
    this.onChange();
  }

  #withdraw(turn) {
    turn.versions.splice(turn.shown, 1);
    turn.shown = Math.max(turn.versions.length - 1, 0);
    if (!turn.versions.length) this.turns = this.turns.filter((each) => each !== turn);
    this.#past.pop();
  }

  #meet() {
    if (this.#heard) this.turns = joined(this.turns, this.#heard);
    this.#heard = null;
  }

  /** The page is closed: what came so far of an answer is kept; all else is. */
  close() {
    if (!this.#isComing) return;
    this.#meet();
    this.save();
  }

  show(turn, version) {
    turn.shown = version;
    this.save();
    this.onChange();
  }

  clear() {
    this.#change([]);
  }

  undo() {
    this.turns = this.#past.pop() ?? this.turns;
    this.save();
    this.onChange();
  }

  #change(turns) {
    this.#become(turns);
    this.save();
    this.onChange();
  }

  save() {
    const turns = this.turns.map(keptOf).filter(({ versions }) => versions.length);
    keep("chat", { system: this.system, turns });
  }
}

export const textOf = ({ versions, shown }) => versions[shown];

/** A turn without the answer of which nothing has come yet. */
function keptOf({ role, versions, shown }) {
  const said = versions.filter(Boolean);
  return { role, versions: said, shown: Math.min(shown, said.length - 1) };
}
