// Tables of the class alr-sortable: a click on a column's head sorts by it, a second click the other way round. A
// cell's data-sort counts before its text, numbers before words; empty cells come last either way. No library, no
// network.
document.addEventListener("DOMContentLoaded", () => {
  const key = (row, column) => {
    const cell = row.cells[column];
    const text = cell.dataset.sort !== undefined ? cell.dataset.sort : cell.textContent.trim();
    return { text, number: text === "" ? NaN : Number(text) };
  };
  const compare = (a, b) => {
    if (!Number.isNaN(a.number) && !Number.isNaN(b.number)) return a.number - b.number;
    if (Number.isNaN(a.number) !== Number.isNaN(b.number)) return Number.isNaN(a.number) ? 1 : -1;
    return a.text.localeCompare(b.text, "en", { numeric: true });
  };
  document.querySelectorAll("table.alr-sortable").forEach((table) => {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const falling = head.getAttribute("aria-sort") === "ascending";
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", falling ? "descending" : "ascending");
        const rows = [...table.tBodies[0].rows].map((row) => ({ row, key: key(row, column) }));
        rows.sort((a, b) => {
          if ((a.key.text === "") !== (b.key.text === "")) return a.key.text === "" ? 1 : -1;
          return falling ? compare(b.key, a.key) : compare(a.key, b.key);
        });
        table.tBodies[0].append(...rows.map((entry) => entry.row));
      });
    });
  });
});
