/** The tree out to a file and in again, and a new text. */

import { byId, download } from "../shared/dom.js";
import { notify } from "../shared/notices.js";
import { counted } from "../shared/words.js";
import { linesOf, takeIn } from "./exchange.js";

export class Files {
  /** `body()` has the fields that every line gets, `move(act)` does what puts another text here. */
  constructor(manuscript, work, { body, move }) {
    Object.assign(this, { manuscript, work, body, move });
    byId("export").addEventListener("click", () => this.export());
    byId("import").addEventListener("click", () => byId("import-file").click());
    byId("import-file").addEventListener("change", (event) => this.#import(event.target));
    byId("new-text").addEventListener("click", () => this.#begin());
  }

  export() {
    const lines = linesOf(this.manuscript, batchFields(this.body()));
    if (!lines.length) return this.work.tell("There is nothing to export yet.");
    download("prompts.jsonl", lines.map((line) => `${JSON.stringify(line)}\n`).join(""));
    return this.work.tell(`Exported: ${counted(lines.length, "branch", "branches")}, for grok-local batch.`);
  }

  async #import(input) {
    const text = await input.files[0].text();
    input.value = "";
    const { prompts, answers, left } = await this.move(() => takeIn(this.manuscript, text));
    const found = [prompts && counted(prompts, "branch", "branches"), answers && counted(answers, "answer")].filter(
      Boolean,
    );
    const without = left ? ` ${counted(left, "line")} had no text for this tree and stayed out.` : "";
    this.work.say(`Taken in: ${found.join(" and ") || "nothing"}.${without}`);
  }

  async #begin() {
    await this.#put({}, "This is a new text.");
    byId("text").focus();
  }

  async #put(text, sentence) {
    this.offer(sentence, await this.move(() => this.manuscript.replace(text)));
  }

  /** Says that another text is there, and brings the old one back, if that is wished. */
  offer(sentence, old) {
    const back = { label: "Bring the old one back", onclick: () => this.#put(old, "The old text is back.") };
    notify(sentence, old.tree.nodes.length > 1 ? back : null);
  }
}

/** A line of a batch draws its own random numbers, and answers with log-probabilities come back in colours. */
function batchFields({ seed, ...fields }) {
  return { ...fields, logprobs: 5 };
}
