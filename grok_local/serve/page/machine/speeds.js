/** Tokens a second over the last minutes, as a line. */

const KEPT = 120; // looks
const NAMESPACE = "http://www.w3.org/2000/svg";

export class Speeds {
  #values = [];

  constructor(place) {
    this.line = document.createElementNS(NAMESPACE, "polyline");
    place.append(this.line);
  }

  add(value) {
    this.#values = [...this.#values.slice(1 - KEPT), value];
    const most = Math.max(...this.#values, 1e-9);
    const points = this.#values.map(
      (each, index) => `${index + KEPT - this.#values.length},${38 - (36 * each) / most}`,
    );
    this.line.setAttribute("points", points.join(" "));
  }
}
