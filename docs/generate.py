"""Writes the tables of this folder's pages that follow from the code: `python docs/generate.py`.

A page has a table between `<!-- generated: NAME -->` and `<!-- end of NAME -->`. `tests/docs/test_doc_pages.py` fails
where a page has another than the code gives.
"""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import json
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from zeroxide import optim
from zeroxide.cli import application
from zeroxide.config import RULES
from zeroxide.config.check import section_of
from zeroxide.config.document import Document
from zeroxide.config.fields import NoEffect, NotBuilt, Removed
from zeroxide.config.schema import attribute_docs, schema
from zeroxide.config.sections.optimizer import keys_of, types
from zeroxide.config.sections.scheduler import SCHEDULES
from zeroxide.config.sections.zeroxide import ZeroxideSection
from zeroxide.engine.deepspeed_methods import ABSENT
from zeroxide.engine.engine import Engine
from zeroxide.integrations.deepspeed.surface import SURFACE, Unbuilt

DOCS = Path(__file__).parent
ROOT = DOCS.parent

known_keys = functools.cache(schema)
"""The schema, made once."""

Rows = Iterator[tuple[str, str, str]]


def table(head: tuple[str, ...], rows: Iterator[tuple[str, ...]] | list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    cells = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(each.replace("|", "\\|") for each in row) + " |" for row in cells)


# Config keys --------------------------------------------------------------------------------------------------------


def config_keys() -> str:
    """The state of every key that a config for DeepSpeed may have, section by section."""
    sections: list[tuple[str, Rows]] = [("At the top", _plain(Document, "", known_keys()))]
    for name, model in _sections(Document):
        if model is not ZeroxideSection:
            sections.append((f"`{name}`", _keys(model, "", _inside(known_keys(), name))))
    found = []
    for title, rows in sections:
        if title == "`bfloat16`":
            found.append(f"### {title}\n\nAnother name for `bf16`.")
            continue
        listed = list(rows)
        if title == "`optimizer`":
            listed += _params({name: keys_of(rule) for name, rule in types().items()}, _kinds("optimizer"))
        elif title == "`scheduler`":
            listed += _params(SCHEDULES, _kinds("scheduler"))
        found.append(f"### {title}\n\n{table(('key', 'state', 'what it does, why not, or what to do'), listed)}")
    return "\n\n".join(found)


def own_keys() -> str:
    """The keys of the section `zeroxide`."""
    rows = [(key, what) for key, _, what in _keys(ZeroxideSection, "", _inside(known_keys(), "zeroxide"))]
    return table(("key in `zeroxide`", "what it does"), rows)


