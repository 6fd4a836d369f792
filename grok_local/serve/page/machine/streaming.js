/** What experts that do not fit in memory cost: found there, or read from the disk. */

import { make } from "../shared/dom.js";
import { percent, size } from "../shared/words.js";

export function streamingParts(experts) {
  if (!experts) return [make("p", {}, "Nothing is streamed: no experts are read from the disk as they are chosen.")];
  const whole = experts.wait_seconds + experts.compute_seconds;
  const facts = [
    ["found in memory", percent(experts.hit_rate)],
    ["read from the disk, a token", size(experts.bytes_read_per_token)],
    ["in all", size(experts.bytes_read)],
    ["of it read again", size(experts.bytes_reread)],
    ["time spent waiting for the disk", whole ? percent(experts.wait_seconds / whole) : "none"],
  ];
  return [
    make("dl", {}, ...facts.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value)))),
  ];
}
