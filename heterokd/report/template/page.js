"use strict";
// Copy: where a page may not reach the clipboard (an artifact in a frame), the older way; where neither works, select it.
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
// Sort: a column's head orders its rows, numbers by value; empty cells stay below.
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
      rows.sort(([one], [other]) => {
        if (one === "" || other === "") { return (one === "") - (other === ""); }
        const order = typeof one === "number" && typeof other === "number" ? one - other : String(one).localeCompare(String(other));
        return rises ? order : -order;
      });
      table.tBodies[0].append(...rows.map(([, row]) => row));
    });
  }
}
