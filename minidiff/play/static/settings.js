// The controls of one setting: a system, its prompt, and the options that it declares.

import { make } from "./dom.js";

const LABELS = {
  scale: "Guidance scale", steps: "Steps", sampler: "Sampler", negative: "Negative prompt", size: "Size, WxH",
  super_scale: "Guidance of the finer stages", super_steps: "Steps of the finer stages", prior_scale: "Guidance of the prior",
  prior_steps: "Steps of the prior", top_k: "Top k (0: all)", aug_level: "Noise on the small picture",
  interval_low: "Guidance above the noise level", interval_high: "Guidance up to the noise level",
};
const label = (name) => LABELS[name] ?? name.charAt(0).toUpperCase() + name.slice(1).replaceAll("_", " ");

export class Settings {
  // root: a fieldset; key: "a" or "b", the beginning of the ids
  constructor(root, key, about, changed) {
    this.key = key;
    this.about = about;
    this.changed = changed;
    this.system = make("select", { id: `${key}-system` },
      ...about.systems.map((s) => make("option", { value: s.key }, s.key)));
    this.prompt = make("input", {
      id: `${key}-prompt`, type: "text", list: `${key}-examples`, maxlength: about.longest_prompt, autocomplete: "off",
      "aria-describedby": `${key}-hint`,
    });
    this.hint = make("p", { id: `${key}-hint`, class: "hint" });
    this.options = make("div", { class: "options" });
    root.append(
      field("System", this.system), field("Prompt", this.prompt), this.hint,
      make("datalist", { id: `${key}-examples` }, ...about.examples.map((text) => make("option", { value: text }))),
      this.options);
    this.system.value = about.system;
    this.prompt.value = about.examples[0];
    this.system.addEventListener("change", () => this.show());
    this.show();
  }

  get chosen() {
    return this.about.systems.find((s) => s.key === this.system.value);
  }

  show() {
    const { reads_captions: reads, options, no_steps: none } = this.chosen;
    const before = this.controls ?? {};
    this.prompt.disabled = !reads;
    const hints = [reads ? "" : "It reads no captions.", none ? `No steps are shown: ${none}.` : ""];
    this.hint.textContent = hints.filter(Boolean).join(" ");
    this.controls = {};
    this.options.replaceChildren(...options.map((option) => {
      const control = this.control(option);
      // what both systems have, such as the number of steps of the same sampler, stays only if it was the default
      if (before[option.name]?.dataset.touched && control.tagName === before[option.name].tagName) {
        control.value = before[option.name].value;
        control.dataset.touched = "yes";
      }
      control.addEventListener("input", () => { control.dataset.touched = "yes"; });
      this.controls[option.name] = control;
      return field(label(option.name), control);
    }));
    this.changed();
  }

  control({ name, control, default: value, choices }) {
    const id = `${this.key}-${name}`;
    if (control === "choice") {
      const select = make("select", { id }, ...(value === null ? [make("option", { value: "" }, "the model's own")] : []),
        ...choices.map((choice) => make("option", { value: choice }, choice)));
      select.value = value ?? "";
      return select;
    }
    if (control === "flag") return make("input", { id, type: "checkbox", checked: value });
    if (control === "text") return make("input", { id, type: "text", value: value ?? "", autocomplete: "off" });
    return make("input", {
      id, type: "number", value: value ?? "", step: control === "whole" ? 1 : "any",
      inputmode: control === "whole" ? "numeric" : "decimal",
    });
  }

  // What the server is asked for. What is left empty keeps its default.
  asked(count, seed) {
    const options = {};
    for (const { name, control } of this.chosen.options) {
      const input = this.controls[name];
      if (control === "flag") options[name] = input.checked;
      else if (control === "whole" || control === "number") {
        if (input.validity.badInput) options[name] = "no number";
        else if (input.value !== "") options[name] = Number(input.value);
      } else if (input.value !== "") options[name] = input.value;
    }
    return { system: this.system.value, prompt: this.prompt.disabled ? "" : this.prompt.value, count, seed, options };
  }
}

export function field(text, control) {
  return make("div", { class: "field" }, make("label", { for: control.id }, text), control);
}
