"""TRIPS in lmms-eval, which finds this by the entry point `lmms_eval.models` of the package."""


def manifest():
    """What lmms-eval is told of the model `trips`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("trips", simple_class_path=f"{__name__}.model.Trips")
