/** What lies where: a bar for each place, and what a token costs. */

import { make } from "../shared/dom.js";
import { figure, percent, size } from "../shared/words.js";

const PARTS = [
  ["dense", "dense"],
  ["experts", "experts"],
  ["kv", "KV cache"],
  ["compute", "compute"],
];

export function planParts(plan) {
  const widest = Math.max(...plan.places.map(({ capacity, used }) => Math.max(capacity, used)), plan.disk);
  const places = plan.places.filter(({ used }) => used).map((place) => placeRow(place, widest));
  const disk = plan.disk ? [diskRow(plan, widest)] : [];
  return [
    make("p", { class: "verdict" }, plan.verdict),
    make("div", { class: "places" }, ...places, ...disk),
    legend(),
    make("h3", {}, "A token"),
    tokenTable(plan),
    remarks(plan),
  ];
}

function placeRow(place, widest) {
  const parts = PARTS.filter(([key]) => place[key]).map(([key]) => part(key, place[key] / place.capacity));
  const bar = make("div", { class: "place-bar", "aria-hidden": "true" }, ...parts);
  bar.style.setProperty("--width", place.capacity / widest);
  const held = PARTS.filter(([key]) => place[key])
    .map(([key, name]) => `${name} ${size(place[key])}`)
    .join(", ");
  const share = `${percent(place.used / place.capacity)} of ${size(place.capacity)}`;
  return row(place.place, bar, `${share}: ${held}`);
}

function diskRow({ disk, bytes, streamed }, widest) {
  const bar = make("div", { class: "place-bar", "aria-hidden": "true" }, part("disk", 1));
  bar.style.setProperty("--width", disk / widest);
  return row(
    "disk",
    bar,
    `${size(disk)} of the experts, ${percent(disk / bytes)} of the model, ${streamed ? "streamed" : "mapped"}`,
  );
}

function row(name, bar, words) {
  return make("div", { class: "place" }, make("h4", {}, name), bar, make("p", {}, words));
}

function part(kind, share) {
  const element = make("span", { class: `part ${kind}` });
  element.style.setProperty("--share", share);
  return element;
}

function legend() {
  const entries = PARTS.map(([key, name]) => make("li", {}, make("span", { class: `part ${key}` }), name));
  return make("ul", { class: "legend", "aria-hidden": "true" }, ...entries);
}

function tokenTable({ token, tokens_per_second: speed }) {
  const whole = token.reduce((sum, { seconds }) => sum + seconds, 0);
  const rows = token.map(({ place, bytes, seconds }) => {
    const bar = make("span", { class: "bar" });
    bar.style.setProperty("--share", seconds / whole);
    const name = place === "between" ? "between: norms, attention, moving on" : `read from ${place}`;
    const cells = [
      make("td", {}, bytes ? size(bytes) : ""),
      make("td", {}, time(seconds)),
      make("td", { class: "share" }, bar),
    ];
    return make("tr", {}, make("th", { scope: "row" }, name), ...cells);
  });
  const caption = make("caption", {}, `${time(whole)} a token, ${figure(speed)} tokens a second, as planned`);
  return make("table", {}, caption, make("tbody", {}, ...rows));
}

const time = (seconds) => (seconds < 1 ? `${figure(1000 * seconds)} ms` : `${figure(seconds)} s`);

function remarks({ notes, assumptions }) {
  const all = [...notes, ...assumptions.map((text) => `assumed: ${text}`)];
  return make("ul", { class: "remarks" }, ...all.map((text) => make("li", {}, text)));
}
