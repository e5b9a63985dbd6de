// One image over t: predicted and measured mean and standard deviation of its pixels.

import { place, stream } from "./api.js";
import { $, isAbort, make, sayError, sentence, source } from "./dom.js";
import { Plot, ticks } from "./plot.js";

export class Noise {
  constructor(about) {
    $("noise-data").append(...about.datasets.map((name) => make("option", { value: name }, name)));
    $("noise-form").addEventListener("submit", (event) => { event.preventDefault(); this.ask(); });
    $("noise-t").addEventListener("input", () => this.show(Number($("noise-t").value)));
  }

  // A drawing is finished: its pictures can be drowned, too.
  take(result, panels) {
    for (const old of document.querySelectorAll("#noise-data option[value^=drawn]")) old.remove();
    panels.forEach((panel, i) => {
      const which = panels.length > 1 ? ["first drawing above", "second drawing above"][i] : "drawing above";
      $("noise-data").append(make("option", { value: `drawn:${result}:${i}` }, `the ${which}`));
    });
  }

  async ask() {
    this.abort?.abort();
    const abort = this.abort = new AbortController();
    const number = (id) => ($(id).value === "" ? null : Number($(id).value));
    sayError("noise-error", null);
    try {
      await stream("/api/noise", {
        data: $("noise-data").value, index: number("noise-index"), schedule: $("noise-schedule").value,
        T: number("noise-T"), seed: number("noise-seed"),
      }, (event) => {
        if (event.event === "waiting" || event.event === "started") $("noise-status").textContent = place(event);
        if (event.event === "noised") this.take_states(event);
      }, abort.signal);
    } catch (error) {
      if (isAbort(error)) return;
      $("noise-status").textContent = "";
      sayError("noise-error", error);
    }
  }

  take_states(event) {
    this.event = event;
    const { states, rows, T, caption } = event, xs = states.map((s) => s.t);
    $("noise-status").textContent = sentence(`image: ${caption || "no caption"}`);
    $("noised").hidden = false;
    this.marks = ["mean", "std"].map((name) => {
      const predicted = states.map((s) => s[name][0]), error = states.map((s) => s[name][1]), measured = states.map((s) => s[name][2]);
      const all = [...measured, ...predicted.map((p, i) => p + 2 * error[i]), ...predicted.map((p, i) => p - 2 * error[i])];
      const low = Math.min(...all), high = Math.max(...all), pad = 0.06 * (high - low) + 1e-6;
      const plot = new Plot(name === "mean" ? "Mean of x_t" : "Standard deviation of x_t",
        { low: -1, high: T - 1, label: "t", ticks: ticks(0, T - 1, 5) },
        { low: low - pad, high: high + pad, ticks: ticks(low, high, 5) });
      plot.band(xs, predicted.map((p, i) => p - 2 * error[i]), predicted.map((p, i) => p + 2 * error[i]));
      plot.line(xs, predicted, "one");
      plot.dots(xs, measured, "two");
      plot.legend(["predicted", "one"], ["measured", "two", "dot"]);
      $(`noise-plot-${name}`).replaceChildren(plot.root);
      return plot.mark();
    });
    const broken = rows.filter((row) => row.verdict !== "kept");
    $("noise-verdict").textContent = broken.length
      ? `Broken: ${broken.map((row) => `${row.computed}, at ${row.where}`).join("; ")}.`
      : "At every time the measured numbers agree with q(x_t | x_0). The band is two standard errors wide on each side.";
    $("noise-t").max = states.length - 1;
    const kept = Math.min(this.kept ?? Math.round(0.3 * (states.length - 1)), states.length - 1);
    $("noise-t").value = kept;
    this.show(kept);
  }

  show(i) {
    this.kept = i;
    const state = this.event.states[i], t = state.t;
    const now = t < 0 ? "the image itself" : `${t} of ${this.event.T - 1}`;
    $("noise-t-now").textContent = now;
    $("noise-t").setAttribute("aria-valuetext", `t = ${now}`);
    $("noise-x").src = source(state.x_t);
    $("noise-x").alt = `The image with noise, ${t < 0 ? "none yet" : `t = ${t}`}`;
    $("noise-mean").src = source(state.mean_picture);
    $("noise-mean").alt = `The image times alpha_t = ${state.alpha.toFixed(3)}`;
    const rows = [["mean of x_t", "alpha_t m_0", state.mean], ["standard deviation of x_t", "\u221a(alpha_t\u00b2 v_0 + sigma_t\u00b2)", state.std],
      ["standard deviation of x_t \u2212 alpha_t x_0", "sigma_t", state.noise]];
    $("noise-numbers").replaceChildren(...rows.map(([name, formula, [expected, error, measured]]) => make("tr", {},
      make("th", { scope: "row" }, name, make("span", { class: "formula" }, formula)),
      make("td", {}, `${fixed(expected)} \u00b1 ${error.toFixed(4)}`), make("td", {}, fixed(measured)))));
    for (const mark of this.marks) mark(t);
  }
}

const fixed = (a) => (Math.round(a * 1e4) / 1e4 + 0).toFixed(4).replace("-", "\u2212");
