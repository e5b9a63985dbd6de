// A schedule of one's own: points that are dragged or moved by the arrow keys, and the laws that judge the curve.

import { place, post, stream } from "./api.js";
import { pchip } from "./curve.js";
import { $, debounced, isAbort, make, sayError, sentence } from "./dom.js";
import { Plot, svg, ticks } from "./plot.js";

const POINTS = 11, GAP = 0.001, SAMPLES = 201;
const DELAY = 250;                                          // milliseconds without a move, then the laws are asked
const us = Array.from({ length: SAMPLES }, (_, i) => i / (SAMPLES - 1));
const logSnr = (abar) => (abar <= 0 ? null : abar >= 1 ? Infinity : Math.log10(abar / (1 - abar)));

export class Schedules {
  constructor(about) {
    $("schedule-names").append(...about.schedules.map((name) => make("option", { value: name })));
    $("schedule-start").append(...about.schedules.map((name) => make("option", { value: name }, name)));
    $("schedule-start").value = about.schedules.includes("cosine") ? "cosine" : about.schedules[0];
    $("schedule-form").addEventListener("submit", (event) => event.preventDefault());
    $("schedule-start").addEventListener("change", () => this.start());
    $("schedule-T").addEventListener("input", debounced(() => { this.beside(); this.judge(); }, DELAY));
    $("schedule-beside").addEventListener("input", debounced(() => this.beside(), DELAY));
    this.later = debounced(() => this.judge(), DELAY);
    this.draw();
  }

  async open() {
    await this.start();
    await this.beside();
  }

  // The points of a named schedule.
  async start() {
    try {
      const table = await post("/api/schedule", { schedule: $("schedule-start").value, T: 1000 });
      const us = table.t.map((t) => (t + 1) / table.T);
      const read = pchip([0, ...us], [1, ...table.alpha_bar]);
      this.points = Array.from({ length: POINTS }, (_, i) => [i / (POINTS - 1), i ? read(i / (POINTS - 1)) : 1]);
      // where the table is nearly flat the points still fall
      for (let i = POINTS - 1; i > 0; i--) {
        const next = i === POINTS - 1 ? -GAP : this.points[i + 1][1];
        this.points[i][1] = Math.min(Math.max(this.points[i][1], next + GAP, 0), 1 - GAP * i);
      }
      this.move();
    } catch (error) {
      sayError("schedule-error", error);
    }
  }

  async beside() {
    try {
      const T = Number($("schedule-T").value);
      sayError("schedule-error", null);
      this.other = $("schedule-beside").value.trim() ? await post("/api/schedule", { schedule: $("schedule-beside").value.trim(), T }) : null;
    } catch (error) {
      this.other = null;
      sayError("schedule-error", error);
    }
    const xs = this.other ? this.other.t.map((t) => (t + 1) / this.other.T) : [];
    this.lines.other.setAttribute("d", this.other ? this.abar.path([0, ...xs], [1, ...this.other.alpha_bar]) : "");
    this.lines.otherSnr.setAttribute("d", this.other ? this.snr.path(xs, this.other.log_snr) : "");
  }

  draw() {
    const u = { low: 0, high: 1, label: "u = (t + 1) / T", ticks: ticks(0, 1, 5) };
    this.abar = new Plot("alpha_bar", u, { low: 0, high: 1, ticks: ticks(0, 1, 5) });
    const powers = [-4, -2, 0, 2, 4].map((p) => [p, `10${[..."\u207b"].filter(() => p < 0).join("")}${"\u2070\u00b9\u00b2\u00b3\u2074"[Math.abs(p)]}`]);
    this.snr = new Plot("SNR = alpha_bar / (1 \u2212 alpha_bar)", u, { low: -4, high: 4, ticks: powers });
    this.lines = { other: this.abar.line([], [], "two"), otherSnr: this.snr.line([], [], "two"),
      own: this.abar.line([], [], "one"), ownSnr: this.snr.line([], [], "one") };
    this.abar.legend(["yours", "one"], ["beside it", "two"]);
    this.abar.root.setAttribute("role", "group");           // its points can be moved
    this.handles = Array.from({ length: POINTS - 1 }, (_, k) => this.handle(k + 1));
    this.abar.root.append(...this.handles);
    $("curve").replaceChildren(this.abar.root);
    $("snr").replaceChildren(this.snr.root);
  }

