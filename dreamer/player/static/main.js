// The page: joins link, hands, lines and the controls.

import { Hands } from "./hands.js";
import { Line } from "./lines.js";
import { Link } from "./link.js";

const $ = (id) => document.getElementById(id);
const screens = [$("dream"), $("real")];
const pens = screens.map((screen) => screen.getContext("2d", { alpha: false, desynchronized: true }));
const pressedAt = new Map(); // number of an input -> when its key went down
const delays = []; // ms from key to drawn frame, the last few
const drawn = []; // when frames were drawn, the last two seconds
const SETTINGS = { num_steps: "num_steps", context: "context", seed: "seed", rate: "fps" }; // the field of each
let hands, controls, state = {}, lines = {}, waiting = null, drawing = false, number = Date.now(), shownPressed = [];

// ---- frames

async function draw() {
  if (drawing) return;
  drawing = true;
  try {
    while (waiting) {
      const { header, pictures } = waiting;
      waiting = null; // a newer frame may come in the meantime: then this one is followed at once
      const bitmaps = await Promise.all(pictures.map((picture) => createImageBitmap(picture)));
      await new Promise(requestAnimationFrame);
      bitmaps.forEach((bitmap, i) => {
        if (screens[i].width !== bitmap.width || screens[i].height !== bitmap.height)
          Object.assign(screens[i], { width: bitmap.width, height: bitmap.height });
        pens[i].drawImage(bitmap, 0, 0);
        bitmap.close();
      });
      link.send({ type: "seen", frame: header.frame });
      show(header, pictures.length > 1);
    }
  } finally {
    drawing = false;
  }
}

function show(header, hasReal) {
  const now = performance.now();
  drawn.push(now);
  while (drawn[0] < now - 2000) drawn.shift();
  for (const [input, at] of pressedAt)
    if (input <= header.input) {
      delays.push(now - at);
      document.body.dataset.delay = (now - at).toFixed(1); // for who measures from outside
      if (delays.length > 15) delays.shift();
      pressedAt.delete(input);
    }
  $("fps").textContent = drawn.length > 2 ? (((drawn.length - 1) * 1000) / (now - drawn[0])).toFixed(1) : "–";
  $("latency").textContent = delays.length ? `${Math.round(delays.toSorted((a, b) => a - b)[delays.length >> 1])} ms` : "–";
  if (header.ms) $("model").textContent = `${Math.round(header.ms)} ms`;
  if (header.index === 0) Object.values(lines).forEach((line) => line.clear());
  for (const [name, line] of Object.entries(lines)) line.push(header[name]);
  $("real-figure").hidden = !hasReal;
  $("real-state").textContent = header.real_over ? "episode over" : "";
  $("turn").textContent = header.camera ?? "";
  $("turn").hidden = !header.camera || header.camera === "still";
  if (header.policy) hands.show(header.buttons);
  else if (!state.policy) hands.show(shownPressed);
  document.body.dataset.frame = header.frame;
  document.body.dataset.index = header.index;
}

// ---- what the server says

const link = new Link({
  hello(message) {
    pressedAt.clear();
    $("name").textContent = message.name;
    for (const screen of screens) [screen.height, screen.width] = message.shape;
    document.documentElement.style.setProperty("--aspect", message.shape[1] / message.shape[0]);
    if (!hands) {
      hands = new Hands($("pad"), $("dream"), message.controls, hold);
      const known = { reward: message.has.policy, value: message.has.value, continue: message.has.policy };
      for (const name of ["reward", "value", "continue"]) if (known[name]) lines[name] = new Line($("signals"), name, `--${name}`);
      if (!Object.keys(lines).length) $("signals").textContent = "Phase 1 trains no reward, value or continue.";
    }
    $("offers").replaceChildren(...message.offers.map(offer));
    $("num_steps").replaceChildren(...message.num_steps.map((k) => new Option(k, k)));
    $("context").max = message.most_context;
    $("policy").disabled = !message.has.policy;
    $("policy").title = message.has.policy ? "" : "Phase 1 trains no agent that could play.";
    $("beside-label").hidden = $("environment").hidden = !message.has.env;
    controls = message.controls;
    hint();
  },

  state(message) {
    state = message;
    const { settings } = message;
    setPressed("pause", message.paused, message.paused ? "Play" : "Pause");
    setPressed("policy", !!message.policy, message.policy ? "Take over" : "Let the agent play");
    setPressed("record", message.recording, message.recording ? "Stop" : "Record");
    $("who").textContent = message.policy ? "agent plays" : "you play";
    $("who").classList.toggle("agent", !!message.policy);
    $("start").textContent = `from ${message.start}`;
    notice(message.over ? "The model says that the episode ends here. R starts again." : message.paused ? "paused: Play goes on, Step is one frame" : "");
    for (const [id, key] of Object.entries(SETTINGS)) if (document.activeElement !== $(id)) $(id).value = settings[key];
    if (message.policy) $("mode").value = message.policy;
    $("beside").checked = message.real;
    if (message.real_problem) problem(`Real beside dream: ${message.real_problem}`);
    for (const button of $("offers").children) button.setAttribute("aria-current", button.title === message.start);
    $("recorded").textContent = message.recording ? "Recording …" : message.recorded ? `${message.recorded} frames recorded.` : "Nothing recorded yet.";
    if (message.recording) $("stored").hidden = true;
    $("download").disabled = $("store").disabled = message.recorded < 2 && !message.recording;
  },

  frame(header, pictures) {
    waiting = { header, pictures };
    draw();
  },

  problem: (message) => problem(message.text),
  stored: (message) => {
    $("stored").textContent = `Stored as ${message.text}.`;
    $("stored").hidden = false;
  },
  link(name, text) {
    $("link").dataset.state = name;
    $("link").textContent = text;
    if (name !== "on") hands?.releaseAll();
  },
});

