import { html } from "./ui.js";

// Strokes in a square of 24, drawn for this dashboard.
const PATHS = {
  overview: "M4 13l4-6 4 8 3-5 5 0",
  fleet: "M4 5h6v6H4zM14 5h6v6h-6zM4 15h6v4H4zM14 15h6v4h-6z",
  requests: "M5 6h14M5 12h9M5 18h11M18 10l2 2-2 2",
  playground: "M5 5h14v11h-8l-4 3v-3H5z",
  tenants: "M9 11a3 3 0 100-6 3 3 0 000 6zM3 19c0-3 3-5 6-5s6 2 6 5M16 6a3 3 0 010 5M18 14c2 1 3 3 3 5",
  limits: "M4 17a8 8 0 1116 0M12 17l4-6",
  cost: "M12 4v16M16 7.500c-1-1-2.500-1.500-4-1.500-2.500 0-4 1.200-4 3s1.500 2.500 4 3 4 1.200 4 3-1.500 3-4 3c-1.500 0-3-.5-4-1.500",
  policies: "M5 7h8M17 7h2M5 17h2M11 17h8M15 5v4M9 15v4M5 12h14",
  scaling: "M4 20v-5h4v5zM10 20v-9h4v9zM16 20V7h4v13zM4 9l6-5M10 4H6.500M10 4v3.500",
  audit: "M7 4h10v16H7zM10 9h4M10 13h4",
  settings: "M12 9a3 3 0 100 6 3 3 0 000-6M12 3v3M12 18v3M3 12h3M18 12h3M5.600 5.600l2.200 2.200M16.200 16.200l2.200 2.200M5.600 18.400l2.200-2.200M16.200 7.800l2.200-2.200",
  more: "M5 12h.01M12 12h.01M19 12h.01",
  signout: "M10 5H5v14h5M14 8l4 4-4 4M9 12h9",
  close: "M6 6l12 12M18 6L6 18",
};

/** A small drawing beside a word that says the same; screen readers do not hear of it. */
export const Icon = ({ name }) => html`<svg class="icon" viewBox="0 0 24 24" aria-hidden="true" focusable="false">
  <path d=${PATHS[name]} /></svg>`;
