/** How often each expert of each layer was chosen: layers downwards, experts across, warmer is oftener. */

import { percent } from "../shared/words.js";

const CELL = { width: 36, height: 7 }; // pixels of the screen

export class Heat {
  #shares = [];

  constructor(canvas, under) {
    Object.assign(this, { canvas, under });
    canvas.addEventListener("pointermove", (event) => this.#tell(event));
    canvas.addEventListener("pointerleave", () => this.#summarise());
  }

  /** Says why there is nothing to be shown. */
  explain(reason) {
    this.canvas.hidden = true;
    this.under.textContent = `Not shown: ${reason}.`;
  }

  /** `routing` is {layers, experts, counts}. */
  show(routing) {
    this.canvas.hidden = false;
    this.total = routing.counts.reduce((sum, row) => sum + row.reduce((one, other) => one + other, 0), 0);
    this.#shares = routing.counts.map(sharesOf);
    this.#draw(routing);
    if (!this.canvas.matches(":hover")) this.#summarise();
  }

  #draw({ layers, experts }) {
    const { canvas } = this;
    const dots = window.devicePixelRatio || 1;
    canvas.width = experts * CELL.width * dots;
    canvas.height = layers * CELL.height * dots;
    canvas.style.aspectRatio = `${experts * CELL.width} / ${layers * CELL.height}`;
    const pen = canvas.getContext("2d");
    pen.scale(dots, dots);
    for (const [layer, row] of this.#shares.entries()) this.#row(pen, layer, row);
  }

  /** An expert that is chosen twice as often as the others, or more, is as warm as can be. */
  #row(pen, layer, row) {
    pen.fillStyle = getComputedStyle(this.canvas).color;
    for (const [expert, share] of row.entries()) {
      pen.globalAlpha = 0.04 + 0.96 * Math.min((share * row.length) / 2.5, 1);
      pen.fillRect(expert * CELL.width, layer * CELL.height, CELL.width - 1, CELL.height - 1);
    }
  }

  #tell(event) {
    const at = this.canvas.getBoundingClientRect();
    const layer = Math.floor(((event.clientY - at.top) / at.height) * this.#shares.length);
    const expert = Math.floor(((event.clientX - at.left) / at.width) * (this.#shares[0]?.length ?? 0));
    const share = this.#shares[layer]?.[expert];
    if (share !== undefined)
      this.under.textContent = `Layer ${layer}, expert ${expert}: chosen in ${percent(share)} of the cases.`;
  }

  #summarise() {
    const words = this.total ? this.#hottest() : "Nothing was chosen yet: let the model write something.";
    this.under.textContent = words;
    this.canvas.setAttribute("aria-label", `How often each expert was chosen. ${words}`);
  }

  #hottest() {
    const all = this.#shares.flatMap((row, layer) => row.map((share, expert) => ({ layer, expert, share })));
    const { layer, expert, share } = all.reduce((best, each) => (each.share > best.share ? each : best));
    const most = `expert ${expert} of layer ${layer}, in ${percent(share)} of the cases`;
    return `${this.total.toLocaleString("en")} choices. The one chosen most: ${most}.`;
  }
}

function sharesOf(counts) {
  const total = counts.reduce((one, other) => one + other, 0);
  return counts.map((count) => (total ? count / total : 0));
}
