// Draw: one setting, or two from the same noise, step by step; the slider goes back over the steps.

import { place, stream } from "./api.js";
import { $, isAbort, make, picture, sayError, sentence, source } from "./dom.js";
import { Settings } from "./settings.js";

export class Draw {
  // finished(job, runs): called at the end of a job, with the panels of its runs
  constructor(about, finished) {
    this.about = about;
    this.finished = finished;
    this.a = new Settings($("settings-a"), "a", about, () => this.fit());
    this.b = new Settings($("settings-b"), "b", about, () => this.fit());
    this.b.controls.scale && (this.b.controls.scale.value = 0);
    $("compare").addEventListener("change", () => this.compare());
    $("another-seed").addEventListener("click", () => { $("seed").value = Math.floor(Math.random() * 1e6); });
    $("draw-form").addEventListener("submit", (event) => { event.preventDefault(); this.draw(); });
    $("stop-button").addEventListener("click", () => this.stop());
    this.compare();
  }

  compare() {
    $("settings-b").hidden = !$("compare").checked;
    this.fit();
  }

  // The number of pictures that the chosen systems take.
  fit() {
    if (!this.b) return;
    const most = Math.min(...this.settings().map((s) => s.chosen.most));
    $("count").max = most;
    if (Number($("count").value) > most) $("count").value = most;
  }

  settings() {
    return $("compare").checked ? [this.a, this.b] : [this.a];
  }

  stop() {
    this.abort?.abort();
  }

  async draw() {
    this.stop();
    const abort = this.abort = new AbortController();
    const number = (id) => ($(id).value === "" ? null : Number($(id).value));
    const runs = this.settings().map((s) => s.asked(number("count"), number("seed")));
    sayError("draw-error", null);
    $("draw-remark").textContent = "";
    $("draw-status").textContent = "Asking.";
    $("stop-button").disabled = false;
    const panels = runs.map((run, i) => new Panel(run, runs.length > 1 ? ["First setting", "Second setting"][i] : ""));
    let began = false;
    const begin = () => {                                   // until then the last pictures stay
      if (!began) $("drawn").replaceChildren(...panels.map((panel) => panel.root));
      began = true;
      $("drawn").classList.toggle("two", runs.length > 1);
    };
    try {
      await stream("/api/draw", { runs }, (event) => {
        if (event.event === "waiting" || event.event === "started") $("draw-status").textContent = place(event);
        if (event.event === "state") {
          begin();
          panels[event.run].add(event);
          $("draw-status").textContent = "Drawing.";
          this.progress(panels);
        }
        if (event.event === "remark") $("draw-remark").textContent = sentence(event.message);
        if (event.event === "done") {
          $("draw-status").textContent = "Done.";
          $("draw-progress").hidden = true;
          panels.forEach((panel, i) => panel.finish(event.result, i, event.commands[i]));
          this.finished(event.result, panels);
        }
      }, abort.signal);
    } catch (error) {
      if (isAbort(error)) {
        if (this.abort === abort) $("draw-status").textContent = "Stopped.";
      } else {
        $("draw-status").textContent = "";
        sayError("draw-error", error);
      }
    }
    if (this.abort === abort) {
      $("stop-button").disabled = true;
      $("draw-progress").hidden = true;
    }
  }

  // Of all runs together. It changes too often to be read out.
  progress(panels) {
    const sum = (name) => panels.reduce((total, panel) => total + (panel.last?.[name] ?? 0), 0);
    const [bar, text] = $("draw-progress").children;
    bar.max = sum("steps") || 1;
    bar.value = sum("step");
    text.textContent = `Step ${sum("step")} of ${sum("steps")}`;
    $("draw-progress").hidden = false;
  }
}

