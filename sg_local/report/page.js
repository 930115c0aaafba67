"use strict";
// Search, choose and sort the rows of each table; at first a page of them. Without it all rows are there.
const FIRST = 30;
for (const box of document.querySelectorAll("[data-rows]")) {
  const body = box.querySelector("tbody");
  const rows = [...body.rows];
  const texts = new Map(rows.map((row) => [row, row.textContent.toLowerCase()]));
  const search = box.querySelector("input");
  const kind = box.querySelector("select");
  const told = box.querySelector("output");
  const heads = [...box.querySelectorAll("thead th")];
  const all = document.createElement("button");
  let limit = FIRST;

  function show() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let n = 0;
    for (const row of rows) {
      const isOfKind = !kind.value || row.dataset.kind === kind.value;
      const fits = isOfKind && words.every((word) => texts.get(row).includes(word));
      n += fits;
      row.hidden = !fits || n > limit;
    }
    all.hidden = n <= limit;
    all.textContent = `Show all ${n}`;
    told.textContent = n === rows.length ? `${n} rows` : `${n} of ${rows.length} rows`;
  }

  function sort(head) {
    const column = heads.indexOf(head);
    const falls = head.getAttribute("aria-sort") === "ascending";
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", falls ? "descending" : "ascending");
    // A cell that also shows an interval says what it is sorted by. A row without a value comes last, either way.
    const keyOf = (cell) => cell.dataset.value ?? cell.textContent.trim();
    const keys = new Map(rows.map((row) => [row, keyOf(row.cells[column])]));
    const hasNumbers = [...keys.values()].every((key) => !Number.isNaN(Number(key)));
    const order = new Intl.Collator("en", { numeric: true });
    const compare = hasNumbers ? (a, b) => a - b : order.compare;
    rows.sort((a, b) => {
      const [one, other] = [keys.get(a), keys.get(b)];
      if (!one || !other) return !one - !other;
      return compare(one, other) * (falls ? -1 : 1);
    });
    body.append(...rows);
    show();
  }

  for (const head of heads) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => sort(head));
  }
  all.type = "button";
  all.className = "all";
  all.addEventListener("click", () => {
    limit = Infinity;
    show();
  });
  box.append(all);
  function reveal() {
    const wanted = rows.find((row) => row.id && `#${row.id}` === location.hash);
    if (!wanted) return;
    search.value = kind.value = "";
    limit = Infinity;
    show();
    wanted.scrollIntoView({ block: "center" });
  }

  addEventListener("hashchange", reveal);
  search.addEventListener("input", show);
  kind.addEventListener("change", show);
  box.querySelector(".controls").hidden = false;
  show();
  reveal();
}