  handle(i) {
    const handle = svg("g", { class: "handle", tabindex: 0, role: "slider", "aria-label": `alpha_bar at u = ${(i / (POINTS - 1)).toFixed(1)}`,
      "aria-orientation": "vertical" }, svg("circle", { class: "reach", r: 16 }), svg("circle", { class: "knob", r: 6 }));
    handle.addEventListener("pointerdown", (event) => {
      handle.setPointerCapture(event.pointerId);
      handle.focus();
      event.preventDefault();
    });
    handle.addEventListener("pointermove", (event) => {
      if (!handle.hasPointerCapture(event.pointerId)) return;
      const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(this.abar.root.getScreenCTM().inverse());
      const zero = this.abar.up(0), one = this.abar.up(1);
      this.set(i, (zero - at.y) / (zero - one));
    });
    handle.addEventListener("keydown", (event) => {
      const steps = { ArrowUp: 0.01, ArrowRight: 0.01, ArrowDown: -0.01, ArrowLeft: -0.01, PageUp: 0.1, PageDown: -0.1, Home: -2, End: 2 };
      if (!(event.key in steps)) return;
      event.preventDefault();
      this.set(i, this.points[i][1] + steps[event.key]);
    });
    return handle;
  }

  // A point moves between its neighbours, so that the curve falls.
  set(i, value) {
    const least = i === POINTS - 1 ? 0 : this.points[i + 1][1] + GAP, most = this.points[i - 1][1] - GAP;
    this.points[i][1] = Math.min(Math.max(value, least), most);
    this.move();
  }

  move() {
    const read = pchip(this.points.map((p) => p[0]), this.points.map((p) => p[1])), values = us.map(read);
    this.lines.own.setAttribute("d", this.abar.path(us, values));
    this.lines.ownSnr.setAttribute("d", this.snr.path(us.slice(1), values.slice(1).map(logSnr)));
    this.handles.forEach((handle, k) => {
      const [u, value] = this.points[k + 1];
      const range = { "aria-valuenow": value.toFixed(3), "aria-valuemin": (this.points[k + 2]?.[1] ?? 0).toFixed(3), "aria-valuemax": this.points[k][1].toFixed(3) };
      for (const [name, text] of Object.entries(range)) handle.setAttribute(name, text);
      handle.setAttribute("transform", `translate(${this.abar.across(u)} ${this.abar.up(value)})`);
    });
    this.abort?.abort();                                    // the laws of the last curve are of no use any more
    this.later();
  }

  async judge() {
    this.abort?.abort();
    if (!this.points) return;
    const abort = this.abort = new AbortController();
    const rows = [];
    try {
      await stream("/api/judge", { points: this.points, T: Number($("schedule-T").value) }, (event) => {
        if (event.event === "waiting" || event.event === "started") $("schedule-status").textContent = place(event);
        if (event.event === "table") $("schedule-notes").textContent = event.notes.map((note) => sentence(`note: ${note}`)).join(" ");
        if (event.event === "rows") {
          rows.push(...event.rows);
          $("schedule-status").textContent = "Judging.";
        }
        if (event.event === "judged") this.show(rows);
      }, abort.signal);
    } catch (error) {
      if (isAbort(error)) return;
      $("schedule-status").textContent = "";
      sayError("schedule-error", error);
    }
  }

  show(rows) {
    const count = (verdict) => rows.filter((row) => row.verdict === verdict).length;
    const broken = rows.filter((row) => row.verdict === "BROKEN");
    $("schedule-status").textContent = broken.length
      ? `${count("kept")} laws kept, ${broken.length} broken.`
      : `All ${count("kept")} laws are kept${count("skipped") ? `, ${count("skipped")} not applicable` : ""}.`;
    $("broken").replaceChildren(...broken.map((row) => make("div", { class: "broken" },
      make("p", {}, make("strong", {}, `Broken: ${row.law}. `), `${row.computed}: measured ${short(row.measured)}, ${row.side ? `must be ${row.side}` : "expected"} ${short(row.expected)}.`),
      make("p", {}, make("code", {}, row.formula)), row.where ? make("p", {}, sentence(row.where)) : "")));
    $("law-rows").replaceChildren(...rows.map((row) => make("tr", { class: row.verdict },
      make("th", { scope: "row" }, row.law), make("td", {}, row.computed),
      make("td", {}, row.reason ? "" : short(row.error)), make("td", {}, row.reason ? "" : short(row.tolerance)),
      make("td", {}, row.reason ? `does not apply: ${row.reason}` : row.verdict.toLowerCase()))));
  }
}

const short = (a) => (a === null ? "not finite" : String(Number(a.toPrecision(3))));
