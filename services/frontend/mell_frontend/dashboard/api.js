// Asks this frontend's /admin. The key lives in sessionStorage only: this tab, until it is closed; never in an address.

const KEY = "mell-admin-key";
const LONGEST_WAIT_MS = 5_000;
const DENIED_MS = 60_000;

export class Refused extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

export function key() {
  return sessionStorage.getItem(KEY) ?? "";
}

export function setKey(value) {
  if (value) sessionStorage.setItem(KEY, value);
  else sessionStorage.removeItem(KEY);
}

function headers() {
  const value = key();
  return value ? { authorization: `Bearer ${value}` } : {};
}

async function refused(answer) {
  let message = `the frontend answers ${answer.status}`;
  try {
    message = (await answer.json()).error.message;
  } catch {
    // No error body of ours: a proxy's page, perhaps.
  }
  return new Refused(message, answer.status);
}

async function ask(method, path, body) {
  const options = { method, headers: headers(), cache: "no-store", credentials: "omit", redirect: "error" };
  if (body !== undefined) {
    options.body = JSON.stringify(body);
    options.headers["content-type"] = "application/json";
  }
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new Refused("the frontend does not answer", 0);
  }
  if (!answer.ok) throw await refused(answer);
  return answer.json();
}

const worker = (name) => `/admin/workers/${encodeURIComponent(name)}`;
const request = (name) => `/admin/requests/${encodeURIComponent(name)}`;

export const drain = (name, dryRun) => ask("POST", `${worker(name)}/drain`, { dry_run: dryRun });
export const undrain = (name) => ask("POST", `${worker(name)}/undrain`, {});
export const move = (name, to, mode) => ask("POST", `${request(name)}/migrate`, { to, mode });
export const explain = (name) => ask("GET", request(name));
export const pause = (paused) => ask("POST", `/admin/moves/${paused ? "pause" : "resume"}`, {});

// Reads /admin/live by fetch, for an EventSource cannot send a key. Comes back by itself after every end.
export class Feed {
  // `on` has state(data), trouble(message), lost(message), denied(message, status).
  constructor(on) {
    this.on = on;
    this.wake = () => {};
    this.stopper = new AbortController();
    this.sleeping = false;
    this.again = false;
    this.silence_ms = 15_000;
  }

  async run() {
    for (let wait_ms = 500; ; wait_ms = Math.min(2 * wait_ms, LONGEST_WAIT_MS)) {
      this.again = false;
      while (this.sleeping) await new Promise((done) => (this.wake = done));
      try {
        await this.watch(() => (wait_ms = 500));
      } catch (error) {
        if (!this.again) this.report(error);
        if (error.status === 401 || error.status === 403) wait_ms = DENIED_MS;
      }
      const again = this.again;
      this.again = false;
      if (again) continue;
      await Promise.race([
        new Promise((done) => setTimeout(done, wait_ms)),
        new Promise((done) => (this.wake = done)),
      ]);
    }
  }

  report(error) {
    if (this.sleeping) return;
    if (error instanceof Refused && (error.status === 401 || error.status === 403)) {
      this.on.denied(error.message, error.status);
    } else {
      this.on.lost(error instanceof Refused ? error.message : "the frontend does not answer");
    }
  }

  // After a change of the key, or when somebody looks again.
  retry() {
    this.again = true;
    this.stopper.abort();
    this.wake();
  }

  // Nobody looks: let the frontend rest.
  sleep(sleeping) {
    if (sleeping === this.sleeping) return;
    this.sleeping = sleeping;
    this.retry();
  }

  async watch(heard) {
    this.stopper = new AbortController();
    const { signal } = this.stopper;
    let timer = 0;
    const listen = () => {
      clearTimeout(timer);
      timer = setTimeout(() => this.stopper.abort(), this.silence_ms);
    };
    try {
      listen();
      const answer = await fetch("/admin/live", {
        headers: headers(), cache: "no-store", credentials: "omit", redirect: "error", signal,
      });
      if (!answer.ok) throw await refused(answer);
      const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
      let rest = "";
      for (;;) {
        const { value, done } = await reader.read();
        if (done) throw new Refused("the frontend has closed the connection", 0);
        listen();
        const events = (rest + value).split("\n\n");
        rest = events.pop();
        events.forEach((event) => this.take(event));
        if (events.length) heard();
      }
    } finally {
      clearTimeout(timer);
    }
  }

  take(event) {
    const parts = Object.fromEntries(event.split("\n").map((line) => line.split(/: (.*)/s, 2)));
    if (!parts.data) return;
    const data = JSON.parse(parts.data);
    if (parts.event === "state") {
      this.silence_ms = 5_000 + 5_000 * data.interval_s;
      this.on.state(data);
    } else if (parts.event === "trouble") {
      this.on.trouble(data.message);
    }
  }
}
