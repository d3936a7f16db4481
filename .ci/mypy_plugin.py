"""What annotations cannot tell mypy: `TripsConfig` takes its parts as dictionaries, too, but holds configurations."""

from functools import partial

from mypy.plugin import AttributeContext, Plugin
from mypy.types import Instance, Type


OWNER = "modeling_trips.configuration_trips.TripsConfig."
MODULE_OF_PARTS = "modeling_trips.configuration_trips"
PARTS = {
    "vision_config": "TripsVisionConfig",
    "text_config": "TripsTextConfig",
    "fusion_encoder_config": "TripsFusionConfig",
    "decoder_config": "TripsDecoderConfig",
}


class TripsPlugin(Plugin):
    def get_attribute_hook(self, fullname: str):
        part = PARTS.get(fullname.removeprefix(OWNER))
        return partial(_as_part, part) if part and fullname.startswith(OWNER) else None


def _as_part(part: str, context: AttributeContext) -> Type:
    if context.is_lvalue:
        return context.default_attr_type
    return Instance(context.api.modules[MODULE_OF_PARTS].names[part].node, [])


def plugin(version: str) -> type[Plugin]:
    return TripsPlugin
