/** Figures and states, in words. */

/** "about 3 minutes", of seconds. */
export function duration(seconds) {
  if (seconds < 1.5) return "a second";
  if (seconds < 90) return `${Math.round(seconds)} seconds`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} minutes`;
  return `${(seconds / 3600).toFixed(1).replace(".0", "")} hours`;
}

/** "23.3 GB", of bytes. */
export function size(bytes) {
  const unit = ["B", "kB", "MB", "GB", "TB"];
  const step = bytes < 1 ? 0 : Math.min(Math.floor(Math.log10(bytes) / 3), 4);
  return `${figure(bytes / 1000 ** step)} ${unit[step]}`;
}

/** Three digits. */
export const figure = (value) => String(Number(value.toPrecision(3)));

/** "12 %", "0.4 %", "under 0.1 %". */
export function percent(share) {
  const value = 100 * share;
  if (value < 0.1) return "under 0.1 %";
  return `${value < 1 ? value.toFixed(1) : Math.round(value)} %`;
}

export const counted = (count, one, many = `${one}s`) => `${count} ${count === 1 ? one : many}`;

/** What a server is doing for us, of its progress event: a sentence and how much is done (0 to 1, or null). */
export function progressWords({ queue, prompt_done: read, prompt_total: total, tokens, seconds_left: left }, wanted) {
  const rest = left > 0 ? `, about ${duration(left)} left` : "";
  if (queue > 0) return { phase: "waiting", words: `Waiting: ${counted(queue, "request")} before yours${rest}`, share: null };
  if (read < total) return { phase: "reading", words: `Reading the text: ${read} of ${total} tokens${rest}`, share: read / total };
  if (!tokens) return { phase: "starting", words: `Choosing the first word${rest}`, share: null };
  return { phase: "writing", words: `Writing: ${counted(tokens, "token")}${rest}`, share: Math.min(tokens / wanted, 1) };
}

/** What went wrong, and what helps. */
export function failureWords(error) {
  if (error.status === 0) return `${error.message} Is “grok-local serve” still running?`;
  if (error.status === 429) return `Too many requests are waiting${error.wait ? `; there is room in about ${duration(error.wait)}` : ""}.`;
  if (error.code === "context_length_exceeded") return `${sentence(error.message)} Shorten what stands before the cursor, or ask for fewer tokens.`;
  return sentence(error.message);
}

const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");
