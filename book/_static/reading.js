// Reading on any screen: figures open large, tables become cards on a phone (alr.css), what scrolls can be scrolled by
// keyboard.  No library, no network; where scripts are off, the page is as it was.
document.addEventListener("DOMContentLoaded", () => {
  const content = document.querySelector(".bd-content") ?? document.body;

  // ---------------------------------------------------------------- figures: a tap, a click or Enter shows one large
  const dialog = document.createElement("dialog");
  dialog.className = "alr-large";
  dialog.setAttribute("aria-label", "figure, enlarged");
  dialog.innerHTML = '<form method="dialog"><button>Close</button></form><div tabindex="0" role="group" aria-label="the figure"></div><p></p>';
  document.body.append(dialog);
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });      // beside it
  content.querySelectorAll("figure img, .cell_output img").forEach((img) => {
    if (img.closest("a, button, .alr-still")) return;
    const button = document.createElement("button");
    button.type = "button";
    button.className = "alr-enlarge";
    button.title = "Show this figure large";
    img.replaceWith(button);
    button.append(img);
    button.addEventListener("click", () => {
      const large = document.createElement("img");
      large.src = img.src;
      large.alt = img.alt;
      dialog.querySelector("div").replaceChildren(large);
      const caption = button.closest("figure")?.querySelector("figcaption") ?? button.closest(".cell")?.querySelector("figcaption");
      dialog.querySelector("p").textContent = caption ? caption.textContent.replace(/#$/, "").trim() : "";
      dialog.showModal();
    });
  });

  // ---------------------------------------------------------------- tables: every cell knows the head of its column
  // The roles say again what the elements say, because a table that is laid out as cards loses them.
  content.querySelectorAll("table.dataframe, table.alr-table, table.table").forEach((table) => {
    const bodies = [...table.tBodies].flatMap((body) => [...body.rows]);
    const lines = [...(table.tHead?.rows ?? [])];
    if (!lines.length || bodies.some((row) => row.querySelector("[rowspan]"))) return;
    const heads = [];
    for (const line of lines) {
      let column = 0;
      for (const cell of line.cells) {
        for (let k = 0; k < cell.colSpan; k += 1, column += 1) {
          const words = cell.textContent.trim();
          if (words) heads[column] = heads[column] && heads[column] !== words ? `${heads[column]}, ${words}` : words;
        }
        cell.setAttribute("role", cell.textContent.trim() ? "columnheader" : "cell");        // pandas leaves a corner empty
      }
      line.setAttribute("role", "row");
    }
    table.setAttribute("role", "table");
    table.tHead.setAttribute("role", "rowgroup");
    [...table.tBodies].forEach((body) => body.setAttribute("role", "rowgroup"));
    bodies.forEach((row) => {
      row.setAttribute("role", "row");
      let column = 0;
      for (const cell of row.cells) {
        cell.setAttribute("role", cell.tagName === "TH" && cell.textContent.trim() ? "rowheader" : "cell");
        if (heads[column] && cell.colSpan === 1) cell.dataset.label = heads[column];
        column += cell.colSpan;
      }
    });
    table.classList.add("alr-cards");
  });

  // ---------------------------------------------------------------- what scrolls is a stop of the keyboard, and nothing else
  const stops = new ResizeObserver((entries) => entries.forEach(({ target }) => {
    if (target.scrollWidth > target.clientWidth + 1) target.tabIndex = 0;
    else target.removeAttribute("tabindex");
  }));
  addEventListener("load", () => content.querySelectorAll(".alr-html, .text_html, .highlight pre, div.math")
    .forEach((area) => stops.observe(area)));

  // ---------------------------------------------------------------- a formula in a line that is wider than the line scrolls
  const formulas = () => content.querySelectorAll("mjx-container:not([display])").forEach((formula) => {
    formula.classList.remove("alr-wide");
    const line = formula.closest("p, li, td, dd, figcaption");
    if (line && formula.getBoundingClientRect().right > line.getBoundingClientRect().right + 1) {
      formula.classList.add("alr-wide");
      stops.observe(formula);
    }
  });
  addEventListener("load", () => globalThis.MathJax?.startup?.promise?.then(() => {
    formulas();
    addEventListener("resize", formulas);                                           // a phone that is turned
    content.querySelectorAll("mjx-container[display]").forEach((formula) => stops.observe(formula));
  }));

  // a fold is called what its words say, not what the theme calls all of them
  content.querySelectorAll("details > summary[aria-label]").forEach((summary) => summary.removeAttribute("aria-label"));
});
