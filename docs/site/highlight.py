"""Source text in colour, line by line, with a link on each name that another page defines."""

import html

from pygments.lexers import CudaLexer, PythonLexer, TextLexer
from pygments.token import STANDARD_TYPES, Comment, Name, String, Token

LEXERS = {".py": PythonLexer, ".cu": CudaLexer, ".cuh": CudaLexer}


def coloured(text: str, suffix: str, links: dict[str, str]) -> list[str]:
    """The lines of a source file as HTML; `links` gives the address of a name or of a dotted module."""
    tokens = whole_names(LEXERS.get(suffix, TextLexer)(stripnl=False).get_tokens(text))
    lines, before = [""], ""
    for i, (kind, value) in enumerate(tokens):
        address = links.get(value) if kind in Name else None
        if address and (kind in Name.Function or kind in Name.Class or (kind not in Name.Namespace and (
                before == "." or after(tokens, i) == "="))):
            address = None                                  # an attribute, a keyword, or the definition itself
        for j, piece in enumerate(value.split("\n")):
            if j:
                lines.append("")
            lines[-1] += span(kind, piece, address)
        if value.strip():
            before = value
    return lines


def whole_names(tokens) -> list:
    """The tokens, but a dotted module in one piece."""
    out: list = []
    for kind, value in tokens:
        if kind in Name.Namespace and out and out[-1][0] in Name.Namespace:
            out[-1] = (kind, out[-1][1] + value)
        else:
            out.append((kind, value))
    return out


def after(tokens: list, i: int) -> str:
    """The next token that is no space."""
    return next((value for _, value in tokens[i + 1:i + 4] if value.strip(" ")), "")


def span(kind: Token, text: str, address: str | None) -> str:
    if not text:
        return ""
    short, word = STANDARD_TYPES.get(kind, ""), html.escape(text, quote=False)
    if kind in Comment or kind in String:
        short = short or "c"
    word = f'<span class="{short}">{word}</span>' if short else word
    return f'<a href="{address}">{word}</a>' if address else word
