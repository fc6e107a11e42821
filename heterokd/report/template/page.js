"use strict";
// Copy: without access to the clipboard (an artifact in a frame), by execCommand; if that fails, select the text.
for (const button of document.querySelectorAll(".copy")) {
  button.addEventListener("click", async () => {
    const source = button.previousElementSibling;
    let done = false;
    try {
      await navigator.clipboard.writeText(source.textContent);
      done = true;
    } catch {
      const area = document.createElement("textarea");
      area.value = source.textContent;
      area.style.position = "fixed";
      area.style.opacity = "0";
      document.body.append(area);
      area.select();
      done = document.execCommand("copy");
      area.remove();
    }
    if (!done) {
      getSelection().selectAllChildren(source);
    }
    button.textContent = done ? "Copied" : "Selected";
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  });
}
// Sort: a column's head sorts the rows, numbers by value; empty cells stay last.
const read = (row, place) => {
  const cell = row.cells[place];
  const text = (cell.dataset.value ?? cell.textContent).trim();
  return text === "" || Number.isNaN(Number(text)) ? text : Number(text);
};
for (const table of document.querySelectorAll("table.sortable")) {
  for (const [place, head] of [...table.tHead.rows[0].cells].entries()) {
    if ("fixed" in head.dataset) { continue; }
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const rises = head.getAttribute("aria-sort") === "descending";
      for (const other of table.tHead.rows[0].cells) { other.removeAttribute("aria-sort"); }
      head.setAttribute("aria-sort", rises ? "ascending" : "descending");
      const rows = [...table.tBodies[0].rows].map((row) => [read(row, place), row]);
      rows.sort(([first], [second]) => {
        if (first === "" || second === "") { return (first === "") - (second === ""); }
        const areNumbers = typeof first === "number" && typeof second === "number";
        const order = areNumbers ? first - second : String(first).localeCompare(String(second));
        return rises ? order : -order;
      });
      table.tBodies[0].append(...rows.map(([, row]) => row));
    });
  }
}
// A chart that continues at a side has a shadow there, as tables have.
const shade = () => {
  for (const drawing of document.querySelectorAll(".drawing")) {
    drawing.classList.toggle("shadowed", drawing.scrollWidth > drawing.clientWidth + 1);
  }
};
addEventListener("resize", shade);
shade();
// Filter: a choice of each named column's values shows the rows that match all choices.
for (const table of document.querySelectorAll("table[data-filter]")) {
  const heads = [...table.tHead.rows[0].cells].map((cell) => cell.textContent.trim());
  const rows = [...table.tBodies[0].rows];
  const bar = document.createElement("p");
  bar.className = "filters";
  const choices = [];
  const count = document.createElement("span");
  count.className = "soft";
  count.setAttribute("role", "status");
  const apply = () => {
    let shown = 0;
    for (const row of rows) {
      row.hidden = !choices.every(([place, choice]) => choice.value === "" || String(read(row, place)) === choice.value);
      shown += !row.hidden;
    }
    count.textContent = `${shown} of ${rows.length}`;
  };
  for (const name of table.dataset.filter.split(",")) {
    const place = heads.indexOf(name);
    const label = document.createElement("label");
    const choice = document.createElement("select");
    choice.append(new Option("all", ""));
    for (const value of [...new Set(rows.map((row) => String(read(row, place))))].sort()) {
      choice.append(new Option(value, value));
    }
    choice.addEventListener("change", apply);
    choices.push([place, choice]);
    label.append(`${name} `, choice);
    bar.append(label);
  }
  bar.append(count);
  apply();
  table.closest(".wide").before(bar);
}
// Print: folded parts that are marked for it are opened, and folded again afterwards.
const folded = () => document.querySelectorAll("details[data-print]");
let opened = [];
addEventListener("beforeprint", () => {
  opened = [...folded()].filter((part) => !part.open);
  for (const part of opened) { part.open = true; }
});
addEventListener("afterprint", () => { for (const part of opened) { part.open = false; } });
