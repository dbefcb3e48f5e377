// Features changed on the live model, where a shell has one: what is pinned or selected, scaled or set.

import { useState } from "preact/hooks";

import { changesOf } from "./exports";
import { Store } from "./store";
import { InterventionData, Steered } from "./types";

interface Setting {
  how: "scale" | "value";
  amount: number;
  isOn: boolean;
}

const FIRST: Setting = { how: "scale", amount: 0, isOn: true };

export function SteerPanel({ store }: { store: Store }) {
  const [settings, setSettings] = useState<Record<string, Setting>>({});
  const [result, setResult] = useState<Steered | null>(null);
  const [state, setState] = useState<"idle" | "running" | string>("idle");
  const changes = changesOf(store).map((change) => {
    const { layer, pos, feature } = change.intervention;
    return { ...change, key: `${layer}:${pos}:${feature.join(",")}` };
  });
  const settingOf = (key: string) => settings[key] ?? FIRST;
  const update = (key: string, change: Partial<Setting>) => setSettings({ ...settings, [key]: { ...settingOf(key), ...change } });
  const asked = changes
    .filter(({ key }) => settingOf(key).isOn)
    .map(({ key, intervention }): InterventionData => {
      const { layer, pos, feature } = intervention;
      const { how, amount } = settingOf(key);
      return how === "scale" ? { layer, pos, feature, scale: amount } : { layer, pos, feature, value: amount };
    });
  const isWrong = asked.some((change) => !Number.isFinite(change.scale ?? change.value));
  const run = async () => {
    setState("running");
    try {
      const found = await store.host.steer!(asked, store.state.graph);
      setResult(found);
      setState("idle");
      const [first] = found.top;
      store.say(first ? `${first.token.trim()}: probability ${first.before.toFixed(3)} before, ${first.after.toFixed(3)} after.` : "Nothing changed.");
    } catch (error) {
      setState(error instanceof Error ? error.message : String(error));
    }
  };
  return (
    <div class="steer" data-testid="steer">
      <p class="quiet">Change what is pinned (or the feature selected) in the live model, and see the next token.</p>
      {changes.map(({ key, name, intervention }) => (
        <div key={key} class="change">
          <label class="check">
            <input type="checkbox" checked={settingOf(key).isOn} onChange={(event) => update(key, { isOn: event.currentTarget.checked })} />
            <span>
              {name}{" "}
              <span class="quiet">
                layer {intervention.layer}, {store.graph.data.tokens[intervention.pos]?.trim()}
              </span>
            </span>
          </label>
          <select
            value={settingOf(key).how}
            aria-label={`How ${name} is changed`}
            onChange={(event) => update(key, { how: event.currentTarget.value as Setting["how"] })}
          >
            <option value="scale">scale by</option>
            <option value="value">set to</option>
          </select>
          <input
            type="number"
            step="any"
            value={Number.isFinite(settingOf(key).amount) ? settingOf(key).amount : ""}
            aria-label={`By how much ${name} is changed`}
            data-testid="amount"
            onInput={(event) => update(key, { amount: event.currentTarget.valueAsNumber })}
          />
        </div>
      ))}
      {!changes.length && <p>Pin or select a feature first.</p>}
      <button type="button" class="main" disabled={!asked.length || isWrong || state === "running"} onClick={run} data-testid="run-steer">
        {state === "running" ? "Running …" : "Run"}
      </button>
      {state !== "idle" && state !== "running" && (
        <p role="alert" class="alert">
          {state}
        </p>
      )}
      {result?.inactive?.length ? <p class="quiet">Not active there: {result.inactive.join(", ")}.</p> : null}
      {result && (
        <table data-testid="steered">
          <thead>
            <tr>
              <th scope="col">Next token</th>
              <th scope="col">Before</th>
              <th scope="col">After</th>
              <th scope="col">Change</th>
            </tr>
          </thead>
          <tbody>
            {result.top.map(({ token, before, after }, i) => (
              <tr key={i}>
                <td>
                  <code>{token.trim() || "␣"}</code>
                </td>
                <td>{before.toFixed(3)}</td>
                <td>{after.toFixed(3)}</td>
                <td>
                  <span class={after >= before ? "bar plus" : "bar minus"} style={{ width: `${40 * Math.abs(after - before)}px` }} />
                  {after >= before ? "+" : "−"}
                  {Math.abs(after - before).toFixed(3)}
                </td>
              </tr>
            ))}
          </tbody>
        </table>
      )}
    </div>
  );
}
