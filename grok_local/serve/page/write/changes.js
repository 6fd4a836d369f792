/** What was done to a text: found by comparing, and carried over to other branches. */

import { endOf } from "./pieces.js";

/** The one change that makes `before` into `now`, whose cursor stands at `cursor`: {at, cut, text}. */
export function changeOf(before, now, cursor) {
  const tail = now.length - cursor;
  const kept = before.endsWith(now.slice(cursor)) ? tail : commonEnd(before, now);
  const at = commonStart(before.slice(0, before.length - kept), now.slice(0, now.length - kept));
  return { at, cut: before.length - kept - at, text: now.slice(at, now.length - kept) };
}

function commonStart(one, other) {
  const most = Math.min(one.length, other.length);
  let count = 0;
  while (count < most && one.charCodeAt(count) === other.charCodeAt(count)) count++;
  return count;
}

function commonEnd(one, other) {
  const most = Math.min(one.length, other.length);
  let count = 0;
  while (count < most && one.at(-1 - count) === other.at(-1 - count)) count++;
  return count;
}

/** A typed node that a further change simply goes on with, changed to hold it too: {cut, text}; else null. */
export function goneOnWith(node, { at, cut, text }) {
  const end = node.at + node.text.length;
  if (cut === 0 && at === end) return { ...node, text: node.text + text };
  if (!text && at + cut === end && cut <= node.text.length) return { ...node, text: node.text.slice(0, -cut) };
  return null;
}

/**
 * Where another word in place of a token branches off: the parent, and the change up to the token without the rival.
 *
 * All that came after the token goes, what stood behind the cursor then stays. Where the text was changed elsewhere
 * meanwhile, that holds too, and the branch starts from the text as it is.
 */
export function forkAt(path, { node, index }) {
  const later = path.slice(path.indexOf(node) + 1);
  const start = node.tokens[index][0];
  const region = later.reduce(grown, { start: node.at + start, end: node.at + node.text.length, alone: true });
  if (!region.alone)
    return { parent: path.at(-1).id, at: region.start, cut: region.end - region.start, text: "", tokens: [] };
  const { parent, at, cut } = node;
  return { parent, at, cut, text: node.text.slice(0, start), tokens: node.tokens.slice(0, index) };
}

/** The region that goes, after one more change; `alone` while nothing else was changed. */
function grown({ start, end, alone }, { at, cut, text }) {
  const by = text.length - cut;
  if (at + cut <= start && at < start) return { start: start + by, end: end + by, alone: false };
  if (at > end) return { start, end, alone: false };
  return { start: Math.min(start, at), end: Math.max(end, at + cut) + by, alone };
}

/** What else could have come in a token's place: {text, logprob, chosen}, likeliest first. */
export function rivalsOf({ node, index }) {
  const [start, logprob, rivals] = node.tokens[index];
  const chosen = node.text.slice(start, endOf(node, index));
  const others = rivals.filter(([text]) => text !== chosen).map(([text, value]) => ({ text, logprob: value }));
  return [{ text: chosen, logprob, chosen: true }, ...others].sort((one, other) => other.logprob - one.logprob);
}
