// Changes of the configuration in force: each names the version that it changes, and each can be undone.
import { get, patch } from "./api.js";
import { notify, notifyError } from "./notify.js";

/** The version of the overrides now. */
const versionNow = async () => (await get("overrides")).version;

/**
 * Sends one change of the overrides and offers to undo it. Resolves to the gateway's answer, null where it was refused
 * (which has been said then).
 * @param {(version: number) => Promise<object>} send what to send; its answer has `version` and `undo`
 * @param {number} version of what the page shows
 * @param {string} text what has been done
 * @param {() => unknown} reload has the page fetch what it shows
 */
export async function steer(send, version, text, reload) {
  try {
    const told = await send(version);
    const undo = async () => {
      await patch("overrides", told.undo, { version: await versionNow() });
      await reload();
    };
    const changed = told.changed.length > 0;
    notify(changed ? text : "It was so already.", changed ? { undo } : {});
    if (told.silent_workers.length) notify(`Worker ${told.silent_workers.join(", ")} has not said yet that it has the change.`, { kind: "error" });
    await reload();
    return told;
  } catch (error) {
    if (error.code === "version_conflict") {
      notify("Somebody else has changed something meanwhile. This page shows it now; do yours again if it still holds.", { kind: "error" });
      await reload();
    } else {
      notifyError(error);
    }
    return null;
  }
}

/** A model's name as a part of a path of the admin API; its slashes stay. */
export const modelPath = (name) => name.split("/").map(encodeURIComponent).join("/");
