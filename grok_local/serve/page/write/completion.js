/** A continuation as it comes: what each choice has so far, its tokens laid along its text. */

import { streamed } from "../shared/server.js";

/** Asks for continuations and calls `onChoice(choice)` whenever one has more; `told` is a work's. */
export async function complete(body, { signal, onChoice, told }) {
  const choices = Array.from({ length: body.n }, (_, index) => new Choice(index));
  for await (const { event, data } of streamed("/v1/completions", { ...body, logprobs: 5 }, signal)) {
    if (event === "progress") told.hear(data);
    for (const part of data.choices ?? []) onChoice(choices[part.index].take(part));
    if (data.choices) told.count(choices.reduce((sum, { tokens }) => sum + tokens.length, 0));
  }
}

/** A text as a text area has it, where every line ends with one character. */
export const asInArea = (text) => text.replace(/\r\n?/g, "\n");

export class Choice {
  text = "";
  tokens = []; // [start in the text, log-probability, [[rival, its log-probability]]]
  end = null; // why it ended

  #raw = ""; // the text as it came: tokens are laid along its bytes
  #coming = []; // tokens whose text is not there yet, each with the byte it starts at
  #bytes = 0; // of all tokens so far
  #passed = 0; // bytes of the text before #place
  #place = 0;

  constructor(index = 0) {
    this.index = index;
  }

  take({ text, logprobs, finish_reason: end }) {
    this.#raw += text ?? "";
    this.text = asInArea(this.#raw);
    this.end = end ?? this.end;
    const { tokens = [], token_logprobs: values, top_logprobs: tops } = logprobs ?? {};
    for (const [index, token] of tokens.entries())
      this.expect(token, values[index], Object.entries(tops?.[index] ?? {}));
    this.#lay();
    return this;
  }

  /** A token comes next, with what else was likely: [[text, log-probability]]. */
  expect(token, logprob, likely) {
    const rivals = likely.filter(([text]) => text !== token).map(([text, value]) => [asInArea(text), thousandth(value)]);
    this.#coming.push({ at: this.#bytes, rest: [thousandth(logprob), rivals] });
    this.#bytes += bytesOf(token);
  }

  #lay() {
    while (this.#coming.length && this.#reach(this.#coming[0].at)) {
      this.tokens.push([asInArea(this.#raw.slice(0, this.#place)).length, ...this.#coming.shift().rest]);
    }
  }

  /** Goes to the character that a byte belongs to, if it is there yet. */
  #reach(at) {
    while (this.#place < this.#raw.length) {
      const code = this.#raw.codePointAt(this.#place);
      const passed = this.#passed + lengthOf(code);
      if (passed > at) return true;
      this.#passed = passed;
      this.#place += code > 0xffff ? 2 : 1;
    }
    return false;
  }
}

const thousandth = (value) => Math.round((value ?? 0) * 1000) / 1000;

const coder = new TextEncoder();

/** A token that is part of a character comes as the names of its bytes, one that has no text by its number. */
function bytesOf(token) {
  if (token.startsWith("bytes:\\x")) return (token.length - "bytes:".length) / 4;
  return isNumber(token) ? 0 : coder.encode(token).length;
}

const isNumber = (token) => /^token_id:\d+$/.test(token);

/** Whether a token can be put into a text: not part of a character, and not what ends a text. */
export const isText = (token) => token !== "" && !token.startsWith("bytes:\\x") && !isNumber(token);

/** Bytes of a character in UTF-8. */
const lengthOf = (code) => (code < 0x80 ? 1 : code < 0x800 ? 2 : code < 0x10000 ? 3 : 4);
