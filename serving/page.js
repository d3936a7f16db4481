// No address of a validator: Swagger UI would send it the description.
SwaggerUIBundle({ url: "./docs.json", dom_id: "#swagger-ui", validatorUrl: null });
