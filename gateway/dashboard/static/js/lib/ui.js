// What a page draws with: Preact's functions under one name each, and `html`, which turns a template into elements.
// Whatever is put into a template is text; nothing in it is ever read as markup.
import { h, render, Fragment, createContext } from "../../vendor/preact.mjs";
import htm from "../../vendor/htm.mjs";

export {
  useState, useEffect, useLayoutEffect, useMemo, useRef, useCallback, useContext, useErrorBoundary, useId, useReducer,
} from "../../vendor/preact-hooks.mjs";
export { h, render, Fragment, createContext };

export const html = htm.bind(h);

/** Joins the class names that are there: `classes("a", wide && "b")`. */
export const classes = (...names) => names.filter(Boolean).join(" ");
