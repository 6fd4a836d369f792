/** How the next word is chosen: the fields of a folded panel, kept between visits. */

import { make } from "./dom.js";
import { keep, recall } from "./store.js";

const FIELDS = [
  {
    name: "temperature",
    label: "Boldness",
    usual: 0.9,
    min: 0,
    max: 2,
    step: 0.05,
    help: "0 always takes the likeliest word, 1 chooses as the model would, more is wilder. (temperature)",
  },
  {
    name: "min_p",
    label: "Leave out the unlikely",
    usual: 0.05,
    min: 0,
    max: 1,
    step: 0.01,
    help: "Words less likely than this share of the likeliest are not taken; 0 is off. (min_p)",
  },
  {
    name: "top_p",
    label: "Keep to the likeliest part",
    usual: 1,
    min: 0.05,
    max: 1,
    step: 0.05,
    help: "Chooses among the likeliest words that have this much of the probability together; 1 is off. (top_p)",
  },
  {
    name: "top_k",
    label: "Keep to so many words",
    usual: 0,
    min: 0,
    max: 1000,
    step: 1,
    help: "Chooses among this many; 0 is off. (top_k)",
  },
  {
    name: "seed",
    label: "Repeatable",
    usual: "",
    min: 0,
    max: 2147483647,
    step: 1,
    help: "The same number and the same text give the same continuation. Empty: always another. (seed)",
  },
];

export class Sampling {
  #inputs = new Map();

  /** Puts the fields into `place`; `kept` is the name their values are kept under. */
  constructor(place, kept) {
    this.kept = kept;
    const values = recall(kept, {});
    for (const field of FIELDS) place.append(this.#field(field, values[field.name] ?? field.usual));
    place.append(
      make("button", { type: "button", class: "quiet", onclick: () => this.#reset() }, "As they were at first"),
    );
  }

  #field({ name, label, help, min, max, step }, value) {
    const id = `${this.kept}-${name}`;
    const input = make("input", { type: "number", id, min, max, step, value, "aria-describedby": `${id}-help` });
    input.addEventListener("change", () => this.#save());
    this.#inputs.set(name, input);
    const small = make("small", { id: `${id}-help` }, help);
    return make("div", { class: "field" }, make("label", { htmlFor: id }, label), input, small);
  }

  #reset() {
    for (const { name, usual } of FIELDS) this.#inputs.get(name).value = usual;
    this.#save();
  }

  #save() {
    keep(this.kept, Object.fromEntries([...this.#inputs].map(([name, input]) => [name, input.value])));
  }

  /** The name of the first field that says something impossible, or null. */
  get wrong() {
    const found = FIELDS.find(({ name }) => !this.#inputs.get(name).checkValidity());
    return found ? found.label : null;
  }

  /** The fields of a request. Without a seed of the user's it has one that was drawn, so that it can be repeated. */
  get body() {
    const given = FIELDS.map(({ name }) => [name, this.#inputs.get(name).value]).filter(([, value]) => value !== "");
    const drawn = Math.floor(Math.random() * 2 ** 31);
    return { seed: drawn, ...Object.fromEntries(given.map(([name, value]) => [name, Number(value)])) };
  }
}
