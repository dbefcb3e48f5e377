// A long list of which only the rows in sight are in the page.

import { elementScroll, observeElementOffset, observeElementRect, Virtualizer } from "@tanstack/virtual-core";
import { ComponentChildren } from "preact";
import { useEffect, useLayoutEffect, useMemo, useReducer, useRef } from "preact/hooks";

interface Props {
  count: number;
  rowHeight: number;
  label: string;
  /** Row to scroll to and to put the focus on; -1 for none. */
  active: number;
  header: ComponentChildren;
  /** The cells of a row, each with the role "cell" or "gridcell". */
  row(index: number): ComponentChildren;
  rowClass?(index: number): string;
  onActivate(index: number): void;
  onMove(index: number): void;
  testId: string;
}

export function LongTable({ count, rowHeight, label, active, header, row, rowClass, onActivate, onMove, testId }: Props) {
  const box = useRef<HTMLDivElement>(null);
  const [, again] = useReducer((n: number) => n + 1, 0);
  const options = {
    count,
    getScrollElement: () => box.current,
    estimateSize: () => rowHeight,
    overscan: 8,
    scrollToFn: elementScroll,
    observeElementRect,
    observeElementOffset,
    onChange: () => again(0),
  };
  const virtual = useMemo(() => new Virtualizer<HTMLDivElement, Element>(options), []);
  virtual.setOptions(options);
  useEffect(() => virtual._didMount(), []);
  useLayoutEffect(() => virtual._willUpdate());
  useEffect(() => {
    if (active >= 0 && active < count) virtual.scrollToIndex(active, { align: "auto" });
  }, [active, count]);
  const onKeyDown = (event: KeyboardEvent) => {
    const page = Math.max(Math.floor((box.current?.clientHeight ?? 0) / rowHeight) - 2, 1);
    const last = count - 1;
    const now = Math.max(active, 0);
    const to = {
      ArrowDown: active < 0 ? 0 : now + 1,
      ArrowUp: now - 1,
      PageDown: now + page,
      PageUp: now - page,
      Home: 0,
      End: last,
    }[event.key];
    if (to !== undefined) onMove(Math.min(Math.max(to, 0), last));
    else if (event.key === "Enter" && active >= 0) onActivate(active);
    else return;
    event.preventDefault();
    event.stopPropagation();
  };
  return (
    <div class="table" role="grid" aria-label={label} aria-rowcount={count + 1} data-testid={testId}>
      <div class="row head" role="row" aria-rowindex={1}>
        {header}
      </div>
      <div ref={box} class="rows" role="rowgroup" tabIndex={0} aria-label={`${label}, rows`} onKeyDown={onKeyDown}>
        <div class="space" role="presentation" style={{ height: `${virtual.getTotalSize()}px` }}>
          {virtual.getVirtualItems().map((item) => (
            <div
              key={item.key}
              class={`row ${rowClass?.(item.index) ?? ""} ${item.index === active ? "active" : ""}`}
              role="row"
              aria-rowindex={item.index + 2}
              aria-selected={item.index === active}
              style={{ transform: `translateY(${item.start}px)`, height: `${rowHeight}px` }}
              onClick={() => onActivate(item.index)}
            >
              {row(item.index)}
            </div>
          ))}
        </div>
      </div>
    </div>
  );
}
