"""Typeset the equations of methods' files as HTML: variables in italics, Greek letters, sub- and superscripts, sums.

The files write equations as text, so that `heterokd methods NAME` can print them. HTML needs neither a script nor a
font from elsewhere.
"""

from __future__ import annotations

import html
import re
from collections.abc import Collection

GREEK = {
    **{name: chr(0x3B1 + place) for place, name in enumerate(["alpha", "beta", "gamma", "delta"])},
    "eps": "ε",
    "eta": "η",
    "theta": "θ",
    "kappa": "κ",
    "lambda": "λ",
    "mu": "μ",
    "pi": "π",
    "rho": "ρ",
    "sigma": "σ",
    "tau": "τ",
    "phi": "φ",
}
SYMBOLS = {"...": "…", "..": "…", "||": "∥", "->": "→", "<-": "←", "<=": "≤", ">=": "≥", "!=": "≠", "*": "·", "~": "∼"}
SCRIPT = r"[_^](?:\{[^}]*\}|-?\([^)]*\)|-?[A-Za-z0-9]+(?:[,_][A-Za-z0-9]+)*'?\+?)"
TOKEN = re.compile(
    rf"(?P<code>`[^`]*`|\"[^\"]*\")|(?P<script>{SCRIPT})|(?P<word>[A-Za-z]+)|(?P<times>(?<=[0-9r]) x (?=[0-9r]))"
    r"|(?P<minus>(?:(?<=[\s(\[{=,])|^)-(?=[\s\w(]))|(?P<symbol>\.\.\.|\.\.|\|\||->|<-|<=|>=|!=|[*~])|(?P<dot> \. )"
    r"|(?P<prime>')|(?P<rest>.)",
    re.DOTALL,
)
NAME = re.compile(r"[A-Za-z]+(?:_[A-Za-z0-9]+)+")
TERM = re.compile(r"[a-z]{3,}_[a-z]{3,}")
NO_NAMES = (*(f"{name}_" for name in GREEK), "mean_", "sum_")
"""Beginnings of words with a subscript, which are no names of terms such as `non_target`."""

FIRST_OF_CONTINUATION = 24
"""Least indentation of a line that continues the note of the line above, in columns."""


def typeset(text: str, names: Collection[str] = ()) -> str:
    """Return a piece of an equation, or of the sentence beside it, as HTML.

    Args:
        text: in the notation of the methods' files.
        names: parameters of the method, which stay as they are.
    """
    done: list[str] = []
    place = 0
    while place < len(text):
        name = NAME.match(text, place)
        is_term = name is not None and TERM.fullmatch(name[0]) is not None and not name[0].startswith(NO_NAMES)
        if name and (name[0] in names or is_term):
            done.append(f"<code>{name[0]}</code>" if name[0] in names else f"<i>{name[0]}</i>")
            place = name.end()
            continue
        token = TOKEN.match(text, place)
        assert token is not None  # `rest` matches everything
        done.append(_token(token, text, names))
        place = token.end()
    return "".join(done)


def _token(token: re.Match[str], text: str, names: Collection[str]) -> str:
    kind, found = token.lastgroup, token[0]
    after = text[token.end() :]
    if kind == "code":
        return f"<code>{html.escape(found[1:-1])}</code>" if found[0] == "`" else html.escape(found)
    if kind == "script":
        tag, inside = "sub" if found[0] == "_" else "sup", found[1:]
        inside = inside[1:-1] if inside[0] == "{" else inside
        if inside not in GREEK and re.fullmatch(r"[b-ln-z]{2,3}", inside):  # several indices
            return f"<{tag}><i>{inside}</i></{tag}>"
        # Further underscores separate words: L_path_kl.
        return f"<{tag}>{typeset(re.sub(r'_(?=[a-z]{2})', ' ', inside), names).replace('-', '−')}</{tag}>"
    if kind == "word":
        return _word(found, after, text[: token.start()])
    if kind == "prime":
        before = text[: token.start()][-1:]
        return "’" if before.isalpha() and after[:1].isalpha() else "′" if before.isalnum() else "'"
    return {"times": " × ", "minus": "−", "dot": " · "}.get(kind or "", SYMBOLS.get(found, html.escape(found)))


def _word(word: str, after: str, before: str) -> str:
    if word == "x" and before[-1:].isdigit() and after[:1].isdigit():
        return "×"
    if word in GREEK:
        return f"<i>{GREEK[word]}</i>"
    if word == "sum" and re.match(r"_| \(", after):
        return "∑"
    if re.fullmatch(r"[fpqzFPQZ]hat", word):
        return f"<i>{word[0]}\u0302</i>"
    if word.startswith("d") and word[1:] in GREEK:
        return f"d<i>{GREEK[word[1:]]}</i>"
    is_article = word == "a" and re.match(r" (?:[a-z]{3,}|map |r )", after) and not re.match(r"\s*[=+*/(]", after)
    if len(word) > 1 or is_article or before.endswith(("'", "’")):
        return word
    return f"<i>{word}</i>"


def equation_table(lines: list[str], names: Collection[str] = ()) -> list[str]:
    """Return the lines of an equation block as an HTML table: formula, note and number of the equation.

    Args:
        lines: of a block of a method's docstring, without its common indentation.
        names: parameters of the method.
    """
    rows: list[tuple[str, str, str]] = []
    for line in lines:
        formula, note, number = _cells(line)
        indent = len(line) - len(line.lstrip())
        starts = not indent or re.search(r"(?:^|\s)=\s|: ", formula) is not None
        if not rows or (starts and indent < FIRST_OF_CONTINUATION):
            rows.append(("\u2003" * (indent // 4) + formula, note, number))
        elif indent >= FIRST_OF_CONTINUATION:
            rows[-1] = (rows[-1][0], f"{rows[-1][1]} {formula} {note}".strip(), rows[-1][2] or number)
        else:
            rows[-1] = (f"{rows[-1][0]} {formula}", f"{rows[-1][1]} {note}".strip(), rows[-1][2] or number)
    cells = [
        f"<tr><td>{typeset(formula, names)}</td><td>{typeset(note, names)}</td><td>{html.escape(number)}</td></tr>"
        for formula, note, number in rows
    ]
    return ['<table class="equation">', *cells, "</table>"]


def _cells(line: str) -> tuple[str, str, str]:
    """Cut a line at its gaps into formula, note and number of the equation."""
    number = re.search(r"\s{2,}(Eq\. [\w-]+)$", line)
    parts = re.split(r"(?<![,;])\s{2,}|\s{5,}", line[: number.start() if number else None].strip())
    formula = parts.pop(0)
    while parts and (re.match(r"(?:[=+]|<-|\|\|)", parts[0]) or re.fullmatch(r"(?:code|paper) form", formula)):
        formula = f"{formula} {parts.pop(0)}"
    return formula, " ".join(parts), number[1] if number else ""
