// The websocket: reconnects by itself, keeps its dream across lost connections and reloads of this tab, and takes frames apart.

const GIVE_UP = { 4400: "The page sent something wrong.", 4429: "Too many messages.", 4409: "This dream was opened in another window.", 4500: "The dream cannot begin:" };
const FULL = 4503;

export class Link {
  /** handlers: hello, state, frame(header, pictures), problem, stored, and link(state, text). */
  constructor(handlers) {
    this.handlers = handlers;
    this.token = location.hash.slice(1);
    this.tries = 0;
    this.opens = 0;
    addEventListener("online", () => this.retry());
    addEventListener("hashchange", () => location.reload());
  }

  get session() {
    return sessionStorage.getItem("session") ?? "";
  }

  open() {
    const query = new URLSearchParams({ token: this.token, session: this.session });
    this.socket = new WebSocket(`ws://${location.host}/dream?${query}`);
    this.socket.binaryType = "arraybuffer";
    this.socket.onmessage = (event) => (typeof event.data === "string" ? this.text(event.data) : this.frame(event.data));
    this.socket.onclose = (event) => this.closed(event);
  }

  text(data) {
    const message = JSON.parse(data);
    if (message.type === "hello") {
      sessionStorage.setItem("session", message.session);
      this.tries = 0;
      this.opens += 1;
      this.handlers.link("on", "connected");
    }
    this.handlers[message.type]?.(message);
  }

  frame(data) {
    const length = new DataView(data).getUint32(0, true);
    const header = JSON.parse(new TextDecoder().decode(new Uint8Array(data, 4, length)));
    let at = 4 + length;
    const pictures = header.sizes.map((size) => new Blob([data.slice(at, (at += size))], { type: "image/webp" }));
    this.handlers.frame(header, pictures);
  }

  closed(event) {
    if (event.code in GIVE_UP) {
      this.handlers.link("lost", `${GIVE_UP[event.code]} ${event.code === 4409 ? "Reload to take it back." : event.reason}`);
      return;
    }
    const isLong = this.tries >= (this.opens ? 5 : 2); // seconds; a server that was started anew has another link
    const text = event.code === FULL ? event.reason : isLong ? "no answer: is the server running, and this its newest link?" : "reconnecting";
    this.handlers.link("off", text);
    this.timer = setTimeout(() => this.retry(), Math.min(4000, 250 * 2 ** this.tries++));
  }

  retry() {
    clearTimeout(this.timer);
    if (this.socket.readyState === WebSocket.CLOSED) this.open();
  }

  send(message) {
    if (this.socket.readyState === WebSocket.OPEN) this.socket.send(JSON.stringify(message));
  }

  /** A plain request for this dream; throws an Error with the server's words. */
  async ask(path, options = {}) {
    const answer = await fetch(`${path}?${new URLSearchParams({ session: this.session })}`, {
      ...options,
      headers: { Authorization: `Bearer ${this.token}` },
    });
    if (!answer.ok) throw new Error(await answer.text());
    return answer;
  }
}
