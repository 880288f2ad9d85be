"""The JSON schema of the config, made from the models in `sections` and `rules`.

It says of every key what it may be and what it does. What only several keys together can be right or wrong about, such
as the batch equation, `zeroxide config check` knows.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Mapping
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel, TypeAdapter
from pydantic.fields import FieldInfo

from zeroxide.config import load
from zeroxide.config.check import section_of
from zeroxide.config.document import Document
from zeroxide.config.explain import OTHER_DEFAULTS
from zeroxide.config.fields import GROUP_SIZES, NoEffect, NotBuilt, Removed, Section, in_any_case
from zeroxide.config.rules import Rule
from zeroxide.config.sections.optimizer import keys_of, types
from zeroxide.config.sections.scheduler import DEFAULTS, SCHEDULES

__all__ = ["attribute_docs", "schema"]

Schema = dict[str, Any]

_DRAFT = "https://json-schema.org/draft/2020-12/schema"
_UNSET = ({"const": "auto"}, {"type": "null"})
"""What any key may be instead of a value: nothing asked for, or something that Hugging Face's Trainer fills in."""
_SWITCHES = ("zero_optimization",)
"""Sections that may be a plain true or false."""


def schema() -> Schema:
    """The schema, as `zeroxide config schema` prints it."""
    root = _section(Document, "", _defaults())
    properties = root["properties"]
    for name in _SWITCHES:
        properties[name]["anyOf"].append({"type": "boolean"})
    properties["optimizer"]["anyOf"][0] |= {"allOf": [_params_of_rule(kind, rule) for kind, rule in types().items()]}
    properties["scheduler"]["anyOf"][0] |= {"allOf": [_params_of_schedule(name) for name in SCHEDULES]}
    _choice(properties["optimizer"]["anyOf"][0]["properties"]["type"], list(types()), any_case=True)
    _choice(properties["scheduler"]["anyOf"][0]["properties"]["type"], list(SCHEDULES), any_case=False)
    title = "Config of zeroxide: DeepSpeed 0.19.8's keys, and the section zeroxide"
    return {"$schema": _DRAFT, "title": title, **root, "$defs": {"off": _off()}}


