// The language of the page's own words: English or Chinese. The English text is the key, so an English page fetches nothing.
// Other modules wait for this one, so that their constants can be translated too.
import { browserStorage } from "./storage.js";

const STORAGE_KEY = "trainyard-language";
const LANGUAGES = ["en", "zh"];
const HTML_LANG = { en: "en", zh: "zh-CN" };

/** The language that `?lang=` in the address names, which is kept; else the kept one; else the browser's. */
function chooseLanguage() {
  const address = new URL(location.href);
  const named = address.searchParams.get("lang")?.toLowerCase().split("-")[0];
  if (LANGUAGES.includes(named)) browserStorage.set(STORAGE_KEY, named);
  if (named !== undefined) {
    address.searchParams.delete("lang");
    history.replaceState(history.state, "", address);
  }
  const kept = browserStorage.get(STORAGE_KEY);
  if (LANGUAGES.includes(kept)) return kept;
  return navigator.languages.map((name) => name.toLowerCase().split("-")[0]).find((name) => LANGUAGES.includes(name)) ?? "en";
}

/** Returns English text -> translation; empty if the file cannot be fetched, so the page is English. */
async function fetchTexts(name) {
  try {
    const response = await fetch(new URL(`./i18n/${name}.json`, import.meta.url), { credentials: "omit" });
    if (!response.ok) throw new Error(`HTTP status ${response.status}`);
    return await response.json();
  } catch (error) {
    console.warn(`The translation could not be loaded: ${error.message}`);
    return {};
  }
}

export const language = chooseLanguage();
const texts = language === "en" ? {} : await fetchTexts(language);

/** For dates: the browser's own language, unless the page has another one. */
export const locale = language === "zh" ? "zh-CN" : navigator.language.startsWith("zh") ? "en" : undefined;

/** Returns the text in the page's language. `{name}` in it is replaced by `values.name`. The text must be a literal: a test collects the calls. */
export function t(text, values = {}) {
  return (texts[text] ?? text).replace(/\{(\w+)\}/g, (_, name) => values[name]);
}

/** Like `t`, with the text for one or for several things; Chinese has the same for both. `values.n`: the number as text, `number` if it is not given. */
export function tn(number, one, several, values = {}) {
  return t(number === 1 ? one : several, { n: number, ...values });
}

/** Like `t`, but values may be elements: returns a list of texts and elements. */
export function tNodes(text, values) {
  return (texts[text] ?? text).split(/(\{\w+\})/).map((part) => (/^\{\w+\}$/.test(part) ? values[part.slice(1, -1)] : part)).filter((part) => part !== "");
}

/** Sets the language of the document, translates the texts of index.html, and makes the button that switches. */
export function setUpLanguage(button) {
  document.documentElement.lang = HTML_LANG[language];
  for (const node of document.querySelectorAll("[data-i18n]")) node.textContent = texts[node.textContent] ?? node.textContent;
  for (const node of document.querySelectorAll("[data-i18n-label]")) node.setAttribute("aria-label", texts[node.getAttribute("aria-label")] ?? node.getAttribute("aria-label"));
  const other = language === "zh" ? "en" : "zh";
  button.textContent = { en: "English", zh: "中文" }[other];
  button.lang = HTML_LANG[other];
  button.addEventListener("click", () => {
    const address = new URL(location.href);
    address.searchParams.set("lang", other);
    location.replace(address);
  });
}