function setPressed(id, value, text) {
  $(id).setAttribute("aria-pressed", value);
  $(id).firstElementChild.textContent = text;
}

function hint() {
  const free = matchMedia("(pointer: coarse)").matches ? "Drag over the dream to turn." : "Click the dream to turn with the mouse. Arrow keys turn, too.";
  const camera = document.pointerLockElement ? "The mouse turns the camera; Escape lets it go." : free;
  const keys = controls.has_idle ? "" : "Nothing moves until you press a key: here every action does something.";
  $("hint").textContent = controls.has_camera ? camera : keys;
  $("hint").hidden = !$("hint").textContent;
}
document.addEventListener("pointerlockchange", hint);
document.addEventListener("pointerlockerror", () => problem("The browser does not give the mouse away so soon after Escape: click the dream again."));

function notice(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

let problemTimer;
function problem(text) {
  $("problem").textContent = text;
  $("problem").hidden = false;
  clearTimeout(problemTimer);
  problemTimer = setTimeout(() => ($("problem").hidden = true), 8000);
}

function offer({ episode, step, picture }) {
  const button = document.createElement("button"), image = document.createElement("img");
  button.title = `episode ${episode}, step ${step}`;
  image.src = picture;
  image.alt = button.title;
  button.append(image);
  button.onclick = () => link.send({ type: "restart", where: "recorded", episode, step });
  return button;
}

// ---- what the person does

function hold(pressed, turn) {
  shownPressed = pressed;
  number += 1;
  if (pressed.length && !state.policy && !state.paused) pressedAt.set(number, performance.now());
  if (pressedAt.size > 32) pressedAt.clear();
  link.send({ type: "input", number, pressed, turn });
}

const commands = {
  pause: () => link.send({ type: "pause", value: !state.paused }),
  step: () => link.send({ type: "step" }),
  restart: () => link.send({ type: "restart", where: "same" }),
  random: () => link.send({ type: "restart", where: "random" }),
  environment: () => link.send({ type: "restart", where: "environment" }),
  policy: () => ($("policy").disabled ? problem($("policy").title) : link.send({ type: "policy", mode: state.policy ? null : $("mode").value })),
  record: () => link.send({ type: "record", value: !state.recording }),
  store: () => link.send({ type: "store" }),
  download,
};
for (const [id, run] of Object.entries(commands)) $(id).addEventListener("click", run);

// Keys go to the element that has the focus. After a click on a button, a choice or a file they play again, and the space bar presses nothing
// twice; whoever walks the page with the keyboard stays where he is.
const BUTTONS = "button, .button, .check, input[type=file]";
let isByPointer = false;
const playOn = () => $("dream").focus({ preventScroll: true });
addEventListener("pointerdown", () => (isByPointer = true), true);
addEventListener("click", (event) => isByPointer && event.target.closest?.(BUTTONS) && playOn());
for (const name of ["change", "cancel"])
  addEventListener(name, (event) => isByPointer && event.target.closest?.("select, input[type=file]") && playOn(), true);

const shortcuts = { KeyP: "pause", Space: "pause", KeyN: "step", KeyR: "restart", KeyM: "policy" };
addEventListener("keydown", (event) => {
  const isButton = event.target.closest?.(BUTTONS), isTyping = !isButton && event.target.closest?.("input, select");
  isByPointer = false;
  if (isTyping && event.code === "Enter" && event.target.matches("input") && !event.target.form) playOn(); // what was typed holds
  if (!hands || isTyping || event.ctrlKey || event.altKey || event.metaKey) return;
  if (isButton && (event.code === "Space" || event.code === "Enter")) return; // the button's own keys
  if (hands.key(event, true)) event.preventDefault();
  else if (event.code in shortcuts && !event.repeat) {
    event.preventDefault();
    commands[shortcuts[event.code]]();
  }
});
addEventListener("keyup", (event) => hands?.key(event, false));

for (const [id, key] of Object.entries(SETTINGS))
  $(id).addEventListener("change", () => {
    const field = $(id);
    if (field.value !== "" && field.checkValidity()) return link.send({ type: "settings", [key]: Number(field.value) });
    problem(`${field.labels[0].firstChild.textContent.trim()}: ${field.validationMessage || "expected a number"}`);
    field.value = state.settings[key];
  });
$("beside").addEventListener("change", () => link.send({ type: "settings", real: $("beside").checked }));
$("mode").addEventListener("change", () => state.policy && link.send({ type: "policy", mode: $("mode").value }));
$("place").addEventListener("submit", (event) => {
  event.preventDefault();
  link.send({ type: "restart", where: "recorded", episode: Number($("episode").value), step: Number($("place-step").value) });
  playOn();
});
$("image").addEventListener("change", async () => {
  const [file] = $("image").files;
  $("image").value = "";
  if (file) await link.ask("image", { method: "POST", body: file }).catch((error) => problem(error.message));
});

async function download() {
  try {
    const file = await (await link.ask("recording.mp4")).blob();
    const anchor = Object.assign(document.createElement("a"), { href: URL.createObjectURL(file), download: "dream.mp4" });
    anchor.click();
    setTimeout(() => URL.revokeObjectURL(anchor.href), 10000);
  } catch (error) {
    problem(error.message);
  }
}

link.open();
