// Following a one-time link, and signing in with a secret. By script, because a form sends no origin to check.
import { ask, Offline } from "/pages/api.js";

const form = document.getElementById("form");
const secret = document.getElementById("secret");
const text = document.getElementById("text");

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  const button = form.querySelector("button");
  button.disabled = true;
  try {
    const { home } = await ask("POST", form.dataset.to, secret ? { secret: secret.value } : undefined);
    location.replace(home);
  } catch (error) {
    text.textContent = error instanceof Offline ? "No connection; try again in a moment." : error.message;
    text.className = "bad";
    button.disabled = error.status === 410;
  }
});
