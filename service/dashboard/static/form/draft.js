// Drafts of specs in session storage, one per kind of form, until they are launched.
import { tabStorage } from "../storage.js";

const KEY_PREFIX = "trainyard-draft";

/** Key of the draft of a new job, of a job `like` another one, of a `fork`, or of a job with a `corpus`. */
export const draftKey = ({ like = null, fork = null, corpus = null } = {}) =>
  fork ? `${KEY_PREFIX}-fork-${fork}` : like ? `${KEY_PREFIX}-like-${like}` : corpus ? `${KEY_PREFIX}-corpus-${corpus}` : KEY_PREFIX;

/** Stores a draft for the submit page. */
export function saveDraft(source, value) {
  tabStorage.set(draftKey(source), JSON.stringify(value, null, 2));
}
