// Show a form for each endpoint of the OpenAPI document.
function make(parent, tag, properties) {
  return parent.appendChild(Object.assign(document.createElement(tag), properties));
}

function addField(form, name, schema) {
  const label = make(form, "label", { textContent: `${name}: ${schema.description ?? "one per line"}` });
  if (name === "image" || name === "images") {
    return make(label, "input", { name, type: "file", accept: "image/*", multiple: name === "images" });
  }
  const kind = schema.type === "array" ? "textarea" : "input";
  const value = schema.type === "array" ? (schema.examples ?? [[]])[0].join("\n") : schema.default ?? "";
  return make(label, kind, { name, value, rows: 3 });
}

async function send(event, path, output) {
  event.preventDefault();
  const body = new FormData();
  for (const field of event.target.elements) {
    const values = field.files ?? (field.tagName === "TEXTAREA" ? field.value.split("\n") : [field.value]);
    for (const value of values) if (field.name && value !== "") body.append(field.name, value);
  }
  output.textContent = "...";
  const reply = await fetch("." + path, { method: "POST", body }).then((found) => found.json(), (error) => ({ error: `${error}` }));
  output.textContent = JSON.stringify(reply, null, 1);
}

const description = await (await fetch("./docs.json")).json();
document.title = document.querySelector("h1").textContent = description.info.title;
for (const [path, { post }] of Object.entries(description.paths)) {
  make(document.body, "h2", { textContent: `POST ${path}: ${post.summary}` });
  const form = make(document.body, "form", {});
  const name = post.requestBody.content["application/json"].schema.$ref.split("/").pop();
  const { properties } = description.components.schemas[name];
  for (const [field, schema] of Object.entries(properties)) addField(form, field, schema);
  make(form, "button", { textContent: "Send" });
  const output = make(document.body, "pre", {});
  form.addEventListener("submit", (event) => send(event, path, output));
}
