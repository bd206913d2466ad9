// How each model's replicas are chosen: by which policy, what a second one beside it would do, and what others would
// have made of the last requests.
import { html } from "../lib/ui.js";
import { useData } from "../lib/data.js";
import { useLive } from "../lib/live.js";
import { Card, Empty, ErrorBox, Loading, Page } from "../lib/parts.js";
import { Compare } from "./policies/compare.js";
import { Model } from "./policies/model.js";

export const title = "Policies";

const LEAD = "The policy decides which replica gets a request. Try another one in the shadow or by simulation, then switch; nothing under way is lost.";

export default function PoliciesPage() {
  const { data, error, reload } = useData("policies");
  const live = useLive("policies");
  const now = live !== null && data !== null && live.version >= data.version ? live : data;
  if (now === null) {
    return html`<${Page} title=${title} lead=${LEAD}>${error ? html`<${ErrorBox} error=${error} retry=${reload} />` : html`<div aria-busy="true"><${Loading} /></div>`}<//>`;
  }
  return html`<${Page} title=${title} lead=${LEAD}>
    ${error && html`<${ErrorBox} error=${error} retry=${reload} />`}
    ${now.silent_workers.length > 0 && html`<div class="error-box" role="alert"><p><strong>Worker ${now.silent_workers.join(", ")} does not answer.</strong>
      Its part of the numbers is missing here; it may be starting.</p></div>`}
    ${now.models.length === 0 && html`<${Card}><${Empty} title="No models yet">Each model under <code>models</code> of the configuration is shown here with its policy.<//><//>`}
    ${now.models.map((model) => html`<${Model} key=${model.name} model=${model} policies=${now.policies} version=${now.version} reload=${reload} />`)}
    ${now.models.length > 0 && html`<${Compare} models=${now.models} policies=${now.policies} job=${now.comparison} reload=${reload} />`}
  <//>`;
}
