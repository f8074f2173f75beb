"""Chat templates, which are foreign code: they run in a sandbox, and have to end.

A template is Jinja text that comes with a model. `compile_template` reads it, `render` lets it
write.
"""

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from functools import wraps

import jinja2  # it comes with torch
import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes

from files import BadInput, from_json


class GenerationBlock(jinja2.ext.Extension):
    """{% generation %}...{% endgeneration %}, with which some templates mark the assistant's words.

    The marks are for training frameworks. Here the block is just rendered.
    """

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def raise_exception(message: str):
    """Lets a chat template refuse messages."""
    raise jinja2.TemplateError(message)


def strftime_now(format: str) -> str:
    """Lets a chat template tell the date."""
    return datetime.now().strftime(format)


LONGEST = 10 ** 6  # characters that a template may write, or have in one value
FUEL = 2 * 10 ** 4  # what it may do: calls, turns of loops, outputs and assignments
WIDE = re.compile(r"[%{][^a-zA-Z%{}]*(\d{5}|\*)")  # a format that asks for a great width


def size(value: object) -> float:
    """How much a template's value holds: its length, or for a number, what it may ask for."""
    if isinstance(value, (int, float)):
        return abs(value)
    return len(value) if isinstance(value, (str, list, tuple, dict)) else 0


class TemplateSandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """What chat templates run in: the helpers that they expect, and nothing beyond them.

    A template is foreign code, and has to end. Compiling applies the filter `metered` to whatever
    it writes, assigns or repeats, and every filter and call costs fuel, the more the larger its
    arguments and its result are. What stays unbounded is one replacement, join or conversion.
    """

    intercepted_binops = frozenset(["*", "**", "%"])
    fuel = FUEL

    def __init__(self):
        super().__init__(trim_blocks=True, lstrip_blocks=True,
                         extensions=["jinja2.ext.loopcontrols", GenerationBlock])
        # Among Jinja's other functions is `lipsum`, which writes as much text as it is asked for.
        kept = {name: self.globals[name] for name in ("range", "dict", "namespace")}
        self.globals = kept | {"raise_exception": raise_exception, "strftime_now": strftime_now}
        self.filters["tojson"] = lambda value, **options: json.dumps(
            value, **{"ensure_ascii": False} | options)
        self.filters = {name: self.paid(function) for name, function in self.filters.items()}
        self.filters["metered"] = self.metered

    def spend(self, values: Iterable) -> None:
        largest = max(map(size, values), default=0)
        if not largest <= LONGEST or self.fuel < 0:
            raise jinja2.TemplateError("it does not seem to end")
        self.fuel -= 1 + largest // 1000

    @jinja2.pass_context  # which also keeps Jinja from working it out once, when it compiles
    def metered(self, context, value):
        """The value as it is, for fuel. A number that is just written asks for nothing."""
        self.spend([0 if isinstance(value, (int, float)) else value])
        return value

    def paid(self, function: Callable) -> Callable:
        """A filter that costs fuel. A number that it is applied to asks for nothing."""
        @wraps(function)
        def call(value, *args, **kwargs):
            if function is jinja2.filters.FILTERS["format"]:
                self.check_format(value)
            self.spend([*args, *kwargs.values(), value if isinstance(value, (str, list)) else 0])
            result = function(value, *args, **kwargs)
            self.spend([result if isinstance(result, (str, list)) else 0])
            return result
        return call

    def call(self, context, function, *args, **kwargs):
        given = [*args, *kwargs.values()]
        text = getattr(getattr(function, "__wrapped__", function), "__self__", None)
        if getattr(function, "__name__", "") in ("format", "format_map"):
            self.check_format(text)
        # Numbers ask a text's methods for a width. Elsewhere they are just numbers.
        self.spend(x for x in given if isinstance(text, str) or not isinstance(x, (int, float)))
        return super().call(context, function, *args, **kwargs)

    def check_format(self, text: object) -> None:
        if isinstance(text, str) and WIDE.search(text):
            raise jinja2.TemplateError("a format that is too wide")

    def call_binop(self, context, operator, left, right):
        if operator == "%":
            self.check_format(left)
        elif max(size(left), size(right)) > 100 if operator == "**" else (
                not size(left) * size(right) <= LONGEST):
            raise jinja2.TemplateError(f"the result of {operator} is too large")
        return super().call_binop(context, operator, left, right)

    def compile_metered(self, source: str) -> jinja2.Template:
        def metered(expression: nodes.Expr) -> nodes.Expr:
            return nodes.Filter(expression, "metered", [], [], None, None)

        tree = self.parse(source)
        for node in list(tree.find_all((nodes.Assign, nodes.For, nodes.Output))):
            if isinstance(node, nodes.Assign):
                node.node = metered(node.node)
            elif isinstance(node, nodes.For):
                node.body.insert(0, nodes.ExprStmt(metered(nodes.Const(None))))
            else:
                node.nodes = [metered(x) if not isinstance(x, nodes.TemplateData) else x
                              for x in node.nodes]
        tree.set_environment(self)
        return self.from_string(tree)


def render(template: jinja2.Template, variables: dict) -> str:
    """Returns what a template writes. Raises whatever it raises, and where it does not end."""
    template.environment.fuel, length, pieces = FUEL, 0, []
    for piece in template.generate(variables):
        length += len(piece)
        if length > LONGEST:
            raise jinja2.TemplateError(f"it writes over {LONGEST:,} characters")
        pieces.append(piece)
    return "".join(pieces)


@dataclass
class TokenizerConfig:
    """What is read of tokenizer_config.json: the chat template, or a list of named ones."""

    chat_template: str | list[dict] | None = None


@dataclass
class NamedTemplate:
    """An entry of such a list."""

    name: str
    template: str


def compile_template(source: str | list | None, origin: str) -> jinja2.Template:
    """Compiles a chat template.

    source: the template, or a list of named ones, of which the one named "default" is taken.
    Raises BadInput, which names the `origin`, where there is none or it does not compile.
    """
    source = from_json(TokenizerConfig, {"chat_template": source}, origin).chat_template
    if isinstance(source, list):
        listed = [from_json(NamedTemplate, one, f"{origin}: chat_template") for one in source]
        source = {one.name: one.template for one in listed}.get("default")
    if source is None:
        raise BadInput(f"{origin}: no chat template; pass an instruct model, "
                       "or add chat_template.jinja")
    try:
        return TemplateSandbox().compile_metered(source)
    except Exception as error:  # the template is foreign code, and compiling it can fail anyhow
        raise BadInput(f"{origin}: the chat template does not compile: {error}") from None
