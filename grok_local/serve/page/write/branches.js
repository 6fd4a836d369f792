/** The tree, as a list to move in: a row for each piece of writing, indented where a text had several continuations. */

import { byId, everyPicture, make } from "../shared/dom.js";

const SNIPPET = 90; // characters of a row

export class Branches {
  /** `manuscript` is what is shown; `onGo(id)` and `onThrowAway(id)` what is asked for. */
  constructor(manuscript, { onGo, onThrowAway }) {
    Object.assign(this, { manuscript, onGo, onThrowAway, list: byId("branches"), back: byId("bring-back") });
    this.list.addEventListener("click", (event) => this.#click(event));
    this.list.addEventListener("keydown", (event) => this.#key(event));
    this.back.addEventListener("click", () => manuscript.bringBack());
    this.update = everyPicture(() => this.#show());
  }

  #show() {
    const focused = this.list.contains(document.activeElement) && document.activeElement.dataset.id;
    const rows = rowsOf(this.manuscript.tree);
    const onPath = new Set(this.manuscript.path.map(({ id }) => id));
    const here = rows.find(({ nodes }) => nodes.some(({ id }) => id === this.manuscript.current.id));
    this.list.replaceChildren(...rows.map((row) => this.#row(row, onPath, row === here)));
    byId("branches-empty").hidden = rows.length > 0;
    this.#offerBack();
    if (focused) (this.#rowOf(focused) ?? this.list.querySelector("[tabindex='0']"))?.focus();
  }

  #row({ nodes, level }, onPath, isHere) {
    const last = nodes.at(-1);
    const written = last.kind === "written";
    const classes = ["branch", last.kind, onPath.has(last.id) ? "on-path" : ""].join(" ");
    const how = {
      class: classes,
      role: "treeitem",
      tabIndex: isHere ? 0 : -1,
      "aria-level": level,
      "aria-selected": isHere,
    };
    const label = make("span", { class: "snippet" }, snippetOf(nodes));
    const away = make("span", { class: "away", title: "Throw away (Delete)", "aria-hidden": "true" }, "×");
    const row = make("li", { ...how, "data-id": last.id }, label, ...(written ? [away] : []));
    row.style.setProperty("--level", Math.min(level - 1, 6));
    return row;
  }

  #rowOf(id) {
    return this.list.querySelector(`[data-id="${id}"]`);
  }

  #offerBack() {
    const count = this.manuscript.thrownAway.length;
    this.back.hidden = count === 0;
    this.back.textContent = `Bring back what was thrown away (${count})`;
  }

  #click(event) {
    const row = event.target.closest("[data-id]");
    if (!row) return;
    if (event.target.closest(".away")) this.onThrowAway(Number(row.dataset.id));
    else this.onGo(Number(row.dataset.id));
  }

  #key(event) {
    const row = event.target.closest("[data-id]");
    const act = row && this.#keys[event.key];
    if (!act || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    act(row);
  }

  #keys = {
    ArrowDown: (row) => this.#focus(row.nextElementSibling),
    ArrowUp: (row) => this.#focus(row.previousElementSibling),
    ArrowLeft: (row) => this.#focus(parentOf(row)),
    ArrowRight: (row) => this.#focus(row.nextElementSibling),
    Home: () => this.#focus(this.list.firstElementChild),
    End: () => this.#focus(this.list.lastElementChild),
    Enter: (row) => this.onGo(Number(row.dataset.id)),
    " ": (row) => this.onGo(Number(row.dataset.id)),
    Delete: (row) => row.classList.contains("written") && this.onThrowAway(Number(row.dataset.id)),
  };

  #focus(row) {
    if (!row) return;
    for (const each of this.list.children) each.tabIndex = each === row ? 0 : -1;
    row.focus();
  }
}

/** The row before that is less indented. */
function parentOf(row) {
  const level = Number(row.ariaLevel);
  let found = row.previousElementSibling;
  while (found && Number(found.ariaLevel) >= level) found = found.previousElementSibling;
  return found ?? row.previousElementSibling;
}

/** Rows from the root on: {nodes, level}. Typing that goes on from typing shares a row. */
export function rowsOf(tree) {
  const rows = [];
  const open = tree
    .children(0)
    .map((node) => ({ node, level: 1, row: null }))
    .reverse();
  while (open.length) {
    const { node, level, row } = open.pop();
    const own = row ?? { nodes: [], level };
    own.nodes.push(node);
    if (!row) rows.push(own);
    open.push(...below(tree, node, own).reverse());
  }
  return rows;
}

function below(tree, node, row) {
  const children = tree.children(node.id);
  const level = row.level + (children.length > 1 ? 1 : 0);
  const goesOn = children.length === 1 && node.kind === "typed" && children[0].kind === "typed";
  return children.map((child) => ({ node: child, level, row: goesOn ? row : null }));
}

function snippetOf(nodes) {
  const text = nodes
    .map((node) => node.text)
    .join("")
    .trim();
  const line = text
    .slice(0, 4 * SNIPPET)
    .replace(/\s+/g, " ")
    .slice(0, SNIPPET);
  return line || (nodes.some(({ cut }) => cut) ? "(something taken out)" : "…");
}
