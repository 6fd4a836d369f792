/** How far an answer is: what the server said of it last, and what came since, which is news sooner. */

export class Pace {
  #said = { state: "answer", tokens: 0 }; // where the server said nothing yet, the first that comes is no token
  #first = null; // when the first token came
  #tokens = 0;

  constructor(wanted) {
    this.wanted = wanted;
  }

  /** The server said how far it is. */
  hear(progress) {
    this.#said = progress;
    return this.#told();
  }

  /** So many tokens have come in all. */
  count(tokens) {
    if (tokens) this.#first ??= Date.now();
    this.#tokens = tokens;
    return this.#told();
  }

  #told() {
    const said = this.#said;
    if (!this.#tokens) return said;
    const left = this.#left() ?? said.seconds_left;
    return { state: "answer", tokens: this.#tokens, seconds_left: left };
  }

  /** By the time that the tokens took after the first. */
  #left() {
    const seconds = (Date.now() - this.#first) / 1000;
    if (this.#tokens < 3 || seconds < 2) return null;
    return ((this.wanted - this.#tokens) * seconds) / (this.#tokens - 1);
  }
}
