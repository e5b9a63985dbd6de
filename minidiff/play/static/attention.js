// Which word drew which stroke: the maps of one drawn picture, a word large and all words small.

import { place, stream } from "./api.js";
import { $, isAbort, make, sayError, sentence, source } from "./dom.js";

export class Attention {
  constructor(about) {
    this.about = about;
    $("attention-form").addEventListener("submit", (event) => { event.preventDefault(); this.ask(); });
    $("attention-run").addEventListener("change", () => this.fit());
  }

  // A drawing is finished: its pictures can be asked about.
  take(result, panels) {
    this.result = result;
    this.panels = panels;
    $("attention-run-field").hidden = panels.length < 2;
    if (panels.length < 2) $("attention-run").value = "0";
    $("attention-button").disabled = false;
    this.fit();
  }

  get panel() {
    return this.panels[Number($("attention-run").value)];
  }

  fit() {
    const { run } = this.panel;
    $("attention-picture").replaceChildren(
      ...Array.from({ length: run.count }, (_, i) => make("option", { value: i }, `${i + 1} of ${run.count}`)));
  }

  async ask() {
    this.abort?.abort();
    const abort = this.abort = new AbortController();
    const panel = this.panel, picture = Number($("attention-picture").value);
    const index = $("attention-when").value === "mean" ? null : panel.shown.index;
    sayError("attention-error", null);
    try {
      const request = { result: this.result, run: Number($("attention-run").value), picture, index };
      await stream("/api/attention", request, (event) => {
        if (event.event === "waiting" || event.event === "started") $("attention-status").textContent = place(event);
        if (event.event === "maps") this.show(event, panel, picture);
      }, abort.signal);
    } catch (error) {
      if (isAbort(error)) return;
      $("attention-status").textContent = "";
      sayError("attention-error", error);
    }
  }

  show({ words, times }, panel, picture) {
    const clean = panel.states.at(-1).x_t[picture];
    const when = times.length > 1 ? `mean over ${times.length} steps` : `t = ${times[0]}`;
    $("attention-status").textContent = sentence(when);
    const large = make("figure", { class: "large" });
    const choose = (word, button) => {
      for (const other of thumbs.children) other.setAttribute("aria-pressed", other === button);
      large.replaceChildren(over(clean, word.map, `Where the pixels read ${word.text}`),
        make("figcaption", {}, make("strong", {}, word.text), ` gets ${percent(word.share)} of the attention, ${when}`));
    };
    const thumbs = make("div", { class: "thumbs", role: "group", "aria-label": "Words" });
    for (const word of words) {
      const button = make("button", { type: "button", class: "word", "aria-pressed": false,
        onclick: () => choose(word, button) }, over(clean, word.map, ""),
      make("span", {}, word.text), make("span", { class: "share" }, percent(word.share)));
      thumbs.append(button);
    }
    const own = words.map((word, i) => (word.text.startsWith("<") ? -1 : i)).filter((i) => i >= 0);
    const first = own.length ? own.reduce((a, b) => (words[b].share > words[a].share ? b : a)) : 0;
    $("words").replaceChildren(large, thumbs);
    choose(words[first], thumbs.children[first]);
  }
}

function over(base, map, alt) {
  return make("span", { class: "stack" }, make("img", { src: source(base), alt: "", class: "pixels" }),
    make("img", { src: source(map), alt, class: "pixels" }));
}

const percent = (share) => `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %`;
