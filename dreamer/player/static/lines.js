// A live line: the last values of one signal, oldest at the left.

const LENGTH = 240;

export class Line {
  constructor(parent, name, color) {
    this.values = [];
    this.color = color;
    const row = document.createElement("div");
    const label = document.createElement("span");
    this.number = document.createElement("b");
    this.canvas = document.createElement("canvas");
    row.className = "signal";
    this.canvas.setAttribute("role", "img");
    this.canvas.setAttribute("aria-label", `${name} over the last frames`);
    this.number.textContent = "–";
    label.append(name, this.number);
    row.append(label, this.canvas);
    parent.append(row);
  }

  clear() {
    this.values.length = 0;
    this.number.textContent = "–";
    this.draw();
  }

  push(value) {
    if (value === null) return;
    this.values.push(value);
    if (this.values.length > LENGTH) this.values.shift();
    this.number.textContent = value.toFixed(2);
    this.draw();
  }

  draw() {
    const ratio = devicePixelRatio, { clientWidth, clientHeight } = this.canvas;
    const width = Math.round(clientWidth * ratio), height = Math.round(clientHeight * ratio);
    if (this.canvas.width !== width || this.canvas.height !== height) Object.assign(this.canvas, { width, height });
    const pen = this.canvas.getContext("2d"), values = this.values;
    pen.clearRect(0, 0, width, height);
    if (!values.length || !width) return;
    const low = Math.min(0, ...values), span = Math.max(1, ...values) - low, edge = 4 * ratio;
    const place = (i) => [(width * i) / (LENGTH - 1), height - edge - ((values[i] - low) / span) * (height - 2 * edge)];
    pen.strokeStyle = getComputedStyle(document.documentElement).getPropertyValue(this.color);
    pen.lineWidth = 1.75 * ratio;
    pen.lineJoin = "round";
    pen.beginPath();
    values.forEach((_, i) => pen.lineTo(...place(i)));
    pen.stroke();
    pen.beginPath();
    pen.arc(...place(values.length - 1), 2.5 * ratio, 0, 7);
    pen.fillStyle = pen.strokeStyle;
    pen.fill();
  }
}