// The pictures of one run.
class Panel {
  constructor(run, title) {
    Object.assign(this, { run, title, states: [], follow: true });
    const id = title ? title.split(" ")[0].toLowerCase() : "only";
    this.x_t = make("div", { class: "grid" });
    this.x0_hat = make("div", { class: "grid" });
    this.boxes = {
      x_t: make("figure", { hidden: true }, this.x_t, make("figcaption", {}, "x_t, the state")),
      x0_hat: make("figure", { hidden: true }, this.x0_hat, make("figcaption", {}, "x0_hat, the guess")),
    };
    this.slider = make("input", { type: "range", id: `state-${id}`, min: 0, max: 0, value: 0 });
    this.now = make("output", { for: `state-${id}` });
    this.slider.addEventListener("input", () => {
      this.follow = Number(this.slider.value) === this.states.length - 1;
      this.show(Number(this.slider.value));
    });
    this.files = make("div", { class: "files" });
    this.root = make("article", { class: "run", "aria-label": title || "Pictures" },
      ...(title ? [make("h3", {}, title)] : []),
      make("p", { class: "caption" }, run.prompt || "(no caption)", make("span", {}, ` ${run.system}`)),
      make("div", { class: "pictures" }, this.boxes.x_t, this.boxes.x0_hat),
      make("div", { class: "field slider" }, make("label", { for: `state-${id}` }, "State ", this.now), this.slider),
      this.files);
  }

  add(event) {
    this.last = event;
    if (!event.x_t && !event.x0_hat) return;
    this.states.push(event);
    this.slider.max = this.states.length - 1;
    if (this.follow) this.show(this.states.length - 1);
  }

  show(i) {
    const state = this.shown = this.states[i];
    this.slider.value = i;
    const when = state.step === state.steps ? "the clean picture" : `t = ${state.t}`;
    this.now.textContent = `${state.step} of ${state.steps}, ${when}`;
    this.slider.setAttribute("aria-valuetext", this.now.textContent);
    const x0_hat = state.x0_hat ?? (state.step === state.steps ? null : this.states.slice(0, i + 1).findLast((s) => s.x0_hat)?.x0_hat);
    this.fill("x_t", state.x_t, when);
    this.fill("x0_hat", x0_hat, when);
  }

  fill(name, images, when) {
    const everHad = this.states.some((state) => state[name]);
    this.boxes[name].hidden = !everHad;
    const grid = this[name];
    if (!everHad) return;
    if (!images) {                                          // the noise itself: there is no guess yet
      grid.replaceChildren(make("p", { class: "empty" }, name === "x0_hat" ? "no guess yet" : "not decoded"));
      return;
    }
    grid.className = `grid of-${Math.ceil(Math.sqrt(images.length))}`;
    const alt = (k) => `${name}, picture ${k + 1} of ${images.length}, ${when}: ${this.run.prompt || "no caption"}`;
    if (grid.children.length !== images.length || grid.firstElementChild?.tagName !== "IMG")
      grid.replaceChildren(...images.map((image, k) => picture(image, alt(k))));
    images.forEach((image, k) => { grid.children[k].src = source(image); grid.children[k].alt = alt(k); });
  }

  finish(result, number, command) {
    this.result = result;
    const code = make("code", { tabindex: 0, "aria-label": "The command that makes the same pictures" }, command);
    const copy = make("button", { type: "button", class: "quiet", onclick: () => copied(code, copy) }, "Copy");
    const link = (kind) => make("a", { class: "button", href: `/api/result/${result}/${number}.${kind}`,
      download: `picture.${kind}` }, `Save ${kind.toUpperCase()}`);
    const gif = this.states.length > 1 ? [link("gif")] : [];
    this.files.replaceChildren(
      make("div", { class: "buttons" }, link("png"), ...gif),
      make("p", { class: "hint" }, "The same pictures from a terminal:"),
      make("div", { class: "command" }, code, copy));
  }
}

async function copied(code, button) {
  try {
    await navigator.clipboard.writeText(code.textContent);
  } catch {                                                 // no permission, or no secure page: select it instead
    const range = document.createRange();
    range.selectNodeContents(code);
    getSelection().removeAllRanges();
    getSelection().addRange(range);
    button.textContent = "Selected";
    return;
  }
  button.textContent = "Copied";
  setTimeout(() => { button.textContent = "Copy"; }, 2000);
}
