/** The one server this page talks to: its own. */

import { byId } from "./dom.js";
import { eventsOf } from "./events.js";

const KEY = "grok-local:key";

/** What the server refused, or that it could not be reached (then `status` is 0). */
export class ServerError extends Error {
  constructor(message, { status = 0, code = null, wait = null } = {}) {
    super(message);
    Object.assign(this, { status, code, wait });
  }
}

/** `isAsked` says whether a user asks: only then somebody who gave no key is asked for it once more. */
export async function getJson(path, { isAsked = false } = {}) {
  return (await ask(path, {}, isAsked)).json();
}

/** Yields {event, data} with data read as JSON, until [DONE]; an error in the stream is thrown. */
export async function* streamed(path, body, signal) {
  const response = await ask(path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, progress: true }),
    signal,
  });
  for await (const { event, data } of read(response)) {
    if (data === "[DONE]") return;
    const value = JSON.parse(data);
    if (value.error) throw new ServerError(value.error.message, { status: 200, code: value.error.code });
    yield { event, data: value };
  }
  throw new ServerError("The answer broke off: the server went away.");
}

async function* read(response) {
  try {
    yield* eventsOf(response);
  } catch (error) {
    throw named(error);
  }
}

async function ask(path, options, isAsked = true) {
  for (;;) {
    const response = await reached(path, { ...options, headers: { ...options.headers, ...credentials() } });
    if (response.ok) return response;
    if (response.status !== 401) throw await refusal(response);
    if (isDeclined && !isAsked) throw keyMissing();
    const { message } = await refusal(response);
    sessionStorage.setItem(KEY, await askedForKey(credentials().Authorization ? message : ""));
  }
}

async function reached(path, options) {
  try {
    return await fetch(path, options);
  } catch (error) {
    throw named(error);
  }
}

/** Stopping is no failure; anything else is the network's. */
function named(error) {
  if (error.name === "AbortError") return error;
  return new ServerError("The server does not answer.");
}

function credentials() {
  const key = sessionStorage.getItem(KEY);
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function refusal(response) {
  const { error } = await response.json().catch(() => ({}));
  const message = error?.message ?? `The server answered with status ${response.status}.`;
  const wait = Number(response.headers.get("Retry-After")) || null;
  return new ServerError(message, { status: response.status, code: error?.code, wait });
}

const keyMissing = () => new ServerError("The server wants its API key.", { status: 401 });

let asking = null;
let isDeclined = false;

/** One dialog, however many requests wait for its answer; `trouble` is what was wrong with the last one. */
function askedForKey(trouble) {
  asking ??= new Promise((resolve, reject) => {
    const dialog = byId("key-dialog");
    dialog.onclose = () => {
      asking = null;
      const key = byId("key").value.trim();
      isDeclined = dialog.returnValue !== "use" || !key;
      if (isDeclined) reject(keyMissing());
      else resolve(key);
    };
    byId("key-trouble").textContent = trouble;
    dialog.returnValue = "";
    dialog.showModal();
  });
  return asking;
}
