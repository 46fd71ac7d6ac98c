// Drafts of specs: each stays in the tab under a name of its own, until it is launched.
const KEY = "trainyard-draft";

/** Of a new job, of one `like` another, or of a `fork` of one. */
export const draftKey = ({ like = null, fork = null } = {}) => (fork ? `${KEY}-fork-${fork}` : like ? `${KEY}-like-${like}` : KEY);

/** Puts a draft where the form will find it. */
export function keepDraft(whose, value) {
  sessionStorage.setItem(draftKey(whose), JSON.stringify(value, null, 2));
}
