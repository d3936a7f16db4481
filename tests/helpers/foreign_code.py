"""Checkpoints whose files refer to code of another repository."""

import json

from json_files import read_json


def name_foreign_code(checkpoint):
    """Add references to foreign code to all configurations in `checkpoint`, which stays loadable."""
    reference = "mallory/foreign--foreign.Foreign"
    auto_map = dict.fromkeys(("AutoModel", "AutoProcessor", "AutoImageProcessor"), reference)
    auto_map["AutoTokenizer"] = [reference, reference]
    code = {
        "auto_map": auto_map,
        "custom_pipelines": {"visual-question-answering": {"impl": reference, "pt": ["AutoModel"]}},
        "custom_generate": "mallory/foreign",
    }

    def edit(name, change):
        path = checkpoint / name
        if path.is_file():
            fields = read_json(path)
            change(fields)
            fields["nested"] = {"deeper": [{**code}]}
            path.write_text(json.dumps(fields))

    def edit_config(fields):
        fields["auto_map"]["AutoFeatureExtractor"] = reference
        fields["custom_pipelines"]["text-generation"] = code["custom_pipelines"]["visual-question-answering"]
        for part in ("vision_config", "text_config", "fusion_encoder_config", "decoder_config"):
            fields[part].update(code)

    def edit_generation_config(fields):
        fields.pop("_from_model_config", None)  # otherwise unknown fields are not loaded
        fields.update(code)

    edit("config.json", edit_config)
    edit("generation_config.json", edit_generation_config)
    edit("tokenizer_config.json", lambda fields: fields.update(code))
    edit("processor_config.json", lambda fields: (fields.update(code), fields["image_processor"].update(code)))
