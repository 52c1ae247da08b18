// One drawing at the server: begun, followed image by image and step by step, cancelled; picked up again after a reload.

import { base64, bits, get, keep, kept, post } from "./api.js";

const PAUSE = 300; // milliseconds between two looks at a drawing that is going on
const LOST = 1500; // after the server did not answer

const wait = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds));

export class Drawing {
  /** ``app.say``; ``onProgress()`` at each news, ``onResults(job)`` when a result is there, ``onEnd(job)`` at its end. */
  constructor(app, { onProgress, onResults, onEnd }) {
    Object.assign(this, { app, onProgress, onResults, onEnd });
    this.job = null;
  }

  async begin({ document: id, mask, prompt, n, seed, feather_mm }) {
    this.app.say("");
    const job = await post("/api/draw", { document: id, mask: base64(bits(mask)), prompt, n, seed, feather_mm });
    await this.follow(job);
  }

  /** The drawing that this tab began before it was loaded again, or the one that the server is at work on. */
  async pickUp(running) {
    const id = kept("job", null);
    if (id) {
      const job = await get(`/api/jobs/${id}`).catch(() => null);
      if (job) return this.follow(job);
    }
    if (running && ["queued", "running"].includes(running.state)) await this.follow(running);
  }

  async follow(job) {
    keep("job", job.id);
    this.job = job;
    let seen = 0, lost = false;
    for (;;) {
      if (job.results.length > seen) {
        seen = job.results.length;
        await this.onResults(job);
      }
      this.onProgress();
      if (!["queued", "running"].includes(job.state)) break;
      await wait(lost ? LOST : PAUSE);
      try {
        job = this.job = await get(`/api/jobs/${job.id}`);
        if (lost) this.app.say("The server answers again.");
        lost = false;
      } catch (error) {
        if (error.status !== 0) {
          this.job = null;
          keep("job", null);
          this.onProgress();
          throw error;
        }
        lost = true;
        this.app.say(error.message, "fault");
      }
    }
    this.job = null;
    keep("job", null);
    await this.onEnd(job);
    this.onProgress();
  }

  async cancel() {
    if (this.job) await post(`/api/jobs/${this.job.id}/cancel`);
  }

  /** The share that is done, 0 to 1. */
  get share() {
    const { image = 0, images = 1, step = 0, steps = 0 } = this.job ?? {};
    return Math.min(1, (image + (steps ? step / steps : 0)) / Math.max(1, images));
  }

  get told() {
    const { state, image, images, step, steps } = this.job;
    if (state === "queued") return "Waiting for the model, or for another drawing to end.";
    const which = images > 1 ? `image ${Math.min(image + 1, images)} of ${images}, ` : "";
    return steps ? `Drawing: ${which}step ${step} of ${steps}` : "Drawing: getting ready";
  }
}
