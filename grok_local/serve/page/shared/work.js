/** One thing the server does for us: shown while it goes on, stopped at once, and its failure said in a sentence. */

import { announce, make } from "./dom.js";
import { Pace } from "./pace.js";
import { failureWords, progressWords } from "./words.js";

export class Work {
  #control = null;

  /** `dock` has places of the classes status, done, problem, start and stop; `shorter` says how to ask for less. */
  constructor(dock, shorter) {
    const place = (name) => dock.querySelector(`.${name}`);
    Object.assign(this, { dock, shorter, status: place("status"), done: place("done"), problem: place("problem") });
    Object.assign(this, { startButton: place("start"), stopButton: place("stop") });
    this.stopButton.addEventListener("click", () => this.stop());
  }

  get running() {
    return this.#control !== null;
  }

  stop() {
    this.#control?.abort();
  }

  /**
   * Runs `job(signal, told)`, where `told` has hear(progress) for what the server says and count(tokens) for what came;
   * returns "done", "stopped" or "failed". `again` is what its trouble's button does.
   */
  async run(job, { wanted, again }) {
    const control = this.#begin();
    try {
      await job(control.signal, this.#told(wanted));
      return this.#end("done", "");
    } catch (error) {
      if (control.signal.aborted) return this.#end("stopped", "Stopped. What came stays.");
      control.abort(); // what failed here asks for no more
      if (!("status" in error)) console.error(error);
      this.say(failureWords(error, this.shorter), { label: "Try again", onclick: again });
      return this.#end("failed", "");
    }
  }

  #told(wanted) {
    const pace = new Pace(wanted);
    const show = (progress) => this.#show(progressWords(progress, wanted));
    return { hear: (progress) => show(pace.hear(progress)), count: (tokens) => show(pace.count(tokens)) };
  }

  #begin() {
    this.#control = new AbortController();
    this.problem.replaceChildren();
    this.dock.classList.add("working");
    this.#turn(true);
    this.#show({ phase: "asking", words: "Asking the server", share: null });
    return this.#control;
  }

  #end(outcome, words) {
    this.#control = null;
    this.dock.classList.remove("working");
    this.#turn(false);
    this.#show({ phase: outcome, words, share: 0 });
    return outcome;
  }

  /** The focus does not fall out of the page with the button that had it. */
  #turn(working) {
    const [shown, hidden] = working ? [this.stopButton, this.startButton] : [this.startButton, this.stopButton];
    const hadFocus = document.activeElement === hidden;
    shown.hidden = false;
    hidden.hidden = true;
    if (hadFocus) shown.focus();
  }

  #show({ phase, words, share }) {
    this.status.textContent = words;
    this.done.classList.toggle("unknown", share === null);
    this.done.style.setProperty("--share", share ?? 0);
    if (phase !== this.phase) announce(words);
    this.phase = phase;
  }

  /** A sentence in the status's place. */
  tell(words) {
    this.#show({ phase: words, words, share: 0 });
  }

  /** What went wrong, with a button for what helps. */
  say(sentence, help = null) {
    const button =
      help && make("button", { onclick: () => (this.problem.replaceChildren(), help.onclick()) }, help.label);
    this.problem.replaceChildren(make("p", {}, sentence), ...(button ? [button] : []));
  }
}
