/** The tree as lines for `grok-local batch`, and lines back into the tree: prompts, and what a batch answered. */

import { asInArea, Choice } from "./completion.js";

/** A line for the end of every branch; its `id` is the node's name from then on. */
export function linesOf(manuscript, body) {
  const ends = shown(manuscript.tree).filter(({ id }) => !manuscript.tree.children(id).length);
  return ends.map((node) => lineOf(manuscript, node, body)).filter(({ prompt }) => prompt);
}

/** Nothing goes out of what was thrown away, and nothing comes in where nobody sees it. */
const shown = (tree) => tree.nodes.filter(({ id }) => tree.isShown(id));

function lineOf(manuscript, node, body) {
  if (!node.names) manuscript.name(node, `branch-${node.id.toString(36)}`);
  return { id: node.names[0], prompt: manuscript.textAt(node.id).slice(0, node.cursor), ...body };
}

/** Takes lines in; returns how many were {prompts, answers, left} out. */
export function takeIn(manuscript, text) {
  const lines = text
    .split("\n")
    .filter((line) => line.trim())
    .map(parsed);
  const prompts = lines
    .filter((line) => typeof line?.prompt === "string" && line.prompt)
    .map((line) => ({ ...line, prompt: asInArea(line.prompt) }));
  const answers = lines.filter((line) => typeof line?.text === "string" && "id" in line);
  addPrompts(manuscript, prompts);
  const found = answers.map((line) => addAnswer(manuscript, line)).filter(Boolean).length;
  return { prompts: prompts.length, answers: found, left: lines.length - prompts.length - found };
}

function parsed(line) {
  try {
    return JSON.parse(line);
  } catch {
    return null;
  }
}

/** Prompts become branches, which part where their texts do. */
function addPrompts(manuscript, lines) {
  const states = shown(manuscript.tree).map(({ id }) => ({ id, text: manuscript.textAt(id) }));
  const prompts = lines.map(({ prompt }) => prompt);
  const texts = new Set([...prompts, ...forksOf(prompts)]);
  const sorted = [...texts].sort((one, other) => one.length - other.length);
  const nodes = new Map(sorted.map((text) => [text, addText(manuscript, states, text)]));
  for (const { prompt, id } of lines) if (id !== undefined) manuscript.name(nodes.get(prompt), id);
}

function addText(manuscript, states, text) {
  const fitting = states.filter((state) => text.startsWith(state.text));
  const parent = fitting.reduce((best, state) => (state.text.length > best.text.length ? state : best));
  if (parent.text === text) return manuscript.tree.node(parent.id);
  const node = manuscript.add(parent.id, {
    at: parent.text.length,
    text: text.slice(parent.text.length),
    kind: "typed",
  });
  states.push({ id: node.id, text });
  return node;
}

/** Where texts part, at the end of a word. */
function forksOf(texts) {
  const sorted = [...texts].sort();
  const forks = sorted.slice(1).map((text, index) => commonStart(sorted[index], text));
  return forks.map((fork) => fork.replace(/\S*$/, "").trimEnd()).filter(Boolean);
}

function commonStart(one, other) {
  let count = 0;
  while (count < Math.min(one.length, other.length) && one[count] === other[count]) count++;
  return one.slice(0, count);
}

function addAnswer(manuscript, { id, text, logprobs }) {
  const parent = shown(manuscript.tree).find(({ names }) => names?.includes(id));
  if (!parent || !text) return null;
  return manuscript.add(parent.id, { at: parent.cursor, kind: "written", ...laid(text, logprobs ?? []) });
}

function laid(whole, logprobs) {
  const choice = new Choice();
  for (const { top = [], ...chosen } of logprobs) {
    choice.expect(
      named(chosen),
      chosen.logprob,
      top.map((rival) => [named(rival), rival.logprob]),
    );
  }
  const { text, tokens } = choice.take({ text: whole });
  return { text, tokens };
}

/** A token as the server names it: part of a character by its bytes. */
function named({ token, bytes }) {
  if (!token.includes("\ufffd")) return token;
  return `bytes:${bytes.map((byte) => `\\x${byte.toString(16).padStart(2, "0")}`).join("")}`;
}
