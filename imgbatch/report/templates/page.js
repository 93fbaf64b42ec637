"use strict";
(() => {
  const create = (name, text) => {
    const element = document.createElement(name);
    element.textContent = text;
    return element;
  };
  const numeric = text => {
    const value = parseFloat(text.replace(/,/g, ""));
    return isNaN(value) ? null : value;
  };
  const compare = (a, b) => (typeof a === "number" ? a - b : a.localeCompare(b, undefined, { numeric: true }));

  function sort(table, index) {
    const head = table.tHead.rows[0].cells[index];
    const isNumber = head.classList.contains("n");
    const before = head.getAttribute("aria-sort");
    const descending = before ? before === "ascending" : isNumber;
    for (const cell of table.tHead.rows[0].cells) cell.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", descending ? "descending" : "ascending");
    const keyed = [...table.tBodies[0].rows].map(row => {
      const text = row.cells[index].textContent;
      return [isNumber ? numeric(text) : text, row];
    });
    keyed.sort(([a], [b]) => {
      if (a === null || b === null) return (a === null) - (b === null);
      return descending ? compare(b, a) : compare(a, b);
    });
    table.tBodies[0].append(...keyed.map(([, row]) => row));
  }

  function addFilter(box, table, number) {
    const rows = [...table.tBodies[0].rows];
    const textCells = row => [...row.cells].filter(cell => !cell.classList.contains("n"));
    const texts = rows.map(row => textCells(row).map(cell => cell.textContent).join("\n").toLowerCase());
    const bar = create("div", "");
    bar.className = "filter";
    const label = create("label", "Filter ");
    const input = create("input", "");
    input.type = "search";
    input.id = `filter-${number}`;
    label.htmlFor = input.id;
    const count = create("span", `${rows.length} rows`);
    count.className = "note";
    count.setAttribute("role", "status");
    input.addEventListener("input", () => {
      const wanted = input.value.trim().toLowerCase();
      let shown = 0;
      rows.forEach((row, at) => {
        row.hidden = !texts[at].includes(wanted);
        shown += !row.hidden;
      });
      count.textContent = `${shown} of ${rows.length} rows`;
    });
    bar.append(label, input, count);
    box.prepend(bar);
  }

  document.querySelectorAll(".table").forEach((box, number) => {
    const table = box.querySelector("table");
    if (table.tBodies[0].rows.length > 1) {
      [...table.tHead.rows[0].cells].forEach((head, index) => {
        const button = create("button", head.textContent);
        button.type = "button";
        button.addEventListener("click", () => sort(table, index));
        head.replaceChildren(button);
      });
    }
    if ("filter" in box.dataset) addFilter(box, table, number);
  });

  const details = [...document.querySelectorAll("details")];
  if (details.length) {
    const all = create("button", "Open all");
    all.type = "button";
    all.addEventListener("click", () => {
      const open = all.textContent === "Open all";
      details.forEach(each => { each.open = open; });
      all.textContent = open ? "Close all" : "Open all";
    });
    const tools = create("div", "");
    tools.className = "tools";
    tools.append(all);
    document.querySelector("main").prepend(tools);
  }
})();
