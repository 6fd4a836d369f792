/** What experts that do not fit in memory cost: found there, or read from the disk. */

import { make } from "../shared/dom.js";
import { percent, size } from "../shared/words.js";

export function streamingParts(experts) {
  if (!experts) return [make("p", {}, "All experts are in memory: nothing is read from the disk.")];
  const { hits, misses, bytes_read: read, bytes_reread: again, wait_seconds: waited, seconds } = experts;
  const facts = [
    ["found in memory", hits + misses ? percent(hits / (hits + misses)) : "–"],
    ["read from the disk", size(read)],
    ["of that, read again", size(again)],
    ["time spent waiting for the disk", seconds ? percent(waited / seconds) : "–"],
  ];
  return [make("dl", {}, ...facts.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value))))];
}
