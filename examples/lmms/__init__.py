"""Vision-language models for evaluations; lmms-eval knows `trips_vlm` by the entry point `lmms_eval.models`."""


def manifest():
    """Return the manifests of lmms-eval's models: `trips_vlm`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return (ModelManifest("trips_vlm", chat_class_path=f"{__name__}.vlm.TripsVlm"),)