def _sections(model: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    for name, info in model.model_fields.items():
        inner = section_of(info.annotation)
        if inner is not None:
            yield name, inner


def _inside(known: dict[str, Any], name: str) -> dict[str, Any]:
    """The schema of a section, in that of what it is in."""
    found: dict[str, Any] = known["properties"][name]["anyOf"][0]
    return found


def _plain(model: type[BaseModel], prefix: str, known: dict[str, Any]) -> Rows:
    """The keys that are no sections: those that work first, then those without effect, then those that are refused."""
    docs = attribute_docs(model)
    rows = [
        _row(f"{prefix}{name}", info, docs.get(name, info.description), known["properties"][name])
        for name, info in model.model_fields.items()
        if section_of(info.annotation) is None
    ]
    yield from sorted(rows, key=lambda row: ("works", "no effect", "refused").index(row[1]))


def _keys(model: type[BaseModel], prefix: str, known: dict[str, Any]) -> Rows:
    """The keys of a section and of those in it, by dotted path. `known` is the section's schema."""
    yield from _plain(model, prefix, known)
    for name, inner in _sections(model):
        yield from _keys(inner, f"{prefix}{name}.", _inside(known, name))


def _row(key: str, info: FieldInfo, doc: str | None, known: dict[str, Any]) -> tuple[str, str, str]:
    for mark in info.metadata:
        if isinstance(mark, NoEffect):
            return f"`{key}`", "no effect", _sentence(mark.reason)
        if isinstance(mark, Removed):
            return f"`{key}`", "refused", f"{mark.what}, which DeepSpeed 0.19.8 has not either: {mark.instead}"
        if isinstance(mark, NotBuilt):
            off = " or ".join(f"`{json.dumps(each)}`" for each in mark.neutral) or "switched off"
            return f"`{key}`", "refused", f"{mark.what}: not built yet; accepted where it is {off}"
    assert doc is not None, key
    default = f" (default `{json.dumps(known['default'])}`)" if known.get("default") not in (None, [], "") else ""
    others = re.findall(r"DeepSpeed's default: (.*)\.$", known["description"])
    other = "".join(f". DeepSpeed's default: {each}" for each in others)
    return f"`{key}`", "works", f"{_sentence(doc)}{default}{other}"


def _sentence(text: str) -> str:
    """A sentence without its full stop. A name in code keeps its case."""
    first = text.split(" ")[0]
    return (text if re.search(r"[_.(]", first.rstrip(".,")) else text[0].upper() + text[1:]).rstrip(".")


def _params(models: dict[str, Any], known: dict[str, dict[str, Any]]) -> Rows:
    """`params.KEY` of all kinds in one list, with the kinds that have a key unless all do. `known`: their schemas."""
    kinds: dict[tuple[str, str, str], list[str]] = {}
    for kind, model in models.items():
        docs = {name: said.get("description") for name, said in known[kind].items()} | attribute_docs(model)
        for name, info in model.model_fields.items():
            row = _row(f"params.{name}", info, docs.get(name, info.description), known[kind][name])
            kinds.setdefault(row, []).append(kind)
    merged: dict[tuple[str, str], list[str]] = {}
    for (key, state, what), names in kinds.items():
        whose = "" if len(names) == len(models) else f"{', '.join(names)}: "
        merged.setdefault((key, state), []).append(whose + what)
    for (key, state), texts in merged.items():
        yield key, state, ". ".join(texts)


def _kinds(name: str) -> dict[str, dict[str, Any]]:
    """What the schema says of the keys of `params`, by the type of optimizer or schedule."""
    found = {}
    for each in _inside(known_keys(), name)["allOf"]:
        pattern, params = each["if"]["properties"]["type"]["pattern"], each["then"]["properties"]["params"]
        kind = next(kind for kind in (*types(), *SCHEDULES) if re.match(pattern, kind))
        found[kind] = params["anyOf"][0]["properties"]
    return found


# Calls --------------------------------------------------------------------------------------------------------------

ATTRIBUTES = {
    "module": "The model",
    "optimizer": "",
    "lr_scheduler": "",
    "training_dataloader": "The loader over `training_data`, None without that",
    "config": "The dict that was given, or what is in the file",
    "device": "",
    "local_rank": "The rank's number on its host",
    "global_rank": "The rank's number",
    "world_size": "Ranks in all",
    "dp_world_size": "",
    "global_steps": "",
    "global_samples": "",
    "micro_steps": "",
    "skipped_steps": "",
}
"""What scripts read of an engine beside its methods, with what it is where no docstring says so."""


def engine_calls() -> str:
    """Each method of DeepSpeed's engine with its state, and what scripts read of one."""
    signatures = json.loads((ROOT / "tests/integrations/deepspeed_signatures.json").read_text())
    made = inspect.getsource(Engine.__init__)
    works, absent = [], dict[str, list[str]]()
    for name in (*signatures["names"]["deepspeed.DeepSpeedEngine"]["methods"], *ATTRIBUTES):
        if name in ABSENT:
            absent.setdefault(ABSENT[name], []).append(f"`{name}`")
            continue
        found = inspect.getattr_static(Engine, name, None)
        assert found is not None or f"self.{name} = " in made, name
        works.append((f"`{name}`", "works", ATTRIBUTES.get(name) or _first_sentence(found)))
    refused = [(", ".join(names), _sentence(line)) for line, names in absent.items()]
    return (
        f"{table(('call or attribute', 'state', 'what it does'), works)}\n\n"
        f"These are an AttributeError, which says the same:\n\n{table(('call', 'what to do'), refused)}"
    )


def _first_sentence(found: object) -> str:
    text = "" if found is None or isinstance(found, str) else inspect.getdoc(found) or ""
    text = re.sub(r":\w+:`", "`", text)
    return re.split(r"(?<=[\w)`\]])\.(?=\s|$)", " ".join(text.split()), maxsplit=1)[0].strip()


def module_names() -> str:
    """What can be imported under the name deepspeed, module by module."""
    rows = []
    for module, names in SURFACE.items():
        works = ", ".join(f"`{name}`" for name, home in names.items() if not isinstance(home, Unbuilt))
        lines: dict[str, list[str]] = {}
        for name, home in names.items():
            if isinstance(home, Unbuilt):
                lines.setdefault(home.line, []).append(f"`{name}`")
        refused = "; ".join(f"{', '.join(each)}: {line}" for line, each in lines.items())
        if works or refused:
            rows.append((f"`{module}`", works, refused))
    return table(("module", "works", "can be imported, and is refused when it is called"), rows)


# Other libraries ----------------------------------------------------------------------------------------------------

RUN = {
    "torch": ("all of it; 2.9 is the oldest that the wheel installs with", "`tests`"),
    "transformers": (
        "Trainer: stages 1, 2 and 3 with offload to none, cpu and nvme; accumulation, evaluation, generation between "
        "steps, `load_best_model_at_end`, save, resume on two ranks what one rank saved, embeddings resized, "
        "`from_pretrained` under ZeRO-3; optimizer and schedule of Trainer's, or of the config",
        "`tests/integrations/test_trainer.py`, on one and two ranks, on the CPU",
    ),
    "accelerate": (
        "what Trainer asks of it, `Accelerator.prepare` with `DeepSpeedCPUAdam` included; a loop of one's own under "
        "`zeroxide run accelerate launch --use_deepspeed`: stage 3 with cpu, `save_state` and `load_state`, "
        "`save_pretrained`",
        "`tests/integrations/test_trainer.py`; `tests/integrations/test_accelerate.py`, on two ranks, on the CPU",
    ),
    "trl": (
        "SFT, DPO (with a reference model, which is an engine of its own, and with an adapter switched off in its "
        "place) and GRPO (generation between steps), stages 2 and 3, cpu and nvme",
        "`tests/integrations/test_trl.py`, on one and two ranks, on the CPU",
    ),
    "peft": (
        "LoRA, also with `modules_to_save` and checkpointing; adapters are saved whole",
        "`tests/integrations/test_trl.py`",
    ),
    "lightning": (
        'zeroxide\'s strategies; and its own `strategy="deepspeed_stage_3"` and `_2` under the name, but for its check '
        "that there is a GPU: schedules, clipping, checkpoints, resume, evaluation after a fit, and its function that "
        "makes one file of a folder",
        "`tests/integrations/test_lightning.py`, `tests/integrations/test_lightning_deepspeed.py`, on one and two "
        "ranks, on the CPU",
    ),
}
"""By package: what of it has been run, and where that is repeated."""


def versions() -> str:
    """The versions that tests run with, which are those that `make` installs."""
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "requirements-dev.txt").read_text(), re.MULTILINE))
    rows = [(name, pins[name], what, where) for name, (what, where) in RUN.items()]
    return table(("package", "version", "what has been run", "where"), rows)


