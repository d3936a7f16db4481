// Show a form for each endpoint of the OpenAPI document.
function make(parent, tag, properties) {
  return parent.appendChild(Object.assign(document.createElement(tag), properties));
}

function readFile(file) {
  return new Promise((resolve, reject) => {
    const reader = Object.assign(new FileReader(), { onload: () => resolve(reader.result), onerror: reject });
    reader.readAsDataURL(file);
  });
}

// Add a labeled field, and return a function that reads its value for the JSON body.
function addField(form, name, schema) {
  const isList = schema.type === "array", isImage = (schema.items ?? schema).contentEncoding === "base64";
  const label = make(form, "label", { textContent: `${name}: ${schema.description} ${isList && !isImage ? "One per line." : ""}` });
  if (isImage) {
    const input = make(label, "input", { name, type: "file", accept: "image/*", multiple: isList });
    const thumbnails = make(label, "div", {});
    const read = () => Promise.all([...input.files].map(readFile));
    input.onchange = async () => {
      thumbnails.replaceChildren();
      for (const src of await read()) make(thumbnails, "img", { src, alt: "" });
    };
    return async () => (isList ? read() : (await read())[0]);
  }
  if (isList) {
    const area = make(label, "textarea", { name, rows: 3, value: schema.examples[0].join("\n") });
    return () => area.value.split("\n").filter((line) => line !== "");
  }
  if (schema.type === "boolean") {
    const box = make(label, "input", { name, type: "checkbox", checked: true });
    return () => box.checked;
  }
  const number = make(label, "input", { name, type: "number", min: schema.minimum, max: schema.maximum, value: schema.default });
  return () => number.valueAsNumber;
}

// Draw an image with all but the kept patches faded.
async function drawPatches(parent, src, boxes) {
  const image = Object.assign(new Image(), { src });
  await image.decode();
  const canvas = make(parent, "canvas", { width: image.width, height: image.height });
  const context = canvas.getContext("2d");
  context.globalAlpha = 0.25;
  context.drawImage(image, 0, 0);
  context.globalAlpha = 1;
  for (const [x0, y0, x1, y1] of boxes) context.drawImage(image, x0, y0, x1 - x0, y1 - y0, x0, y0, x1 - x0, y1 - y0);
}

async function send(path, read, button, output) {
  button.disabled = true;
  output.replaceChildren("Sending...");
  try {
    const values = await Promise.all(Object.entries(read).map(async ([name, value]) => [name, await value()]));
    const body = Object.fromEntries(values);
    const headers = { "Content-Type": "application/json" };
    const reply = await fetch("." + path, { method: "POST", headers, body: JSON.stringify(body) });
    const found = await reply.json();
    const shown = JSON.stringify(found, (key, value) => (key === "kept_patches" ? undefined : value), 1);
    output.replaceChildren(`${reply.status} ${reply.statusText}\n${shown}\n`);
    for (const [row, [best]] of (body.kept_patches && found.answers ? found.answers : []).entries()) {
      const figure = make(output, "figure", { textContent: `${body.questions[row]} ${best.answer}` });
      if (best.kept_patches) await drawPatches(figure, body.image, best.kept_patches);
    }
  } catch (error) {
    output.replaceChildren(`${error}`);
  }
  button.disabled = false;
}

const description = await (await fetch("./openapi.json")).json();
document.title = document.querySelector("h1").textContent = description.info.title;
for (const [path, { post }] of Object.entries(description.paths).filter(([, { post }]) => post)) {
  make(document.body, "h2", { textContent: `POST ${path}: ${post.summary}` });
  const form = make(document.body, "form", {});
  const name = post.requestBody.content["application/json"].schema.$ref.split("/").pop();
  const { properties } = description.components.schemas[name];
  const read = Object.fromEntries(Object.entries(properties).map(([field, schema]) => [field, addField(form, field, schema)]));
  const button = make(form, "button", { textContent: "Send" });
  const output = make(document.body, "pre", {});
  form.onsubmit = (event) => {
    event.preventDefault();
    send(path, read, button, output);
  };
}
