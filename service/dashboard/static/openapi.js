// The API's own document, asked for once: what a form is made of.
import { get } from "./api.js";

let asked = null;

/** The whole OpenAPI document. */
export function openapi() {
  asked ??= get("/openapi.json").catch((error) => {
    asked = null;
    throw error;
  });
  return asked;
}

export const schemas = async () => (await openapi()).components.schemas;

/** The members of a change's body, `{name: schema}`. */
export async function bodyOf(method, path) {
  const { paths, components } = await openapi();
  const { $ref } = paths[path][method].requestBody.content["application/json"].schema;
  return components.schemas[$ref.split("/").at(-1)].properties;
}
