"use strict";
// Tables sort by their heads; a cell's data-value is its number, cells without one come last either way.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach((other) => other.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      sort(table.tBodies[0], column, up ? 1 : -1);
    });
  });
}

function sort(body, column, sign) {
  const numeric = [...body.rows].some((row) => row.cells[column].dataset.value !== undefined);
  const key = (row) => {
    const cell = row.cells[column];
    return numeric ? parseFloat(cell.dataset.value ?? "NaN") : cell.textContent.trim();
  };
  const compare = (a, b) => {
    if (!numeric) return sign * a.localeCompare(b, undefined, { numeric: true });
    if (Number.isNaN(a) || Number.isNaN(b)) return Number.isNaN(a) - Number.isNaN(b);
    return sign * (a - b);
  };
  const rows = [...body.rows].map((row) => [key(row), row]);
  rows.sort(([a], [b]) => compare(a, b));
  body.append(...rows.map(([, row]) => row));
}

// Boxes that scroll can be reached by keyboard, the others are no stop on the way.
const reach = () => {
  for (const box of document.querySelectorAll(".scroll")) {
    if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
    else box.removeAttribute("tabindex");
  }
};
addEventListener("resize", reach);
reach();

const theme = document.querySelector(".theme");
const dark = () => getComputedStyle(document.documentElement).colorScheme === "dark" ||
  (!document.documentElement.dataset.theme && matchMedia("(prefers-color-scheme: dark)").matches);
const name = () => { theme.textContent = dark() ? "Light colours" : "Dark colours"; };
theme.hidden = false;
theme.addEventListener("click", () => {
  document.documentElement.dataset.theme = dark() ? "light" : "dark";
  name();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", name);
name();
