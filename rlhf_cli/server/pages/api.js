// Requests to this server: the session's token goes along, and failures are told apart by what to do next.

export class Refused extends Error {
  constructor(status, detail, waitS) {
    super(detail);
    this.status = status;
    this.waitS = waitS;
  }
}
export class Offline extends Error {}

let token = "";

// Ask; returns the parsed body, or null for an empty answer.
export async function ask(method, path, body, more = {}) {
  const headers = { Accept: "application/json" };
  if (method !== "GET") headers["X-CSRF-Token"] = token;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let answer;
  let text;
  try {
    answer = await fetch(path, {
      method, headers, body: body === undefined ? undefined : JSON.stringify(body),
      credentials: "same-origin", redirect: "error", cache: "no-store", signal: AbortSignal.timeout(20000), ...more,
    });
    text = await answer.text();
  } catch {
    throw new Offline();
  }
  let parsed = null;
  try {
    parsed = text ? JSON.parse(text) : null;
  } catch {
    // a proxy's error page; its status says enough
  }
  if (!answer.ok) throw new Refused(answer.status, parsed?.detail ?? answer.statusText, Number(answer.headers.get("Retry-After")) || 5);
  return parsed;
}

// Who is signed in; null when nobody is.
export async function whoAmI() {
  try {
    const me = await ask("GET", "/session");
    token = me.csrf;
    return me;
  } catch (error) {
    if (error instanceof Refused && error.status === 401) return null;
    throw error;
  }
}
