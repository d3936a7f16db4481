"""Models of lmms-eval, which finds them by the entry point `lmms_eval.models` of the package."""


def manifest():
    """The models `trips` and `trips_vlm`, as lmms-eval wants them."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return (
        ModelManifest("trips", simple_class_path=f"{__name__}.model.Trips"),
        ModelManifest("trips_vlm", chat_class_path=f"{__name__}.vlm.TripsVlm"),
    )
