// Keys, touch buttons and the mouse, as places in the server's list of buttons. Which keys there are, the server says.

const SENSITIVITY = 0.15; // degrees a pixel, as Minecraft's recordings have it
const SYMBOLS = { ArrowLeft: "←", ArrowRight: "→", ArrowUp: "↑", ArrowDown: "↓", Space: "space", ShiftLeft: "shift", Enter: "enter" };
const keyName = (code) => SYMBOLS[code] ?? code.replace(/^(Key|Digit)/, "");

export class Hands {
  /** changed(pressed, turn): called when something is pressed or released, and when the mouse has turned. */
  constructor(pad, screen, controls, changed) {
    this.changed = changed;
    this.holders = new Map(); // what holds a button (a key, a pointer) -> the button's place, in the order of pressing
    this.turn = [0, 0];
    this.byKey = new Map();
    this.byMouse = new Map();
    this.elements = controls.buttons.map((button, place) => {
      for (const code of button.keys) this.byKey.set(code, place);
      if (button.mouse !== null) this.byMouse.set(button.mouse, place);
      return this.element(button, place);
    });
    this.lay(pad, controls.buttons);
    if (controls.has_camera) this.camera(screen);
    addEventListener("blur", () => this.releaseAll());
    document.addEventListener("visibilitychange", () => document.hidden && this.releaseAll());
  }

  element(button, place) {
    const element = document.createElement("button");
    element.type = "button";
    element.append(button.label);
    for (const code of button.keys.slice(0, 1)) {
      const key = document.createElement("kbd");
      key.textContent = keyName(code);
      element.append(key);
    }
    element.title = button.keys.map(keyName).join(" or ");
    element.addEventListener("pointerdown", (event) => {
      event.preventDefault(); // keeps the focus where it is
      element.setPointerCapture(event.pointerId);
      this.press(`pointer ${event.pointerId}`, place);
    });
    for (const name of ["pointerup", "pointercancel", "lostpointercapture"])
      element.addEventListener(name, (event) => this.release(`pointer ${event.pointerId}`));
    element.addEventListener("contextmenu", (event) => event.preventDefault());
    element.addEventListener("click", (event) => {
      if (event.detail) return; // by pointer: done above
      this.press("click", place);
      this.release("click");
    });
    return element;
  }

  lay(pad, buttons) {
    const cross = document.createElement("div"), others = document.createElement("div"), taken = new Set();
    cross.className = "cross";
    others.className = "others";
    buttons.forEach(({ direction }, place) => {
      if (direction && !taken.has(direction)) {
        taken.add(direction);
        this.elements[place].classList.add(direction);
        cross.append(this.elements[place]);
      } else others.append(this.elements[place]);
    });
    pad.replaceChildren(...[cross, others].filter((part) => part.childElementCount));
  }

  camera(screen) {
    const turned = (event) => {
      this.turn[0] += event.movementY * SENSITIVITY;
      this.turn[1] += event.movementX * SENSITIVITY;
      this.pending ??= requestAnimationFrame(() => ((this.pending = null), this.tell()));
    };
    addEventListener("keydown", (event) => event.code === "Escape" && document.exitPointerLock()); // where the browser leaves it to the page
    const isCaught = () => document.pointerLockElement === screen;
    screen.addEventListener("click", () => isCaught() || screen.requestPointerLock?.()?.catch(() => {})); // pointerlockerror tells the page
    document.addEventListener("pointerlockchange", () => {
      if (isCaught()) return;
      for (const button of this.byMouse.keys()) this.release(`mouse ${button}`); // its going up is not seen any more
    });
    screen.addEventListener("pointermove", (event) => {
      if (isCaught() || (event.pointerType === "touch" && event.buttons)) turned(event);
    });
    for (const name of ["mousedown", "mouseup"]) // every button, also while another one is held
      screen.addEventListener(name, (event) => {
        if (!isCaught() || !this.byMouse.has(event.button)) return;
        const holder = `mouse ${event.button}`;
        name === "mousedown" ? this.press(holder, this.byMouse.get(event.button)) : this.release(holder);
      });
    screen.addEventListener("contextmenu", (event) => event.preventDefault());
  }

  /** Returns whether the key is one of ours. */
  key(event, isDown) {
    const place = this.byKey.get(event.code);
    if (place === undefined) return false;
    if (!isDown) this.release(event.code);
    else if (!event.repeat) this.press(event.code, place);
    return true;
  }

  press(holder, place) {
    if (this.holders.has(holder)) return;
    this.holders.set(holder, place);
    this.tell();
  }

  release(holder) {
    if (this.holders.delete(holder)) this.tell();
  }

  releaseAll() {
    if (!this.holders.size) return;
    this.holders.clear();
    this.tell();
  }

  tell() {
    const pressed = [...new Set(this.holders.values())];
    this.changed(pressed, this.turn);
    this.turn = [0, 0];
    this.show(pressed);
  }

  /** Light up the buttons that are pressed. */
  show(pressed) {
    this.elements.forEach((element, place) => element.classList.toggle("on", pressed.includes(place)));
  }
}
