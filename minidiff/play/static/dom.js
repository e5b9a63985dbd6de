// Elements, and sentences on the page.

export const $ = (id) => document.getElementById(id);

// make("button", {type: "button", class: "quiet"}, "Copy")
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children);
  return element;
}

export function sayError(id, error) {
  const line = $(id);
  line.textContent = error ? sentence(error.message ?? String(error)) : "";
  line.hidden = !error;
}

// The server's sentences begin in lower case and have no full stop, as on a terminal. A symbol keeps its case.
export function sentence(text) {
  const first = /^[a-z]+[ ,:]/.test(text) ? text.charAt(0).toUpperCase() : text.charAt(0);
  return first + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");
}

export function picture(base64, alt) {
  return make("img", { src: source(base64), alt, class: "pixels" });
}

export const source = (base64) => `data:image/png;base64,${base64}`;

// Calls f once it has not been asked for `delay` milliseconds.
export function debounced(f, delay) {
  let timer;
  return (...given) => {
    clearTimeout(timer);
    timer = setTimeout(() => f(...given), delay);
  };
}

export const isAbort = (error) => error.name === "AbortError";