# Reference ----------------------------------------------------------------------------------------------------------


def optimizers() -> str:
    """The optimizers for plain loops, whose arguments come from their rules."""
    found = []
    for name in sorted(optim.__all__, key=lambda name: (name.startswith("DeepSpeed"), name.lower())):
        kind = getattr(optim, name)
        arguments = inspect.signature(kind).parameters.values()
        listed = "".join(f"    {_argument(each)},\n" for each in arguments)
        doc = textwrap.dedent(inspect.getdoc(kind.__init__) or inspect.getdoc(kind) or "")
        doc = _listed(doc, {each for rule in RULES.values() for each in rule.names()})
        fence = f'```python {{data-check="a signature"}}\n{name}(\n{listed})\n```'
        found.append(f"## {name}\n\n{fence}\n\n{doc}")
    return "\n\n".join(found)


def _argument(given: inspect.Parameter) -> str:
    """As ruff writes it."""
    default = json.dumps(given.default) if isinstance(given.default, str) else repr(given.default)
    return given.name if given.default is given.empty else f"{given.name}={default}"


def _listed(doc: str, names: set[str]) -> str:
    """The docstring of a rule, in which hyperparameters follow one another in a paragraph, with a list of them."""
    paragraphs = doc.split("\n\n")
    for number, each in enumerate(paragraphs):
        text = " ".join(each.split())
        first, *parts = re.split(rf"(?:^|(?<=[.] ))({'|'.join(sorted(names))}): ", text)
        if parts:
            items = [f"- `{name}`: {said.strip()}" for name, said in zip(parts[::2], parts[1::2], strict=True)]
            paragraphs[number] = "\n".join([*filter(None, [first]), *items])
    return "\n\n".join(paragraphs)


