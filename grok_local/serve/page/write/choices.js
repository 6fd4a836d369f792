/** How much is written, how often, up to where, and how it is chosen: the fields beside the button. */

import { byId } from "../shared/dom.js";
import { Sampling } from "../shared/sampling.js";
import { getJson } from "../shared/server.js";
import { keep, recall } from "../shared/store.js";
import { duration } from "../shared/words.js";

const FIELDS = ["length", "count", "until"];
const STOPS = { length: {}, line: { stop: ["\n"] }, paragraph: { stop: ["\n\n"] } };

export class Choices {
  #speed = null; // tokens a second, as planned

  constructor() {
    this.sampling = new Sampling(byId("write-sampling"), "write-sampling");
    const { colours = true, ...values } = recall("write-choices", {});
    for (const [id, value] of Object.entries(values)) byId(id).value = value;
    byId("colours").checked = colours;
    for (const id of [...FIELDS, "colours"]) byId(id).addEventListener("change", () => this.#changed());
    this.#changed();
    this.#askSpeed();
  }

  #changed() {
    const values = Object.fromEntries(FIELDS.map((id) => [id, byId(id).value]));
    keep("write-choices", { ...values, colours: byId("colours").checked });
    document.body.classList.toggle("uncoloured", !byId("colours").checked);
    this.#estimate();
  }

  /** A page whose server is slow to answer does without. */
  async #askSpeed() {
    const { plan } = await getJson("/local/machine").catch(() => ({}));
    this.#speed = plan?.tokens_per_second ?? null;
    this.#estimate();
  }

  #estimate() {
    const seconds = this.#speed && this.length / this.#speed;
    byId("estimate").textContent = seconds > 5 ? `${this.length} tokens take about ${duration(seconds)}` : "";
  }

  get length() {
    return Number(byId("length").value);
  }

  get count() {
    return Number(byId("count").value);
  }

  get wrong() {
    return this.sampling.wrong;
  }

  /** The fields of a request that say how. */
  get body() {
    return { max_tokens: this.length, ...STOPS[byId("until").value], ...this.sampling.body };
  }
}
