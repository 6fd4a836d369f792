/** The second tab: a conversation. */

import { byId, everyPicture } from "../shared/dom.js";
import { Sampling } from "../shared/sampling.js";
import { streamed } from "../shared/server.js";
import { Work } from "../shared/work.js";
import { Conversation } from "./conversation.js";
import { Talk } from "./talk.js";

export class Chat {
  constructor() {
    this.conversation = new Conversation(() => this.show());
    this.work = new Work(byId("chat-dock"), "Begin a new conversation, edit an earlier message, or ask for fewer tokens.");
    this.sampling = new Sampling(byId("chat-sampling"), "chat-sampling");
    this.place = byId("turns");
    this.show = everyPicture(() => this.#show());
    this.talk = new Talk(this.place, {
      again: () => this.#answer(),
      show: (turn, version) => this.conversation.show(turn, version),
      sayInstead: (turn, text) => this.#sayInstead(turn, text),
      redraw: (turn) => this.#show(turn),
    });
    this.#listen();
    this.#show();
  }

  #listen() {
    const system = byId("system");
    system.value = this.conversation.system;
    system.addEventListener("input", () => this.conversation.instruct(system.value));
    byId("send").addEventListener("click", () => this.continue());
    byId("chat-undo").addEventListener("click", () => this.#undo());
    byId("chat-clear").addEventListener("click", () => this.#clear());
    window.addEventListener("pagehide", () => this.conversation.close());
  }

  #show(anew = null) {
    const { turns, system } = this.conversation;
    byId("system").value = system;
    this.talk.show(turns, anew);
    byId("chat-empty").hidden = turns.length > 0;
    byId("chat-undo").disabled = !this.conversation.canUndo;
    byId("chat-clear").disabled = !turns.length;
    this.#follow();
  }

  #follow() {
    const last = this.place.lastElementChild?.getBoundingClientRect();
    const over = last ? last.bottom - byId("chat-dock").getBoundingClientRect().top : 0;
    if (over > 0 && this.work.running && !byId("chat").hidden) window.scrollBy({ top: over + 24 });
  }

  /** Sends what was written. */
  async continue() {
    const message = byId("message");
    const text = message.value.trim();
    if (!text || this.work.running) return;
    message.value = "";
    this.conversation.say(text);
    await this.#answer();
  }

  async #sayInstead(turn, text) {
    await this.#stop();
    this.conversation.sayInstead(turn, text);
    await this.#answer();
  }

  async #undo() {
    await this.#stop();
    this.conversation.undo();
  }

  async #clear() {
    await this.#stop();
    this.conversation.clear();
    byId("message").focus();
  }

  async #stop() {
    this.work.stop();
    await this.over;
  }

  async #answer() {
    const { wrong, body } = this.sampling;
    if (this.work.running) return;
    if (wrong) return void this.work.say(`“${wrong}” is not a number that is possible there.`);
    const messages = asked(this.conversation.messages);
    const wanted = Number(byId("chat-length").value);
    const turn = this.conversation.awaitAnswer();
    const job = (signal, told) => this.#stream({ messages, max_tokens: wanted, ...body }, turn, { signal, told });
    this.over = this.work.run(job, { wanted, again: () => this.#answer() }).then(() => this.conversation.settle(turn));
    await this.over;
  }

  /** A piece of an answer is a token, or nearly. */
  async #stream(body, turn, { signal, told }) {
    let pieces = 0;
    for await (const { event, data } of streamed("/v1/chat/completions", body, signal)) {
      if (event === "progress") told.hear(data);
      const text = data.choices?.[0]?.delta?.content;
      if (!text) continue;
      this.conversation.grow(turn, text);
      told.count(++pieces);
    }
  }
}

/** The messages up to the last of the user's. */
function asked(messages) {
  const last = messages.findLastIndex(({ role }) => role === "user");
  return messages.slice(0, last + 1);
}
