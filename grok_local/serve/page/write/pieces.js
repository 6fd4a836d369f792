/** A text as pieces of what nodes brought: {node, from, length}. */

/** The pieces after a change: `cut` characters at `at` replaced by all that `node` brings. */
export function changed(pieces, node) {
  const whole = { node, from: 0, length: node.text.length };
  return [...upTo(pieces, node.at), whole, ...after(pieces, node.at + node.cut)].filter((piece) => piece.length);
}

/** The pieces of the text at the end of a path through the tree. */
export const piecesOf = (path) => path.reduce(changed, []);

export const textOf = (pieces) => pieces.map(({ node, from, length }) => node.text.slice(from, from + length)).join("");

function upTo(pieces, end) {
  const found = [];
  for (const piece of pieces) {
    if (end <= 0) break;
    found.push(piece.length <= end ? piece : { ...piece, length: end });
    end -= piece.length;
  }
  return found;
}

function after(pieces, start) {
  const found = [];
  for (const piece of pieces) {
    if (start <= 0) found.push(piece);
    else if (start < piece.length) found.push({ ...piece, from: piece.from + start, length: piece.length - start });
    start -= piece.length;
  }
  return found;
}

/** The token at a place of the text: {node, index, start, end} with start and end in the text; null where none is. */
export function tokenAt(pieces, offset) {
  let start = 0;
  for (const piece of pieces) {
    if (offset < start + piece.length) return inPiece(piece, start, offset);
    start += piece.length;
  }
  return null;
}

function inPiece({ node, from, length }, start, offset) {
  if (!node.tokens) return null;
  const index = indexAt(node.tokens, offset - start + from);
  if (index < 0) return null;
  const begins = node.tokens[index][0];
  const ends = endOf(node, index);
  if (begins < from || ends > from + length) return null;
  return { node, index, start: start + begins - from, end: start + ends - from };
}

/** The last token that starts at or before a place; -1 if none does. */
function indexAt(tokens, place) {
  let low = 0;
  let high = tokens.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (tokens[middle][0] <= place) low = middle + 1;
    else high = middle;
  }
  return low - 1;
}

export const endOf = (node, index) => node.tokens[index + 1]?.[0] ?? node.text.length;

/** Runs of one colour: {band, text}, where `bandOf(log-probability)` names it, and "" is what nobody coloured. */
export function runsOf(pieces, bandOf) {
  const runs = [];
  for (const piece of pieces) for (const run of runsIn(piece, bandOf)) join(runs, run);
  return runs;
}

function* runsIn({ node, from, length }, bandOf) {
  const text = (start, end) => node.text.slice(Math.max(start, from), Math.min(end, from + length));
  const tokens = node.tokens ?? [];
  yield { band: "", text: text(0, tokens[0]?.[0] ?? node.text.length) };
  for (const [index, [start, logprob]] of tokens.entries()) {
    yield { band: bandOf(logprob), text: text(start, endOf(node, index)) };
  }
}

/** Characters that runs are joined up to: so that typing in a long text touches little of it. */
const LONGEST = 2000;

function join(runs, run) {
  if (!run.text) return;
  const last = runs.at(-1);
  if (last && last.band === run.band && last.text.length + run.text.length <= LONGEST) last.text += run.text;
  else runs.push({ ...run });
}
