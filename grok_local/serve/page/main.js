/** The page: three tabs, and the keys that work in all of them. */

import { arrowsMove, byId } from "./shared/dom.js";
import { getJson } from "./shared/server.js";
import { Chat } from "./chat/chat.js";
import { Machine } from "./machine/machine.js";
import { Write } from "./write/write.js";

const NAMES = ["write", "chat", "machine"];
const tabs = { write: new Write(), chat: new Chat(), machine: new Machine() };

const shown = () => NAMES.find((name) => !byId(name).hidden);

function show(name) {
  for (const each of NAMES) {
    const tab = byId(`tab-${each}`);
    byId(each).hidden = each !== name;
    tab.setAttribute("aria-selected", each === name);
    tab.tabIndex = each === name ? 0 : -1;
  }
  tabs[name].show();
}

function fromAddress() {
  const name = location.hash.slice(1);
  show(NAMES.includes(name) ? name : "write");
}

function listen() {
  for (const name of NAMES) {
    const tab = byId(`tab-${name}`);
    tab.addEventListener("click", () => history.replaceState(null, "", `#${name}`) ?? show(name));
    tab.addEventListener("focus", () => tab.click());
  }
  arrowsMove(byId("tabs"), () => NAMES.map((name) => byId(`tab-${name}`)), ["ArrowLeft", "ArrowRight"]);
  addEventListener("hashchange", fromAddress);
  addEventListener("keydown", pressed);
  addEventListener("pageshow", ({ persisted }) => persisted && location.reload()); // it heard nothing of other windows
}

/** What keys do, by the tab that is shown. */
const KEYS = {
  "Control+Enter": (tab) => tab.continue?.(),
  "Control+Shift+Enter": (tab) => tab.again?.(),
  Escape: (tab) => tab.closeRivals?.() || tab.work?.stop(),
};

const TEXT_KEYS = {
  "Control+z": () => tabs.write.undo(),
  "Control+Shift+z": () => tabs.write.redo(),
  "Control+y": () => tabs.write.redo(),
  "Alt+ArrowDown": () => tabs.write.askForRivals(),
  "Alt+PageUp": () => tabs.write.sibling(-1),
  "Alt+PageDown": () => tabs.write.sibling(1),
};

function pressed(event) {
  if (event.isComposing || byId("key-dialog").open) return;
  const inText = event.target === byId("text") || event.target.closest?.("#branches");
  const act = KEYS[nameOf(event)] ?? (inText && TEXT_KEYS[nameOf(event)]);
  if (!act) return;
  if (event.key !== "Escape") event.preventDefault();
  act(tabs[shown()]);
}

function nameOf({ ctrlKey, metaKey, altKey, shiftKey, key }) {
  const held = [(ctrlKey || metaKey) && "Control", altKey && "Alt", shiftKey && "Shift"].filter(Boolean);
  return [...held, key.length === 1 ? key.toLowerCase() : key].join("+");
}

/** A server that does not answer is told of where something is asked of it. */
async function nameModel() {
  const { data } = await getJson("/v1/models").catch(() => ({ data: [] }));
  byId("model").textContent = data[0]?.id ?? "";
}

listen();
fromAddress();
nameModel();
