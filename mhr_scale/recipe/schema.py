"""The JSON schema of a recipe, by which editors complete and check it while it is written.

It knows names, types, defaults and texts of help. What only several settings together can say, and
whether a number is in its range, is found when the recipe is read.
"""

import json
from typing import Any

from mhr_scale.recipe.settings import field_helps, parts_below

#: The version of JSON schema that pydantic writes.
DIALECT = "https://json-schema.org/draft/2020-12/schema"


def schema_text(schema: type[Any]) -> str:
    """The JSON schema of a recipe as text."""
    return json.dumps(json_schema(schema), indent=1) + "\n"


def json_schema(schema: type[Any]) -> dict[str, Any]:
    """The JSON schema of a recipe as plain values; the help of a setting is its description."""
    from pydantic import TypeAdapter

    made = TypeAdapter(schema).json_schema()
    pages = {schema.__name__: made, **made.get("$defs", {})}
    for kind in parts_below(schema):
        helps = field_helps(kind)
        for name, setting in pages[kind.__name__]["properties"].items():
            setting.pop("title", None)
            setting["description"] = " ".join(helps[name].split())
    return {"$schema": DIALECT, **made}