def attribute_docs(model: type[BaseModel]) -> dict[str, str]:
    """The strings that stand below the fields of a class and of its bases, in one line each."""
    found: dict[str, str] = {}
    for each in reversed(model.__mro__):
        # A class that was made, not written, has no source.
        if getattr(sys.modules[each.__module__], each.__name__, None) is not each or not issubclass(each, Section):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(each))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, text in zip(body.body, body.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                assert isinstance(field.target, ast.Name)
                found[field.target.id] = _line(str(text.value.value))
    return found


def _line(text: str) -> str:
    return " ".join(text.split())


def _defaults() -> dict[str, Any]:
    """What a key comes to where it is not given, by dotted path; one that needs another, where that is given."""
    loco = {"stage": 3, "zero_quantized_gradients": True, "zeropp_loco_param": {}}
    said: dict[str, Any] = {}
    for beside in (
        {"zero_optimization": loco},
        {"torch_autocast": {"enabled": True}},
        {"fp16": {"enabled": True}},
        {"bf16": {"enabled": True}},
        {},
    ):
        said |= load(beside).written()
    return {key: value for key, value in said.items() if value is not None}


def _section(model: type[BaseModel], prefix: str, defaults: Mapping[str, Any], docs: Mapping[str, str] = {}) -> Schema:
    docs = {**attribute_docs(model), **docs}
    fields = model.model_fields
    properties = {
        name: _key(info, f"{prefix}{name}", docs.get(name, info.description), defaults) for name, info in fields.items()
    }
    for name in getattr(model, "keeps_auto", ()):
        properties[name]["anyOf"].remove(_UNSET[0])
    required = [name for name, info in fields.items() if info.is_required()]
    found: Schema = {"type": "object", "properties": properties, "additionalProperties": False}
    return found | ({"required": required} if required else {})


def _key(info: FieldInfo, path: str, doc: str | None, defaults: Mapping[str, Any]) -> Schema:
    inner = section_of(info.annotation)
    if inner is not None:
        text = _line((inner.__doc__ or "").split("\n\n")[0])
        return {"description": text, "anyOf": [_section(inner, f"{path}.", defaults), *_UNSET]}
    item = _item_of(info.annotation)
    if item is not None:
        items = {"type": "array", "items": _section(item, f"{path}.", defaults)}
        return {"description": doc, "anyOf": [items, *_UNSET]}
    for mark in info.metadata:
        if isinstance(mark, NoEffect):
            return {"description": f"Without effect: {mark.reason}.", **_either(_of_type(info))}
        if isinstance(mark, NotBuilt):
            off = [{"const": each} for each in mark.neutral] if mark.neutral else [{"$ref": "#/$defs/off"}]
            return {"description": _refusal(mark), "deprecated": isinstance(mark, Removed), "anyOf": [*off, *_UNSET]}
    assert doc is not None, f"{path} says nothing of itself"
    found = {"description": doc, **_either(_of_type(info))}
    if path in defaults:
        found["default"] = defaults[path]
    if path in OTHER_DEFAULTS:
        found["description"] += f" DeepSpeed's default: {OTHER_DEFAULTS[path]}."
    return found


def _item_of(annotation: Any) -> type[BaseModel] | None:
    """The section that a list of sections is made of."""
    for member in (annotation, *get_args(annotation)):
        if get_origin(member) is list:
            return section_of(get_args(member)[0])
    return None


def _refusal(mark: NotBuilt) -> str:
    if isinstance(mark, Removed):
        return f"Refused unless it is off: neither zeroxide nor DeepSpeed 0.19.8 has {mark.what}; {mark.instead}."
    return f"Refused unless it is off: {mark.what}: not built yet."


def _of_type(info: FieldInfo) -> Schema:
    """The schema of a field's type; `{}` is anything."""
    kind: Any = info.annotation
    if info.metadata:
        kind = Annotated[kind, *info.metadata]
    found: Schema = TypeAdapter(kind).json_schema()
    return found


def _either(found: Schema) -> Schema:
    """What a type has, and what any key may be."""
    if not found:
        return {}
    forms: list[Schema] = []
    for each in found.get("anyOf", [found]):
        # pydantic leaves bounds beside a validator under their own names.
        bounds = {}
        if "le" in each:
            bounds["maximum"] = min(each.get("maximum", each["le"]), each["le"])
        if "ge" in each:
            bounds["minimum"] = max(each.get("minimum", each["ge"]), each["ge"])
        form = {key: value for key, value in each.items() if key not in ("title", "default", "le", "ge")} | bounds
        if form != {"type": "null"}:
            forms += [form, *_spelt(form)]
    return {"anyOf": [*forms, *_UNSET]}


def _spelt(form: Schema) -> list[Schema]:
    """Other spellings that are taken: of switches, of words in upper case, of a stage."""
    if form.get("type") == "boolean":
        return [{"type": "string", "pattern": in_any_case("true", "false")}]
    if "enum" in form:
        return [{"type": "string", "pattern": in_any_case(*form["enum"])}]
    if form.get("type") == "integer" and form.get("maximum") == 3:
        return [{"type": "string", "pattern": "^0*[0-3]$"}]
    return []


def _choice(key: Schema, names: list[str], *, any_case: bool) -> None:
    """Lists the names that a key may be."""
    key["anyOf"] = [{"enum": names}]
    if any_case:
        key["anyOf"].append({"type": "string", "pattern": in_any_case(*names)})


def _params(pattern: str, params: Schema, *, needed: bool) -> Schema:
    """What `params` may have where `type` is as `pattern` says."""
    then: Schema = {"properties": {"params": {"anyOf": [params] if needed else [params, *_UNSET]}}}
    if needed:
        then["required"] = ["params"]
    return {"if": {"properties": {"type": {"type": "string", "pattern": pattern}}}, "then": then}


def _params_of_rule(kind: str, rule: type[Rule]) -> Schema:
    prefix = "optimizer.params."
    docs = _rule_docs(rule)
    defaults = {f"{prefix}{name}": value for name, value in vars(rule()).items() if name in rule.names()}
    found = _section(keys_of(rule), prefix, defaults, docs)
    return _params(in_any_case(kind), found, needed=False)


def _rule_docs(rule: type[Rule]) -> dict[str, str]:
    """What the docstring of a rule says of each hyperparameter, after its name and a colon."""
    parts = re.split(rf"\b({'|'.join(rule.names())}): ", _line(rule.__doc__ or ""))
    return {name: text.strip().rstrip(".") for name, text in zip(parts[1::2], parts[2::2], strict=True)}


def _params_of_schedule(name: str) -> Schema:
    prefix = "scheduler.params."
    defaults = {f"{prefix}{key}": value for key, value in DEFAULTS[name].items() if value is not None}
    found = _section(SCHEDULES[name], prefix, defaults)
    return _params(f"^{name}$", found, needed="required" in found)


def _off() -> Schema:
    """What asks for nothing, as `asks_for_nothing` decides it."""
    nothing: Schema = {"$ref": "#/$defs/off"}
    switch = {"anyOf": [{"const": False}, {"type": "string", "pattern": in_any_case("false")}]}
    sizes = {name: {"anyOf": [nothing, {"type": "number", "const": 1}]} for name in GROUP_SIZES}
    return {
        "description": "Switched off.",
        "anyOf": [
            {"enum": [None, False, 0, "auto"]},
            {"type": "object", "required": ["enabled"], "properties": {"enabled": switch}},
            {"type": "object", "properties": sizes, "additionalProperties": nothing},
        ],
    }
