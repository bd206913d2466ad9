import { html, classes, useMemo, useState, useRef, useEffect } from "./ui.js";

const ROW_PX = 37;
const AHEAD = 12;
const WINDOWED_FROM = 100;

function compare(left, right) {
  if (left === right) return 0;
  if (left === null || left === undefined) return 1;
  if (right === null || right === undefined) return -1;
  return typeof left === "number" && typeof right === "number" ? left - right : String(left).localeCompare(String(right));
}

/**
 * A table that can be sorted by its headings; of many rows only those in sight are drawn.
 * @param {{label: string, columns: {key: string, label: string, value?: (row) => any, cell?: (row) => any,
 *   align?: "start"|"end", width?: string, sortable?: boolean}[], rows: any[], rowKey: (row) => string,
 *   onOpen?: (row) => void, sort?: [string, 1|-1], empty?: any, selected?: string}} props
 */
export function Table({ label, columns, rows, rowKey, onOpen, sort: first, empty, selected, maxHeight = "70vh" }) {
  const [sort, setSort] = useState(first ?? null);
  const [top, setTop] = useState(0);
  const place = useRef(null);

  const sorted = useMemo(() => {
    if (!sort) return rows;
    const column = columns.find((each) => each.key === sort[0]);
    const value = column?.value ?? ((row) => row[sort[0]]);
    return [...rows].sort((left, right) => sort[1] * compare(value(left), value(right)));
  }, [rows, sort]);

  const windowed = sorted.length > WINDOWED_FROM;
  const height = place.current?.clientHeight ?? 700;
  const begin = windowed ? Math.max(0, Math.floor(top / ROW_PX) - AHEAD) : 0;
  const end = windowed ? Math.min(sorted.length, begin + Math.ceil(height / ROW_PX) + 2 * AHEAD) : sorted.length;

  useEffect(() => {
    if (windowed && place.current) place.current.scrollTop = 0;
  }, [sort]);

  if (!rows.length && empty) return empty;
  const turn = (key) => setSort((now) => now?.[0] === key ? [key, -now[1]] : [key, 1]);
  return html`<div class=${classes("table-place", windowed && "windowed")} ref=${place} tabindex="0" role="region" aria-label=${label}
      style=${windowed ? { maxHeight } : null} onScroll=${windowed ? (event) => setTop(event.target.scrollTop) : null}>
    <table aria-rowcount=${sorted.length + 1}>
      <caption class="unseen">${label}</caption>
      <thead><tr>
        ${columns.map((column) => html`<th key=${column.key} scope="col" class=${column.align} style=${column.width ? { width: column.width } : null}
          aria-sort=${sort?.[0] === column.key ? (sort[1] === 1 ? "ascending" : "descending") : null}>
          ${column.sortable === false ? column.label : html`<button type="button" class="sort" onClick=${() => turn(column.key)}>
            ${column.label}<span aria-hidden="true" class="sign">${sort?.[0] === column.key ? (sort[1] === 1 ? "↑" : "↓") : ""}</span></button>`}
        </th>`)}
      </tr></thead>
      <tbody>
        ${begin > 0 && html`<tr class="spacer" aria-hidden="true"><td colspan=${columns.length} style=${{ height: `${begin * ROW_PX}px` }}></td></tr>`}
        ${sorted.slice(begin, end).map((row, at) => html`<tr key=${rowKey(row)} aria-rowindex=${begin + at + 2}
          class=${classes(onOpen && "opens", selected !== undefined && rowKey(row) === selected && "selected")}
          onClick=${onOpen ? (event) => { if (!event.target.closest("button, a, input")) onOpen(row); } : null}>
          ${columns.map((column, place) => html`<td key=${column.key} class=${column.align}>
            ${onOpen && place === 0
              ? html`<button type="button" class="open" onClick=${() => onOpen(row)}>${(column.cell ?? ((each) => each[column.key]))(row)}</button>`
              : (column.cell ?? ((each) => each[column.key] ?? "–"))(row)}
          </td>`)}
        </tr>`)}
        ${end < sorted.length && html`<tr class="spacer" aria-hidden="true"><td colspan=${columns.length} style=${{ height: `${(sorted.length - end) * ROW_PX}px` }}></td></tr>`}
      </tbody>
    </table>
  </div>`;
}
