"use strict";
for (const table of document.querySelectorAll("table.sorts")) {
  const body = table.tBodies[0];
  const given = [...body.rows];
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const now = head.getAttribute("aria-sort");
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      const next = { ascending: "descending", descending: null }[now] ?? (now ? null : "ascending");
      if (next) head.setAttribute("aria-sort", next);
      body.append(...(next ? sorted(given, column, next === "ascending" ? 1 : -1) : given));
    });
  });
}

// Lines by one column; those without a value stand last, whichever the direction.
function sorted(rows, column, sign) {
  const key = (row) => {
    const cell = row.cells[column];
    const text = cell.firstChild ? cell.firstChild.textContent.trim() : "";
    return { number: cell.dataset.value === undefined ? null : Number(cell.dataset.value), text };
  };
  const numbers = rows.some((row) => key(row).number !== null);
  const empty = (k) => (numbers ? k.number === null : k.text === "" || k.text === "–");
  return [...rows].sort((one, other) => {
    const a = key(one), b = key(other);
    if (empty(a) || empty(b)) return empty(a) - empty(b);
    return sign * (numbers ? a.number - b.number : a.text.localeCompare(b.text, undefined, { numeric: true }));
  });
}

for (const label of document.querySelectorAll(".filter")) {
  const input = label.querySelector("input"), output = label.querySelector("output");
  const rows = [...label.nextElementSibling.querySelectorAll("tbody tr")];
  label.hidden = false;
  input.addEventListener("input", () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
    }
    output.textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length}`;
  });
}

// Notes and recipes that are folded belong on paper too.
let opened = [];
addEventListener("beforeprint", () => {
  opened = [...document.querySelectorAll("details.notes:not([open]), details.recipe:not([open])")];
  for (const one of opened) one.open = true;
});
addEventListener("afterprint", () => {
  for (const one of opened) one.open = false;
});
