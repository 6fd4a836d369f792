/** What was said, with every version of an answer; kept with every change, and undone step by step. */

import { keep, recall } from "../shared/store.js";

const STEPS = 50;

export class Conversation {
  #past = [];

  /** A turn is {role, versions, shown}. */
  constructor(onChange) {
    this.onChange = onChange;
    Object.assign(this, { system: "", turns: [], ...recall("chat", {}) });
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
    this.save();
    this.onChange();
  }

  #withdraw(turn) {
    turn.versions.splice(turn.shown, 1);
    turn.shown = Math.max(turn.versions.length - 1, 0);
    if (!turn.versions.length) this.turns = this.turns.filter((each) => each !== turn);
    this.#past.pop();
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
    this.#past = [...this.#past.slice(-STEPS), this.turns];
    this.turns = turns;
    this.save();
    this.onChange();
  }

  save() {
    const turns = this.turns.map(({ role, versions, shown }) => ({ role, versions, shown }));
    keep("chat", { system: this.system, turns: turns.filter((turn) => textOf(turn)) });
  }
}

export const textOf = ({ versions, shown }) => versions[shown];
