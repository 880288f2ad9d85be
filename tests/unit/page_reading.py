"""A page, read as a browser would: elements with what is in them, and what is wrong with how they stand."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser

EMPTY = {"meta", "br"}
LOADS = {"src", "href", "data", "action", "poster", "srcset", "xlink:href"}
"""Attributes that fetch something."""


@dataclass
class Node:
    name: str
    attributes: dict[str, str | None]
    children: list[Node | str] = field(default_factory=list)

    def all(self, name: str) -> list[Node]:
        """Elements of that name inside, in order."""
        found = []
        for child in self.children:
            if isinstance(child, Node):
                found += [child] if child.name == name else []
                found += child.all(name)
        return found

    @property
    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text for child in self.children)


class Reader(HTMLParser):
    """Builds the tree, and notes tags that do not match."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Node("", {})
        self.open = [self.root]
        self.faults: list[str] = []

    def handle_starttag(self, tag, attrs):
        names = [name for name, _ in attrs]
        if len(set(names)) < len(names):
            self.faults.append(f"{tag} has an attribute twice")
        node = Node(tag, dict(attrs))
        self.open[-1].children.append(node)
        if tag not in EMPTY:
            self.open.append(node)

    def handle_endtag(self, tag):
        if self.open[-1].name != tag:
            self.faults.append(f"</{tag}> ends {self.open[-1].name}")
            return
        self.open.pop()

    def handle_data(self, data):
        self.open[-1].children.append(data)


def read(text: str) -> Node:
    """The page, which must be well-formed, need nothing from outside, and say what its pictures show."""
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.faults == []
    assert [node.name for node in reader.open[1:]] == []
    root = reader.root
    (html,) = root.all("html")
    assert html.attributes["lang"] == "en"
    assert root.all("head")[0].all("title")[0].text
    assert [name for name in ("script", "link", "img", "iframe", "object") if root.all(name)] == []
    assert [word for word in ("url(", "@import", "http://", "https://") if word in text] == []
    nodes = everything(root)
    assert [node.name for node in nodes if LOADS & node.attributes.keys()] == []
    assert [key for node in nodes for key in node.attributes if key.startswith("on")] == []
    ids = [node.attributes["id"] for node in nodes if "id" in node.attributes]
    assert len(ids) == len(set(ids)), "an id is there twice"
    for picture in root.all("svg"):
        assert picture.attributes["role"] == "img"
        assert set(picture.attributes["aria-labelledby"].split()) <= set(ids)
        assert picture.children[0].name == "title"
        assert picture.children[1].name == "desc"
        assert picture.children[1].text.strip()
        numbers = [value for node in everything(picture) for value in node.attributes.values()]
        assert not [value for value in numbers if value in ("nan", "inf", "-inf", "None")]
        assert all("nan" not in node.attributes.get("d", "") for node in everything(picture))
    return root


def everything(node: Node) -> list[Node]:
    found = []
    for child in node.children:
        if isinstance(child, Node):
            found += [child, *everything(child)]
    return found


def rows(page: Node, caption: str) -> list[list[str]]:
    """The cells of the table with that caption, its head first."""
    (found,) = [each for each in page.all("table") if each.all("caption")[0].text == caption]
    return [[cell.text for cell in row.children if isinstance(cell, Node)] for row in found.all("tr")]
