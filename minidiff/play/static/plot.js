// Curves as SVG, in the page's own colours.

const NS = "http://www.w3.org/2000/svg";
const SIZE = { width: 460, height: 300, left: 46, right: 12, top: 30, bottom: 40 };

export function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS(NS, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

export class Plot {
  // x, y: {low, high, label, ticks: [[value, text], ...]}
  constructor(title, x, y) {
    Object.assign(this, { x, y });
    const { width, height, left, right, top, bottom } = SIZE;
    this.across = (value) => left + ((value - x.low) / (x.high - x.low)) * (width - left - right);
    this.up = (value) => height - bottom - ((value - y.low) / (y.high - y.low)) * (height - top - bottom);
    this.root = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": title });
    this.root.append(svg("text", { x: left, y: 16, class: "plot-title" }, title));
    for (const [value, text] of x.ticks) {
      this.root.append(svg("line", { class: "rule", x1: this.across(value), x2: this.across(value), y1: top, y2: height - bottom }),
        svg("text", { class: "tick middle", x: this.across(value), y: height - bottom + 16 }, text));
    }
    for (const [value, text] of y.ticks) {
      this.root.append(svg("line", { class: "rule", x1: left, x2: width - right, y1: this.up(value), y2: this.up(value) }),
        svg("text", { class: "tick end", x: left - 7, y: this.up(value) + 4 }, text));
    }
    this.root.append(svg("text", { class: "tick middle", x: (left + width - right) / 2, y: height - 6 }, x.label));
    this.legendAt = width - right;
  }

  path(xs, ys) {
    let d = "", pen = false;
    ys.forEach((y, i) => {
      const inside = y !== null && Number.isFinite(y);
      const at = inside ? Math.min(Math.max(y, this.y.low), this.y.high) : 0;
      if (inside) d += `${pen ? "L" : "M"}${this.across(xs[i]).toFixed(2)} ${this.up(at).toFixed(2)}`;
      pen = inside;
    });
    return d;
  }

  line(xs, ys, name) {
    const line = svg("path", { class: `line ${name}`, d: this.path(xs, ys) });
    this.root.append(line);
    return line;
  }

  band(xs, low, high) {
    const there = this.path(xs, high), back = this.path([...xs].reverse(), [...low].reverse());
    this.root.append(svg("path", { class: "band", d: `${there}${back.replace("M", "L")}Z` }));
  }

  dots(xs, ys, name) {
    xs.forEach((x, i) => this.root.append(svg("circle", { class: `dot ${name}`, cx: this.across(x), cy: this.up(ys[i]), r: 2.4 })));
  }

  // A line at a value of x that can be moved.
  mark() {
    const line = svg("line", { class: "mark", y1: SIZE.top, y2: SIZE.height - SIZE.bottom });
    this.root.append(line);
    return (x) => { line.setAttribute("x1", this.across(x)); line.setAttribute("x2", this.across(x)); };
  }

  legend(...entries) {
    let at = this.legendAt;
    for (const [text, name, shape] of entries.reverse()) {
      const label = svg("text", { class: "tick end", x: at, y: 16 }, text);
      at -= 6.4 * text.length + 8;
      this.root.append(label, shape === "dot" ? svg("circle", { class: `dot ${name}`, cx: at - 4, cy: 12, r: 2.6 })
        : svg("line", { class: `line ${name}`, x1: at - 14, x2: at, y1: 12, y2: 12 }));
      at -= 24;
    }
  }
}

export function ticks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((k) => k * power).find((s) => s >= rough);
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + 1e-9 * step; k++) {
    found.push([k * step, String(Number((k * step).toPrecision(6)) + 0).replace("-", "\u2212")]);
  }
  return found;
}
