/** The model at work on the manuscript: the nodes that grow, until they have what was asked for or are stopped. */

import { complete } from "./completion.js";

const SAVED_EVERY = 1000; // milliseconds

export class Writing {
  nodes = []; // that grow now
  #over = Promise.resolve();
  #savedAt = 0;

  /** `onGrow(node)` is told of every new piece, `onRetry()` of the wish to try again what failed. */
  constructor(manuscript, work, { onGrow, onRetry }) {
    Object.assign(this, { manuscript, work, onGrow, onRetry });
  }

  /** Lets `nodes`, which all have the same text, go on; returns how it ended. */
  async goOn(nodes, body) {
    const { manuscript } = this;
    this.nodes = nodes;
    const prompt = manuscript.textAt(nodes[0].id).slice(0, nodes[0].cursor);
    const starts = nodes.map(({ text, tokens }) => ({ text, tokens }));
    for (const node of nodes) manuscript.grow(node, node);
    const onChoice = (choice) => this.#grow(starts, choice);
    const job = (signal, told) => complete({ ...body, prompt, n: nodes.length }, { signal, told, onChoice });
    const run = this.work.run(job, { wanted: body.max_tokens * nodes.length, again: this.onRetry });
    this.#over = run.then(() => this.#settle(nodes));
    await this.#over;
    return run;
  }

  #grow(starts, choice) {
    const node = this.nodes[choice.index];
    const { text, tokens } = starts[choice.index];
    const later = choice.tokens.map(([start, ...rest]) => [start + text.length, ...rest]);
    this.manuscript.grow(node, { text: text + choice.text, tokens: [...tokens, ...later] });
    node.end = choice.end;
    this.onGrow(node);
    this.#saveNow();
  }

  #saveNow() {
    if (Date.now() - this.#savedAt < SAVED_EVERY) return;
    this.#savedAt = Date.now();
    for (const node of this.nodes) this.manuscript.save(node);
  }

  #settle(nodes) {
    this.nodes = [];
    for (const node of nodes) {
      if (node.text || !this.manuscript.tree.node(node.id)) this.manuscript.settle(node);
      else this.manuscript.discard(node);
    }
  }

  /** Stops, and waits until nothing grows any more. */
  async stop() {
    this.work.stop();
    await this.#over;
  }
}
