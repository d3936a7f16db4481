// Show the endpoints of the OpenAPI document: fields with their limits, an example, and the reply.
function make(parent, tag, textContent = "") {
  return parent.appendChild(Object.assign(document.createElement(tag), { textContent }));
}

const description = await (await fetch("./openapi.json")).json();
const { schemas } = description.components;

function resolve(schema) {
  return schema.$ref ? schemas[schema.$ref.split("/").pop()] : schema;
}

// "list of 1 to 32 strings of at most 2000 characters"
function typeName(schema) {
  const { type, items, prefixItems, minItems = 0, maxItems, minimum, maximum, minLength, maxLength, properties, enum: values } = resolve(schema);
  if (schema.contentEncoding) return "image as base64 or data URL";
  if (prefixItems) return `list of ${prefixItems.length} ${typeName(prefixItems[0])}s`;
  if (type === "array") return `list of ${maxItems ? `${minItems} to ${maxItems} times: ` : ""}${typeName(items)}`;
  if (properties) return `{${Object.entries(properties).map(([name, value]) => `${name}: ${typeName(value)}`).join(", ")}}`;
  if (values) return `one of ${values.join(", ")}`;
  const range = minimum !== undefined ? ` from ${minimum} to ${maximum}` : "";
  return type + range + (maxLength ? ` of ${minLength ?? 0} to ${maxLength} characters` : "");
}

function addTable(parent, { properties, required = [] }, isRequest) {
  const table = make(parent, "table");
  const head = make(table, "tr");
  for (const name of isRequest ? ["field", "type", "default", ""] : ["field", "type", ""]) make(head, "th", name);
  for (const [name, schema] of Object.entries(properties)) {
    const row = make(table, "tr");
    make(make(row, "td"), "code", name);
    make(row, "td", typeName(schema));
    if (isRequest) make(row, "td", required.includes(name) ? "required" : JSON.stringify(schema.default));
    make(row, "td", schema.description ?? "");
  }
}

document.title = document.querySelector("h1").textContent = description.info.title;
for (const [path, methods] of Object.entries(description.paths)) {
  for (const [method, operation] of Object.entries(methods)) {
    make(document.body, "h2", `${method.toUpperCase()} ${path}`);
    make(document.body, "p", operation.summary);
    if (!operation.requestBody) continue;
    const of = ({ content }) => resolve(content["application/json"].schema);
    const request = of(operation.requestBody);
    make(document.body, "h3", "Request");
    addTable(document.body, request, true);
    const examples = Object.entries(request.properties).filter(([, schema]) => schema.examples);
    const body = Object.fromEntries(examples.map(([name, schema]) => [name, schema.examples[0]]));
    const command = `curl -H 'Content-Type: application/json' -d '${JSON.stringify(body)}' ${new URL(`.${path}`, location)}`;
    make(document.body, "pre", command);
    make(document.body, "h3", "Reply");
    addTable(document.body, of(operation.responses["200"]), false);
    make(document.body, "p", operation.responses.default.description);
  }
}
