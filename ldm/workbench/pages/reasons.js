// Why drawings are rejected: a short list, so that reasons can be counted.

export const REASONS = ["nothing to see", "another type", "another severity", "seam", "anatomy broken", "artefact"];
