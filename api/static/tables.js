// Every table that has a name (data-csv) can be copied as CSV: the values as they are, not as they are shown.

/** A field of a CSV file (RFC 4180). What a spreadsheet would take for a formula is kept as text. */
function field(text) {
  const safe = /^[=+\-@\t\r]/.test(text) && !Number.isFinite(Number(text)) ? `'${text}` : text;
  return /[",\r\n]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
}

/** What a cell holds: its data-value, or its text, where numbers lose the commas that they are shown with. */
function valueOf(cell) {
  if (cell.dataset.value !== undefined) return cell.dataset.value;
  const text = cell.innerText.replace(/\s+/g, " ").trim();
  if (text === "–") return "";
  return /^[+-]?\d{1,3}(,\d{3})+(\.\d+)?$/.test(text) ? text.replaceAll(",", "") : text;
}

export function csv(table) {
  const rows = [...table.rows].map((row) => [...row.cells].filter((cell) => cell.dataset.csv !== "skip"));
  return rows.map((cells) => `${cells.map((cell) => field(valueOf(cell))).join(",")}\r\n`).join("");
}

async function copy(text) {
  // Only pages from this machine or over TLS are given the clipboard.
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = Object.assign(document.createElement("textarea"), { value: text, readOnly: true, className: "off-screen" });
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  if (!done) throw new Error("the browser refused");
}

function addButton(table) {
  const around = table.parentElement.matches(".scroll") ? table.parentElement : table;
  if (around.nextElementSibling?.matches(".copy")) return;
  const button = Object.assign(document.createElement("button"), { type: "button", className: "copy", textContent: "Copy as CSV" });
  button.dataset.added = "";
  button.setAttribute("aria-label", `Copy ${table.dataset.csv} as CSV`);
  button.addEventListener("click", async () => {
    try {
      await copy(csv(table));
      button.textContent = "Copied";
    } catch {
      button.textContent = "The browser did not let us copy";
    }
    setTimeout(() => { button.textContent = "Copy as CSV"; }, 2000);
  });
  around.after(button);
}

function addButtons() {
  document.querySelectorAll("table[data-csv]").forEach(addButton);
  document.querySelectorAll("button.copy").forEach((button) => {
    if (!button.previousElementSibling?.matches("table[data-csv], .scroll:has(table[data-csv])")) button.remove();
  });
}

addButtons();
document.addEventListener("refreshed", addButtons);
