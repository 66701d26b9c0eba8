"use strict";
// Sorting by a column, and light or dark. Text is only ever moved, never made into markup.
(() => {
  const root = document.documentElement;
  const theme = document.getElementById("theme");
  const dark = () => root.dataset.theme
    ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  const show = () => {
    theme.setAttribute("aria-pressed", `${dark()}`);
    theme.textContent = dark() ? "Light" : "Dark";
  };
  theme.addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    show();
  });
  show();

  const PREFIXES = { k: 1e3, M: 1e6, G: 1e9, T: 1e12, P: 1e15, E: 1e18 };

  /** The number that a cell begins with; null for an empty one, its text for one without. */
  function value(cell) {
    const text = cell.textContent.trim();
    if (!text) return null;
    const found = text.match(/^([+-]?[\d,]*\.?\d+(?:e[+-]?\d+)?)\s*([kMGTPE])?(?=$|[\s%])/);
    return found ? Number(found[1].replaceAll(",", "")) * (PREFIXES[found[2]] ?? 1) : text;
  }

  function compare(a, b) {
    if (a === null || b === null) return (a === null) - (b === null);
    return typeof a === "number" && typeof b === "number" ? a - b : `${a}`.localeCompare(`${b}`);
  }

  for (const table of document.querySelectorAll(".figures-table")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const down = head.getAttribute("aria-sort") === "ascending";
        for (const other of heads) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const rows = [...table.tBodies[0].rows].map((row) => [value(row.cells[column]), row]);
        rows.sort(([a], [b]) => (a === null || b === null ? compare(a, b) : (down ? -1 : 1) * compare(a, b)));
        table.tBodies[0].append(...rows.map(([, row]) => row));
      });
    });
  }
  root.dataset.ready = "yes";
})();
