/** Elements, made of text alone: nothing here reads HTML, so a model's words stay words. */

/** An element: `of` has its properties, `data-` and `aria-` attributes, `class`, and listeners as `onclick`. */
export function make(tag, of = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(of)) set(element, name, value);
  element.append(...children);
  return element;
}

function set(element, name, value) {
  if (name === "class") element.className = value;
  else if (name in element && !name.includes("-")) element[name] = value;
  else element.setAttribute(name, value);
}

export const byId = (id) => document.getElementById(id);

/** Calls `work` at the next picture, however often it was asked for before. */
export function everyPicture(work) {
  let waiting = false;
  return () => {
    if (waiting) return;
    waiting = true;
    nextPicture(() => {
      waiting = false;
      work();
    });
  };
}

/** A hidden page gets no pictures, but what arrives there is wanted too. */
function nextPicture(work) {
  if (document.hidden) setTimeout(work, 100);
  else requestAnimationFrame(work);
}

/** Says something to a screen reader, once. */
export function announce(sentence) {
  const place = byId("said");
  if (place.textContent !== sentence) place.textContent = sentence;
}

/** Lets arrow keys move the focus among what `members` returns; `keys` are the names for back and on. */
export function arrowsMove(container, members, keys = ["ArrowUp", "ArrowDown"]) {
  container.addEventListener("keydown", (event) => {
    const all = members();
    const to = target(event.key, keys, all.indexOf(document.activeElement), all.length);
    if (to === null) return;
    event.preventDefault();
    all[to].focus();
  });
}

function target(key, [back, on], from, count) {
  if (from < 0) return null;
  if (key === back) return Math.max(from - 1, 0);
  if (key === on) return Math.min(from + 1, count - 1);
  if (key === "Home") return 0;
  return key === "End" ? count - 1 : null;
}

/** Puts a text into the clipboard; returns whether the browser let it. */
export async function copy(text) {
  if (!navigator.clipboard) return copySelected(text);
  return navigator.clipboard.writeText(text).then(
    () => true,
    () => false,
  );
}

/** The old way: a page that came without TLS is given no other. */
function copySelected(text) {
  const had = document.activeElement;
  const area = make("textarea", { value: text, class: "unseen" });
  document.body.append(area);
  area.select();
  const isDone = document.execCommand("copy");
  area.remove();
  had?.focus();
  return isDone;
}

/** Offers a text as a file. */
export function download(name, text) {
  const url = URL.createObjectURL(new Blob([text], { type: "application/jsonl" }));
  make("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}
