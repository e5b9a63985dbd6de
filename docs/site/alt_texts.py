"""Alternative texts for the pictures that cells draw, which have none of their own: what a screen reader says.

    the heading above the cell: the titles in its code (axes: its axis labels; curves: their labels)

They are read off the cell's code.  Where it has no titles, the sentence before the cell takes their place.
"""

import ast
import re

from docutils import nodes

TITLES, AXES = {"title", "suptitle", "set_title"}, {"xlabel", "ylabel", "set_xlabel", "set_ylabel"}
LONGEST = 300                                               # characters


def add_alt_texts(app, doctree) -> None:
    """For Sphinx's event doctree-read."""
    for cell in doctree.findall(lambda node: is_part(node, "cell_code")):
        pictures = [picture for picture in cell.findall(nodes.image) if not picture.get("alt")]
        for number, picture in enumerate(pictures, 1):
            place = f" ({number} of {len(pictures)})" if len(pictures) > 1 else ""
            picture["alt"] = alt_text(heading_of(cell), code_of(cell), sentence_before(cell)) + place


def alt_text(heading: str, code: str, sentence: str) -> str:
    titles, axes, curves = labels(code)
    shown = "; ".join(titles) or sentence
    parts = [f"{name}: {', '.join(found)}" for name, found in (("axes", axes), ("curves", curves)) if found]
    text = ": ".join(filter(None, [heading, shown])) + (f" ({'; '.join(parts)})" if parts else "")
    text = text or "a picture that the code above draws"
    return text if len(text) <= LONGEST else text[:LONGEST - 4].rsplit(" ", 1)[0] + " ..."


def labels(code: str) -> tuple[list[str], list[str], list[str]]:
    """The titles, axis labels and curves' labels that stand in Python code as literals, each once, in their order."""
    titles, axes, curves = {}, {}, {}
    try:
        tree = ast.parse(code)
    except SyntaxError:                                     # a magic of IPython
        return [], [], []
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    for call in sorted(calls, key=lambda node: (node.lineno, node.col_offset)):
        given = [(keyword.arg, keyword.value) for keyword in call.keywords]
        if isinstance(call.func, ast.Attribute) and call.args:
            given.append((call.func.attr, call.args[0]))
        for name, value in given:
            found = titles if name in TITLES else axes if name in AXES else curves if name == "label" else None
            if found is not None and (text := literal(value)):
                found[text] = None
    return list(titles), list(axes), list(curves)


def literal(value: ast.expr) -> str:
    """A text as it stands in the code, without the dollars of its formulas; the parts that vary are "..."."""
    if isinstance(value, ast.JoinedStr):
        text = "".join(part.value if isinstance(part, ast.Constant) else "..." for part in value.values)
    else:
        text = value.value if isinstance(value, ast.Constant) and isinstance(value.value, str) else ""
    text = " ".join(text.replace("$", "").split())
    return text if re.search(r"\w", text) else ""


# ---- where a cell stands -----------------------------------------------------------------------------------

def is_part(node: nodes.Node, name: str) -> bool:
    return isinstance(node, nodes.container) and node.get("nb_element") == name


def code_of(cell: nodes.container) -> str:
    return "\n".join(part.astext() for part in cell.findall(lambda node: is_part(node, "cell_code_source")))


def heading_of(cell: nodes.Node) -> str:
    section = cell.parent
    while section is not None and not isinstance(section, nodes.section):
        section = section.parent
    return section.next_node(nodes.title).astext() if section is not None else ""


def sentence_before(cell: nodes.Node) -> str:
    """The last sentence of the nearest paragraph before the cell in its section, without what it asks to change."""
    for node in reversed(cell.parent.children[:cell.parent.index(cell)]):
        if isinstance(node, nodes.paragraph):
            text = re.split(r"(?:^|(?<=[.!?)]) )Change ", " ".join(node.astext().split()))[0]
            if not text:
                continue
            return re.split(r"(?<=[.!?:])\s+(?=[A-Z])", text)[-1].rstrip(":.")
    return ""
