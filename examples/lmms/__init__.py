"""Models for lmms-eval, registered by the entry point `lmms_eval.models`."""


def manifest():
    """Return the manifest of the models `trips` and `trips_vlm`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return (
        ModelManifest("trips", simple_class_path=f"{__name__}.model.Trips"),
        ModelManifest("trips_vlm", chat_class_path=f"{__name__}.vlm.TripsVlm"),
    )
