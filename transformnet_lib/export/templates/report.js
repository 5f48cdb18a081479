// What the page can do beyond being read; without this script it is complete.
"use strict";
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const button = (text, label, work) => {
  const made = document.createElement("button");
  made.type = "button";
  made.textContent = text;
  made.ariaLabel = label;
  made.addEventListener("click", () => work(made));
  return made;
};

// Light or dark: what the system says, until somebody chooses
const dark = matchMedia("(prefers-color-scheme: dark)");
const toggle = button("◐", "Switch between light and dark", () => {
  const now = document.documentElement.dataset.theme ?? (dark.matches ? "dark" : "light");
  document.documentElement.dataset.theme = now === "dark" ? "light" : "dark";
});
toggle.className = "theme";
document.body.prepend(toggle);

// Code can be copied, headings have links to themselves
for (const code of all("pre.code")) {
  const copy = button("Copy", "Copy this code", async made => {
    await navigator.clipboard.writeText(code.querySelector("code").textContent);
    made.textContent = "Copied";
    setTimeout(() => { made.textContent = "Copy"; }, 1500);
  });
  code.append(copy);
}
for (const heading of all("main :is(h2, h3, h4)[id]")) {
  const link = document.createElement("a");
  link.href = `#${heading.id}`;
  link.className = "permalink";
  link.textContent = "#";
  link.ariaLabel = `Link to “${heading.textContent.trim()}”`;
  heading.append(link);
}

// The contents show where the reader is
const entries = new Map(all("nav a").map(link => [decodeURIComponent(link.hash.slice(1)), link]));
const seen = new IntersectionObserver(changes => {
  for (const change of changes.filter(each => each.isIntersecting)) {
    for (const link of entries.values()) link.removeAttribute("aria-current");
    entries.get(change.target.id)?.setAttribute("aria-current", "true");
  }
}, { rootMargin: "0px 0px -70% 0px" });
for (const id of entries.keys()) seen.observe(document.getElementById(id));

// Long tables: sorted by a column within each block, filtered by a text, saved as CSV; their header stays in sight
const text = (row, column) => row.cells[column]?.textContent.trim() ?? "";
const superscripts = "⁰¹²³⁴⁵⁶⁷⁸⁹";
const number = string => parseFloat(
  string.replaceAll(",", "").replaceAll("−", "-").replaceAll("⁻", "-")
    .replace(/[⁰¹²³⁴⁵⁶⁷⁸⁹]/g, digit => superscripts.indexOf(digit)).replace(/×10(?=-?\d)/, "e"));
function compare(a, b) {
  const [x, y] = [number(a), number(b)];
  if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y) || a.localeCompare(b);
  return x - y;
}
for (const table of all("table")) {
  const rows = all("tbody tr", table);
  const heads = all("thead tr:last-child :is(th, td)", table);
  // A cell that spans rows would stay behind when they move
  if (rows.length <= 12 || !heads.length || all("tbody [rowspan]", table).length) continue;
  table.parentElement.classList.add("long");
  heads.forEach((head, column) => {
    const sort = button("", `Sort by ${head.textContent || "this column"}`, () => {
      const falling = head.ariaSort === "ascending";
      for (const other of heads) other.removeAttribute("aria-sort");
      head.ariaSort = falling ? "descending" : "ascending";
      for (const body of table.tBodies) {
        const kept = [...body.rows].filter(row => row.cells.length === heads.length);
        kept.sort((a, b) => compare(text(a, column), text(b, column)) * (falling ? -1 : 1));
        body.append(...kept);
      }
    });
    if (head.querySelector("a")) return;
    sort.append(...head.childNodes);
    head.append(sort);
  });
  const filter = document.createElement("input");
  filter.type = "search";
  filter.placeholder = "Filter rows";
  filter.ariaLabel = "Show only rows with this text";
  filter.addEventListener("input", () => {
    const wanted = filter.value.trim().toLowerCase();
    for (const body of table.tBodies) {
      const rows = [...body.rows];
      const heading = rows[0].cells.length < heads.length ? rows.shift() : null;
      const words = row => [...row?.cells ?? []].map(cell => cell.textContent).join(" ").toLowerCase() + " ";
      for (const row of rows) row.hidden = !(words(heading) + words(row)).includes(wanted);
      if (heading) heading.hidden = rows.every(row => row.hidden);
    }
  });
  const save = button("CSV", "Save this table as CSV", () => {
    const field = cell => `"${cell.textContent.trim().replaceAll('"', '""')}"`;
    const lines = all("tr", table).filter(row => !row.hidden).map(row => [...row.cells].map(field).join(","));
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([lines.join("\r\n")], { type: "text/csv" }));
    link.download = `${table.parentElement.id || "table"}.csv`;
    link.click();
    URL.revokeObjectURL(link.href);
  });
  const tools = document.createElement("p");
  tools.className = "tools";
  tools.append(filter, save);
  table.parentElement.before(tools);
}

// A picture can be looked at in full width
for (const image of all("figure img")) {
  const enlarge = () => {
    const dialog = document.createElement("dialog");
    dialog.ariaLabel = "The picture, enlarged";
    const large = image.cloneNode();
    large.removeAttribute("tabindex");
    large.removeAttribute("title");
    dialog.append(button("×", "Close", () => dialog.close()), large);
    dialog.addEventListener("close", () => dialog.remove());
    document.body.append(dialog);
    dialog.showModal();
  };
  image.tabIndex = 0;
  image.title = "Enlarge (click, or Enter)";
  image.addEventListener("click", enlarge);
  image.addEventListener("keydown", event => { if (event.key === "Enter") enlarge(); });
}
