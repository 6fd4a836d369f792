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

/** "12 %", "0.4 %", "< 0.1 %". */
export function percent(share) {
  const value = 100 * share;
  if (value < 0.1) return "< 0.1 %";
  return `${value < 1 ? value.toFixed(1) : Math.round(value)} %`;
}

export const counted = (count, one, many = `${one}s`) => `${count} ${count === 1 ? one : many}`;

/** What the server is doing for us, of its progress: {phase, words, share of `wanted` tokens} (null: nobody knows). */
export function progressWords(progress, wanted) {
  const left = progress.seconds_left > 0 ? `, about ${duration(progress.seconds_left)} left` : "";
  const { words, share } = PHASES[progress.state](progress, wanted);
  return { phase: progress.state, words: words + left, share };
}

const PHASES = {
  queued: ({ place_in_queue: place }) => ({
    words: place > 1 ? `Waiting: number ${place} in the queue` : "Waiting for a place",
    share: null,
  }),
  prompt: ({ prompt_tokens_done: done, prompt_tokens: all }) => ({
    words: `Reading the text: ${done} of ${counted(all, "token")}`,
    share: done / all,
  }),
  answer: ({ tokens }, wanted) => ({
    words: `Writing: ${tokens} of ${counted(wanted, "token")}`,
    share: Math.min(tokens / wanted, 1),
  }),
};

/** What went wrong, and what helps; `shorter` is how less is asked for. */
export function failureWords(error, shorter = "") {
  if (error.status === 0) return `${error.message} Is “grok-local serve” still running?`;
  if (error.status === 429)
    return `Too many requests are waiting${error.wait ? `; there is room in about ${duration(error.wait)}` : ""}.`;
  if (error.code === "context_length_exceeded")
    return `${sentence(error.message)} ${shorter}`.trim();
  return sentence(error.message);
}

const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");
