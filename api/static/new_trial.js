// The form of a new trial: what it would be, asked again as one types; which fields were changed; and a way to find one.
import { refresh } from "./live.js";

const form = document.getElementById("new-trial");
const csrf = document.querySelector("meta[name=csrf]").content;
let waiting = 0;
let asked;

/** Ask what the form's trial would be. An answer that another question has overtaken is dropped. */
async function ask() {
  asked?.abort();
  const mine = (asked = new AbortController());
  const body = new URLSearchParams(new FormData(form));
  try {
    await refresh(form.dataset.preview, ["preview", "short"], { method: "POST", body, headers: { "X-CSRF-Token": csrf }, signal: mine.signal });
  } catch (error) {
    if (error.name !== "AbortError" && !(error instanceof TypeError)) throw error;
    return;
  }
  if (mine === asked) place();
}

/** Show at each field what is wrong with it. */
function place() {
  const problems = new Map();
  for (const item of document.querySelectorAll("#preview [data-field]")) {
    const said = item.querySelector("span").textContent;
    problems.set(item.dataset.field, `${problems.get(item.dataset.field) ?? ""} ${said}`.trim());
  }
  for (const field of form.querySelectorAll(".field")) {
    const said = problems.get(field.dataset.path) ?? "";
    field.classList.toggle("wrong", said !== "");
    field.querySelector(".error").textContent = said;
    const input = field.querySelector("[data-start]");
    if (said) input.setAttribute("aria-invalid", "true");
    else input.removeAttribute("aria-invalid");
    if (said) field.closest("details").open = true;
  }
}

function mark() {
  for (const section of form.querySelectorAll("[data-section]")) {
    for (const field of section.querySelectorAll(".field")) {
      const input = field.querySelector("[data-start]");
      field.classList.toggle("changed", input.value.trim() !== input.dataset.start);
    }
    const changed = section.querySelectorAll(".field.changed").length;
    section.querySelector("[data-changed-count]").textContent = changed ? `${changed} changed` : "";
  }
}

function find(words) {
  for (const section of form.querySelectorAll("[data-section]")) {
    let any = false;
    for (const field of section.querySelectorAll(".field")) {
      const has = words.every((word) => field.textContent.toLowerCase().includes(word) || field.dataset.path.includes(word));
      field.hidden = !has;
      any ||= has;
    }
    section.hidden = !any;
    if (words.length && any) section.open = true;
  }
}

form.addEventListener("input", (event) => {
  if (event.target.id === "find") return find(event.target.value.toLowerCase().split(/\s+/).filter(Boolean));
  if (!event.target.dataset.start && event.target.dataset.start !== "") return;
  mark();
  clearTimeout(waiting);
  waiting = setTimeout(ask, 250);
});
// Enter in the search is no submission.
document.getElementById("find").addEventListener("keydown", (event) => { if (event.key === "Enter") event.preventDefault(); });
// A field that a link leads to may lie in a section that is closed.
form.addEventListener("click", (event) => {
  const path = event.target.closest("a[href^='#']")?.hash.slice(1);
  const input = path && document.getElementById(decodeURIComponent(path));
  if (!input) return;
  event.preventDefault();
  input.closest("details").open = true;
  input.focus();
  input.scrollIntoView({ block: "center" });
});
document.getElementById("start").addEventListener("change", (event) => event.target.form.requestSubmit());
document.querySelector(".find").hidden = false;
document.getElementById("again").addEventListener("click", (event) => { event.preventDefault(); ask(); });
mark();
