// The page of minidiff play. Each part is a module of its own; a finished drawing is handed to those that can use it.

import { get } from "./api.js";
import { Attention } from "./attention.js";
import { sayError } from "./dom.js";
import { Draw } from "./draw.js";
import { Noise } from "./noise.js";
import { Schedules } from "./schedules.js";

function whenSeen(id, act) {
  const watch = new IntersectionObserver((entries) => {
    if (!entries.some((entry) => entry.isIntersecting)) return;
    watch.disconnect();
    act();
  });
  watch.observe(document.getElementById(id));
}

try {
  const about = await get("/api/about");
  const attention = new Attention(about), noise = new Noise(about), schedules = new Schedules(about);
  new Draw(about, (result, panels) => {
    attention.take(result, panels);
    noise.take(result, panels);
  });
  whenSeen("noise", () => noise.ask());                     // so that a first drawing does not wait for them
  whenSeen("schedules", () => schedules.open());
  document.documentElement.dataset.ready = "yes";
} catch (error) {
  sayError("page-error", error);
}
