// Light or dark: as the system has it, until the switch is used.
const KEY = "trainyard-theme";
const system = matchMedia("(prefers-color-scheme: dark)");

export const changed = new EventTarget();
export const isDark = () => (document.documentElement.dataset.theme ?? (system.matches ? "dark" : "light")) === "dark";

export function setUp(button) {
  const kept = localStorage.getItem(KEY);
  if (kept === "dark" || kept === "light") document.documentElement.dataset.theme = kept;
  const tell = () => {
    button.textContent = isDark() ? "☀ Light" : "☾ Dark";
    changed.dispatchEvent(new Event("change"));
  };
  button.addEventListener("click", () => {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    localStorage.setItem(KEY, document.documentElement.dataset.theme);
    tell();
  });
  system.addEventListener("change", tell);
  tell();
}
