"use strict";

// Tooltips: what a mark's <title> says, shown at once, by pointer and by keyboard focus.
const tip = document.getElementById("tip");

function show(mark, x, y) {
  tip.textContent = mark.getAttribute("aria-label");
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  const left = Math.min(Math.max(8, x + 14), innerWidth - box.width - 8);
  const top = y + 18 + box.height < innerHeight ? y + 18 : y - box.height - 12;
  tip.style.transform = `translate(${Math.round(left)}px, ${Math.round(Math.max(8, top))}px)`;
}

function hide() {
  tip.hidden = true;
}

function showFocused() {
  const mark = document.activeElement;
  if (!mark || !mark.matches(".mark:focus-visible")) return;
  const box = mark.getBoundingClientRect();
  show(mark, box.left + box.width / 2, box.top + box.height / 2);
}

for (const mark of document.querySelectorAll(".mark")) {
  const title = mark.querySelector("title");
  mark.setAttribute("aria-label", title.textContent);
  title.remove(); // else the browser shows it as well, a second later
  mark.addEventListener("pointermove", (event) => show(mark, event.clientX, event.clientY));
  mark.addEventListener("pointerleave", hide);
  mark.addEventListener("focus", () => requestAnimationFrame(showFocused)); // by then it has been scrolled into view
  mark.addEventListener("blur", hide);
}
addEventListener("scroll", showFocused, { passive: true });

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") hide();
});

// A chart is one stop for Tab; arrow keys go from mark to mark.
for (const chart of document.querySelectorAll(".marks")) {
  const marks = [...chart.querySelectorAll(".mark")];
  const stop = (at) => marks.forEach((mark, i) => mark.setAttribute("tabindex", i === at ? 0 : -1));
  stop(0);
  chart.addEventListener("keydown", (event) => {
    const at = marks.indexOf(document.activeElement);
    const last = marks.length - 1;
    const next = {
      ArrowRight: Math.min(at + 1, last), ArrowDown: Math.min(at + 1, last),
      ArrowLeft: Math.max(at - 1, 0), ArrowUp: Math.max(at - 1, 0), Home: 0, End: last,
    }[event.key];
    if (at < 0 || next === undefined) return;
    event.preventDefault();
    stop(next);
    marks[next].focus();
  });
}

// Tables: a click on a heading sorts, a second click turns the order round; long ones show their first rows.
const first = 25;
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const more = table.closest(".ops").querySelector("button.more");
  let all = body.rows.length <= first + 5;

  const cut = () => {
    [...body.rows].forEach((row, i) => (row.hidden = !all && i >= first));
    more.hidden = all;
  };
  const value = (row, column) => {
    const cell = row.cells[column];
    return cell.dataset.value === undefined ? cell.textContent.trim() : Number(cell.dataset.value);
  };
  const sort = (heading) => {
    const column = heading.cellIndex;
    const now = heading.getAttribute("aria-sort");
    const numbers = heading.classList.contains("number");
    const order = now ? (now === "ascending" ? "descending" : "ascending") : numbers ? "descending" : "ascending";
    for (const each of table.tHead.rows[0].cells) each.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", order);
    const sign = order === "ascending" ? 1 : -1;
    const compare = (a, b) => (numbers ? a - b : a.localeCompare(b, "en", { numeric: true }));
    const rows = [...body.rows];
    rows.sort((a, b) => sign * compare(value(a, column), value(b, column)));
    body.append(...rows);
    cut();
  };

  table.tHead.addEventListener("click", (event) => {
    if (event.target.closest("button")) sort(event.target.closest("th"));
  });
  more.addEventListener("click", () => {
    all = true;
    cut();
  });
  table.addEventListener("reveal", () => {
    all = true;
    cut();
  });
  cut();
}

// A mark leads to its op's row: bring it to light, wherever it is.
function aim() {
  for (const row of document.querySelectorAll("tr.aimed")) row.classList.remove("aimed");
  const row = document.getElementById(location.hash.slice(1));
  if (!row || !row.matches("table.sortable tr")) return;
  if (row.hidden) row.closest("table").dispatchEvent(new Event("reveal"));
  const folded = row.closest("details.other-version");
  if (folded) folded.open = true; // not every browser does so itself
  row.classList.add("aimed");
  row.scrollIntoView({ block: "center" });
}
addEventListener("hashchange", aim);
aim();
