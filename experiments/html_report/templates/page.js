"use strict";
// A link to a section that is folded unfolds it.
const unfold = () => document.getElementById(location.hash.slice(1))
  ?.querySelector(":scope > details")?.setAttribute("open", "");
addEventListener("hashchange", unfold);
unfold();
// A click on a heading sorts its table: numbers as numbers, what is missing last.
const number = text => parseFloat(text.replace(/^[^\d+-]+/, "").replace("\u2212", "-"));
function compare(a, b) {
  const [x, y] = [number(a), number(b)];
  if (isNaN(x) || isNaN(y)) return isNaN(x) - isNaN(y) || a.localeCompare(b);
  return x - y;
}
for (const heading of document.querySelectorAll("table.sortable th")) {
  const button = document.createElement("button");
  button.append(...heading.childNodes);
  heading.append(button);
  button.addEventListener("click", () => {
    const sign = heading.ariaSort === "ascending" ? -1 : 1;
    for (const other of heading.parentNode.cells) other.ariaSort = null;
    heading.ariaSort = sign > 0 ? "ascending" : "descending";
    const body = heading.closest("table").tBodies[0];
    const text = row => row.cells[heading.cellIndex].textContent.trim();
    const known = row => /name|letter/.test(heading.className) || !isNaN(number(text(row)));
    const rows = [...body.rows];
    rows.sort((a, b) => known(b) - known(a) || sign * compare(text(a), text(b)));
    body.append(...rows);
  });
}
