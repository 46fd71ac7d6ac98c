// Light or dark theme: the system's, until the user picks one.
import { t } from "./i18n.js";
import { browserStorage } from "./storage.js";
const STORAGE_KEY = "trainyard-theme";
const systemDark = matchMedia("(prefers-color-scheme: dark)");

export const themeChange = new EventTarget();
export const isDark = () => (document.documentElement.dataset.theme ?? (systemDark.matches ? "dark" : "light")) === "dark";

export function setUpTheme(button) {
  const kept = browserStorage.get(STORAGE_KEY);
  if (kept === "dark" || kept === "light") document.documentElement.dataset.theme = kept;
  const tell = () => {
    button.textContent = isDark() ? `☀ ${t("Light")}` : `☾ ${t("Dark")}`;
    themeChange.dispatchEvent(new Event("change"));
  };
  button.addEventListener("click", () => {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    browserStorage.set(STORAGE_KEY, document.documentElement.dataset.theme);
    tell();
  });
  systemDark.addEventListener("change", tell);
  tell();
}
