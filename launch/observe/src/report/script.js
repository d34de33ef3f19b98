// Values under the pointer. The page is complete without it.
for (const svg of document.querySelectorAll("svg[data-chart]")) {
  const series = JSON.parse(svg.dataset.chart).filter(s => s.points.length);
  if (!series.length) continue;
  const page = document.body.dataset, number = key => Number(page[key]);
  const figure = svg.closest("figure");
  const first = Number(page.first), last = Number(page.last);
  let tip, cursor;
  const leave = () => { tip?.remove(); cursor?.remove(); tip = cursor = undefined; };
  svg.addEventListener("pointerleave", leave);
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width * number("width");
    const inner = number("width") - number("left") - number("right");
    const part = Math.min(1, Math.max(0, (x - number("left")) / inner));
    const wanted = first + part * (last - first);
    const near = points => points.reduce((a, b) => Math.abs(b[0] - wanted) < Math.abs(a[0] - wanted) ? b : a);
    const step = near(series.flatMap(s => s.points))[0];
    leave();
    tip = document.createElement("div");
    tip.className = "tip";
    tip.append(`step ${step.toLocaleString("en")}`);
    for (const s of series) {
      const point = near(s.points), row = document.createElement("div"), mark = document.createElement("i");
      const value = document.createElement("b");
      mark.className = `s${s.color}`;
      value.textContent = point[1];
      row.append(mark, `${s.name} `, value, point[0] === step ? "" : ` (step ${point[0]})`);
      tip.append(row);
    }
    figure.append(tip);
    const outer = figure.getBoundingClientRect(), left = event.clientX - outer.left;
    tip.style.left = `${Math.min(left + 14, figure.clientWidth - tip.offsetWidth - 6)}px`;
    tip.style.top = `${box.top - outer.top + 14}px`;
    cursor = document.createElementNS("http://www.w3.org/2000/svg", "line");
    const at = number("left") + (last > first ? (step - first) / (last - first) : 0.5) * inner;
    for (const [name, value] of [["x1", at], ["x2", at], ["y1", page.top], ["y2", number("height") - number("bottom")]])
      cursor.setAttribute(name, value);
    cursor.setAttribute("class", "cursor");
    svg.append(cursor);
  });
}
