/* Light or dark, before the first picture: as the system is, or as was chosen here. Modules would come later. */
(() => {
  const NAME = "grok-local:look";
  const wished = () => {
    try {
      return localStorage.getItem(NAME);
    } catch {
      return null;
    }
  };
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const apply = () => {
    document.documentElement.dataset.look = wished() ?? (dark.matches ? "dark" : "light");
  };
  const turn = () => {
    const look = document.documentElement.dataset.look === "dark" ? "light" : "dark";
    try {
      localStorage.setItem(NAME, look);
    } catch {
      // Without a store it holds until the page is left.
    }
    document.documentElement.dataset.look = look;
  };
  apply();
  dark.addEventListener("change", apply);
  addEventListener("DOMContentLoaded", () => document.getElementById("look").addEventListener("click", turn));
})();