def errors() -> str:
    """Every error with what it carries."""
    found = []
    body = ast.parse((ROOT / "python/zeroxide/errors.py").read_text()).body
    for kind in body:
        if isinstance(kind, ast.ClassDef):
            bases = ", ".join(f"`{ast.unparse(each)}`" for each in kind.bases)
            # A field and the text below it; two classes say twice what a field is.
            fields = {
                field.target.id: (field, text.value.value)
                for field, text in itertools.pairwise(kind.body)
                if isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
            }
            rows = [
                (f"`{name}`", f"`{ast.unparse(field.annotation).removesuffix(' | None')}`", _sentence(str(text)))
                for name, (field, text) in fields.items()
            ]
            doc = f"{inspect.cleandoc(ast.get_docstring(kind) or '')}\n\nDerived from {bases}."
            shown = f"\n\n{table(('field', 'type', 'what it is'), rows)}" if rows else ""
            found.append(f"## {kind.name}\n\n{doc}{shown}")
    return "\n\n".join(found)


def commands() -> str:
    """Every command of the command line with its options."""
    return "\n\n".join(_command("zeroxide", typer.main.get_command(application())))


def _command(name: str, command: Any) -> Iterator[str]:
    inside = getattr(command, "commands", {})
    for word, each in inside.items():
        yield from _command(f"{name} {word}", each)
    if inside:
        return
    # A paragraph that begins with a backspace is set as it is, for terminals.
    texts = [each.strip() for each in (command.help or "").split("\n\n") if not each.lstrip().startswith("\b")]
    rows = []
    for given in command.params:
        option = given.opts[0].startswith("-")
        shown = ", ".join(f"`{each}`" for each in (*given.opts, *given.secondary_opts)) if option else f"`{given.name}`"
        default = given.default
        known = option and default is not None and default is not False and given.show_default is True
        rows.append((shown, (given.help or "").rstrip(".") + (f" (default `{default}`)" if known else "")))
    yield f"## {name}\n\n" + "\n\n".join(texts) + f"\n\n{table(('argument or option', 'what it is'), rows)}"


TABLES: dict[str, Callable[[], str]] = {
    "commands": commands,
    "config keys": config_keys,
    "engine calls": engine_calls,
    "errors": errors,
    "module names": module_names,
    "optimizers": optimizers,
    "own keys": own_keys,
    "versions": versions,
}
PLACE = re.compile(r"(<!-- generated: (?P<name>[\w ]+) -->\n).*?(<!-- end of (?P=name) -->)", re.DOTALL)


def rewritten(text: str) -> str:
    """The text of a page with its tables as the code gives them."""

    def place(found: re.Match[str]) -> str:
        made = TABLES[found["name"]]()
        # What narrow windows show otherwise than other tables: see assets/extra.css.
        inside = f'<div class="keys" markdown>\n\n{made}\n\n</div>' if "| --- |" in made else made
        return f"{found[1]}\n{inside}\n\n{found[3]}"

    return PLACE.sub(place, text)


def main() -> None:
    """Rewrites the pages of this folder."""
    for page in sorted(DOCS.rglob("*.md")):
        text = page.read_text()
        new = rewritten(text)
        if new != text:
            page.write_text(new)
            print(page.relative_to(ROOT))


if __name__ == "__main__":
    main()
