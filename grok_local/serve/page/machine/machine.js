/** The third tab: where the model lies, how fast it goes, and what its experts do. */

import { byId, make } from "../shared/dom.js";
import { getJson } from "../shared/server.js";
import { counted, failureWords, figure } from "../shared/words.js";
import { Heat } from "./heat.js";
import { planParts } from "./plan.js";
import { Speeds } from "./speeds.js";
import { streamingParts } from "./streaming.js";

const EVERY = 1500; // milliseconds

export class Machine {
  #timer = null;
  #planShown = null;
  #isRecorded = true;

  constructor() {
    this.heat = new Heat(byId("heat"), byId("heat-under"));
    this.speeds = new Speeds(byId("speeds"));
    document.addEventListener("visibilitychange", () => this.#wake());
  }

  /** Looks at the server again and again while it is seen. */
  show() {
    this.#wake({ isAsked: true });
  }

  #wake(how) {
    clearTimeout(this.#timer);
    if (!document.hidden && !byId("machine").hidden) this.#look(how);
  }

  async #look(how) {
    try {
      await Promise.all([this.#machine(how), this.#routing(how)]);
      byId("machine-problem").replaceChildren();
    } catch (error) {
      byId("machine-problem").replaceChildren(make("p", {}, failureWords(error)));
    }
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.#wake(), EVERY);
  }

  async #machine(how) {
    const { model, context, parallel, plan, now, experts } = await getJson("/local/machine", how);
    this.#plan(plan);
    this.speeds.add(now.tokens_per_second);
    const facts = {
      "machine-model": model,
      "machine-now": `${figure(now.tokens_per_second)}`,
      "machine-doing": doing(now),
    };
    for (const [id, text] of Object.entries({ ...facts, "machine-room": room(context, parallel) }))
      byId(id).textContent = text;
    byId("streaming").replaceChildren(...streamingParts(experts));
  }

  /** A plan stays what it is. */
  #plan(plan) {
    const text = JSON.stringify(plan);
    if (text === this.#planShown) return;
    this.#planShown = text;
    byId("plan").replaceChildren(...planParts(plan));
  }

  /** What is not recorded is not asked for again. */
  async #routing(how) {
    if (!this.#isRecorded) return;
    try {
      this.heat.show(await getJson("/local/routing", how));
    } catch (error) {
      if (error.status !== 404) throw error;
      this.#isRecorded = false;
      this.heat.explain(error.message);
    }
  }
}

const room = (context, parallel) => `${counted(parallel, "place")} of ${context} tokens`;

function doing({ running, queued }) {
  if (!running && !queued) return "idle";
  return `${counted(running, "request")} running${queued ? `, ${queued} waiting` : ""}`;
}
