// The configuration in force, with where each value comes from; and what operators have put over it.
import { html, useState } from "../lib/ui.js";
import { post } from "../lib/api.js";
import { useData } from "../lib/data.js";
import { notify, notifyError } from "../lib/notify.js";
import { may } from "../lib/session.js";
import { Button, ErrorBox, Loading, Page } from "../lib/parts.js";
import { Effective } from "./settings/effective.js";
import { Overrides } from "./settings/overrides.js";
import { Reloaded } from "./settings/reloaded.js";

export const title = "Settings";

const LEAD = "What this gateway runs with. The file and the environment are changed where they are; what may be changed while it runs is listed first.";

export default function SettingsPage() {
  const settings = useData("settings");
  const overrides = useData("overrides");
  const [outcome, setOutcome] = useState(null);
  const [busy, setBusy] = useState(false);
  const refresh = async () => { await Promise.all([settings.reload(), overrides.reload()]); };

  const reload = async () => {
    setBusy(true);
    try {
      const told = await post("reload");
      setOutcome({ told });
      notify("The configuration has been read again.");
      await refresh();
    } catch (error) {
      setOutcome({ error });
      if (error.code !== "configuration_unusable") notifyError(error);
    } finally {
      setBusy(false);
    }
  };

  const failed = settings.error ?? overrides.error;
  const actions = may("operator") && html`<${Button} busy=${busy} onClick=${reload}>Reload configuration<//>`;
  if (settings.data === null || overrides.data === null) {
    return html`<${Page} title=${title} lead=${LEAD} actions=${actions}>${failed ? html`<${ErrorBox} error=${failed} retry=${refresh} />` : html`<div aria-busy="true"><${Loading} /></div>`}<//>`;
  }
  return html`<${Page} title=${title} lead=${LEAD} actions=${actions}>
    ${failed && html`<${ErrorBox} error=${failed} retry=${refresh} />`}
    ${outcome && html`<${Reloaded} ...${outcome} onClose=${() => setOutcome(null)} />`}
    <${Overrides} data=${overrides.data} reload=${refresh} />
    <${Effective} rows=${settings.data.settings} descriptions=${settings.data.descriptions} />
  <//>`;
}
