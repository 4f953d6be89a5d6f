"use strict";
(() => {
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const one = (selector, within = document) => within.querySelector(selector);
  const { store, slug, filter, only } = document.body.dataset;
  const place = JSON.parse(store);
  const lists = { keep: `${slug}-keep.csv`, drop: `${slug}-drop.csv` };

  // Copy buttons, where the browser has a clipboard to give.
  for (const button of all(".copy")) {
    button.hidden = !navigator.clipboard;
    button.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(JSON.parse(button.dataset.copy));
        button.textContent = "Copied";
      } catch {
        button.textContent = "Select and copy";
      }
      setTimeout(() => { button.textContent = "Copy"; }, 2000);
    });
  }

  // Tables that sort by the column whose heading is pressed; again turns the order round.
  for (const table of all("table.sortable")) {
    for (const heading of all("th[data-sort]", table)) {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...heading.childNodes);
      heading.append(button);
      button.addEventListener("click", () => sort(table, heading));
    }
  }
  function sort(table, heading) {
    const numeric = heading.dataset.sort === "number";
    const now = heading.getAttribute("aria-sort");
    const rising = now ? now === "descending" : !numeric; // numbers begin with the largest
    for (const other of all("th[aria-sort]", table)) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", rising ? "ascending" : "descending");
    const column = [...heading.parentNode.children].indexOf(heading);
    const value = (row) => row.children[column].dataset.value;
    const compare = numeric
      ? (a, b) => Number(value(a)) - Number(value(b))
      : (a, b) => value(a).localeCompare(value(b), undefined, { numeric: true });
    const body = table.tBodies[0];
    body.append(...[...body.rows].sort((a, b) => (rising ? compare(a, b) : compare(b, a))));
  }

  // Marks: key -> "keep" or "drop". They are kept in this browser, for this run.
  const review = one(".review");
  const items = all(".item");
  if (review) {
    let remembered = true;
    let marks = read();

    function read() {
      try {
        const pairs = JSON.parse(localStorage.getItem(place) ?? "[]");
        return new Map(pairs.filter(([key, mark]) => typeof key === "string" && mark in lists));
      } catch {
        remembered = false;
        return new Map();
      }
    }
    function write() {
      try {
        if (marks.size) localStorage.setItem(place, JSON.stringify([...marks]));
        else localStorage.removeItem(place);
        remembered = true;
      } catch {
        remembered = false;
      }
    }
    const keys = (mark) => [...marks].filter(([, given]) => given === mark).map(([key]) => key);

    function show() {
      for (const item of items) {
        const mark = marks.get(JSON.parse(item.dataset.key)) ?? "";
        item.dataset.marked = mark;
        for (const button of all("[data-mark]", item)) {
          button.setAttribute("aria-pressed", String(button.dataset.mark === mark));
        }
      }
      const kept = keys("keep").length;
      const dropped = keys("drop").length;
      one("#marked").textContent = marks.size
        ? `${kept} marked keep, ${dropped} marked drop.`
        : "No marks yet: Keep is for false alarms, Drop for what was missed.";
      one("#memory").textContent = !marks.size ? "" : remembered
        ? "This browser remembers them."
        : "This browser does not remember them: save before you leave.";
      for (const button of all("[data-save]", review)) button.disabled = !keys(button.dataset.save).length;
      one("#clear").disabled = !marks.size;
      one("#then").hidden = !marks.size;
      const options = Object.keys(lists).filter((mark) => keys(mark).length).map((mark) => ` --${mark} ${lists[mark]}`);
      const line = JSON.parse(kept ? filter : only) + options.join("");
      one("#then code").textContent = line;
      one("#then .copy").dataset.copy = JSON.stringify(line);
    }

    for (const item of items) {
      const key = JSON.parse(item.dataset.key);
      one(".marks", item).hidden = false;
      for (const button of all("[data-mark]", item)) {
        button.addEventListener("click", () => {
          if (marks.get(key) === button.dataset.mark) marks.delete(key);
          else marks.set(key, button.dataset.mark);
          write();
          show();
        });
      }
    }
    for (const button of all("[data-save]", review)) {
      button.addEventListener("click", () => {
        const quoted = keys(button.dataset.save).sort().map((key) => `"${key.replaceAll('"', '""')}"`);
        const url = URL.createObjectURL(new Blob([["key", ...quoted, ""].join("\n")], { type: "text/csv" }));
        const link = document.createElement("a");
        link.href = url;
        link.download = lists[button.dataset.save];
        link.click();
        setTimeout(() => URL.revokeObjectURL(url), 60000);
        one("#then").open = true;
      });
    }
    one("#clear").addEventListener("click", () => {
      if (!confirm(`Forget ${marks.size} marks?`)) return;
      marks = new Map();
      write();
      show();
    });
    addEventListener("storage", (event) => {
      if (event.key === place || event.key === null) {
        marks = read();
        show();
      }
    });
    review.hidden = false;
    show();
  }

  // On paper everything is open, but for the counts that the bars show.
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = all("details:not([open])").filter((part) => !part.closest(".histogram"));
    for (const part of opened) part.open = true;
  });
  addEventListener("afterprint", () => {
    for (const part of opened) part.open = false;
  });
})();
