"""A Jinja environment that templates of unknown origin cannot break out of, hang or blow up.

A chat template is a program inside a model file. Jinja's immutable sandbox keeps it from the interpreter; this module
bounds what it may use up. Three rules hold together:

1. Each value a template makes is measured, and where an operation can multiply sizes (`*`, `+`, `~`, `replace`, `join`,
   `indent`, formatting, captured blocks) it is measured before it is made. No value passes `max_size`.
2. Filters and methods are an allow-list, so no other way of multiplying exists.
3. Each loop turn, block, call, operator and comparison checks the clock and counts its work.

So between two checks there is one operation on operands of bounded size, and rendering ends within the budget.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from functools import wraps
from types import GeneratorType
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.defaults import DEFAULT_NAMESPACE
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.filters import FILTERS
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_SIZE = 1 << 20
MAX_WORK = 1 << 24
MAX_SECONDS = 2.0
MAX_SOURCE = 1 << 16
_MAX_INTEGER_BITS = 1024
_MAX_PRECISION = 100

# fmt: off
_STRING_METHODS = frozenset((
    "capitalize", "casefold", "count", "endswith", "find", "format", "index", "isalnum", "isalpha", "isdecimal",
    "isdigit", "islower", "isnumeric", "isspace", "isupper", "join", "lower", "lstrip", "partition", "removeprefix",
    "removesuffix", "replace", "rfind", "rindex", "rpartition", "rsplit", "rstrip", "split", "splitlines",
    "startswith", "strip", "swapcase", "title", "upper",
))
_FILTERS = (
    "abs", "attr", "batch", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float",
    "format", "groupby", "indent", "int", "items", "join", "last", "length", "list", "lower", "map", "max", "min",
    "reject", "rejectattr", "replace", "reverse", "round", "safe", "select", "selectattr", "slice", "sort", "string",
    "sum", "title", "trim", "truncate", "unique", "upper", "wordcount",
)
# fmt: on
_METHODS: dict[type, frozenset[str]] = {
    str: _STRING_METHODS,
    list: frozenset(("count", "index")),
    tuple: frozenset(("count", "index")),
    dict: frozenset(("get", "items", "keys", "values")),
}
_GLOBALS = ("range", "dict", "cycler", "joiner", "namespace")
_FORMAT_NUMBER = re.compile(r"\d+")


class BudgetExceededError(Exception):
    """A template wanted more time or memory than it may use."""


class RefusedByTemplateError(Exception):
    """A template called raise_exception."""


class Budget:
    """What one rendering may use.

    Args:
        input_size: characters of the messages and tools; the size budget grows with them.
    """

    def __init__(self, input_size: int, *, max_seconds: float = MAX_SECONDS) -> None:
        self.max_size = MAX_SIZE + 8 * input_size
        self._work_left = MAX_WORK + 64 * input_size
        self._max_seconds = max_seconds
        self._deadline = time.monotonic() + max_seconds

    def charge(self, work: int = 1) -> None:
        """Counts `work` and looks at the clock."""
        self._work_left -= work
        if self._work_left < 0:
            raise BudgetExceededError("it does more work than it may")
        if time.monotonic() > self._deadline:
            raise BudgetExceededError(f"it takes longer than {self._max_seconds:g} s")

    def require(self, size: int) -> None:
        """Raises if a value of `size` characters or elements is over the budget."""
        if size > self.max_size:
            raise BudgetExceededError(f"it makes a value of more than {self.max_size} characters")

    def measure(self, value: object) -> tuple[int, int]:
        """(characters and elements in all, depth of nesting). Raises as soon as the size is over the budget."""
        if isinstance(value, str):
            self.require(len(value))
            return len(value) + 1, 0
        if isinstance(value, int):
            if value.bit_length() > _MAX_INTEGER_BITS:
                raise BudgetExceededError(f"it makes an integer of more than {_MAX_INTEGER_BITS} bits")
            return 1, 0
        size, depth, level = 0, 0, [value]
        while level:
            size += len(level)
            inner: list[object] = []
            for item in level:
                if isinstance(item, str):
                    size += len(item)
                elif isinstance(item, Mapping):
                    inner += item.keys()
                    inner += item.values()
                elif isinstance(item, list | tuple | set | frozenset):
                    inner += item
                if size + len(inner) > self.max_size:
                    self.require(size + len(inner))
            self.charge(len(level))
            depth += 1
            level = inner
        return size, depth


class _CodeGenerator(CodeGenerator):
    """Writes checks into the Python code that a template becomes."""

    def blockvisit(self, nodes: Iterable[Any], frame: Frame) -> None:
        self.writeline("environment.tick()")
        super().blockvisit(nodes, frame)

    def visit_For(self, node: nodes.For, frame: Frame) -> None:
        if node.test is not None:  # a test alone can skip every item and never come to the body
            node.test = nodes.Not(nodes.Not(node.test, lineno=node.lineno), lineno=node.lineno)
        super().visit_For(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.concat_values((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        if node.ctx != "load":
            super().visit_Tuple(node, frame)
            return
        self.write("environment.checked(")
        super().visit_Tuple(node, frame)
        self.write(")")


def _wrap_visitors(function: str, kinds: str) -> None:
    for kind in kinds.split():
        original = getattr(CodeGenerator, f"visit_{kind}")

        def visit(self: _CodeGenerator, *args: Any, original: Any = original, **kwargs: Any) -> None:
            self.write(f"environment.{function}(")
            original(self, *args, **kwargs)
            self.write(")")

        setattr(_CodeGenerator, f"visit_{kind}", visit)


_wrap_visitors("checked", "List Dict Filter Call")
_wrap_visitors("ticked", "Compare Getitem Test Not")


class _GenerationTag(Extension):
    """`{% generation %}` marks what an assistant wrote, for training; here it is only its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """The environment chat templates are written for (that of transformers), with a budget.

    `begin` starts a rendering; each thread has its own.
    """

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))
    code_generator_class = _CodeGenerator

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # else constant expressions run while compiling, outside the budget
            extensions=["jinja2.ext.loopcontrols", _GenerationTag],
        )
        self._local = threading.local()
        self.globals = {name: DEFAULT_NAMESPACE[name] for name in _GLOBALS} | {
            "range": self._range,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }
        self.filters = {name: self._guarded_filter(name, FILTERS[name]) for name in _FILTERS}
        self.filters["tojson"] = self._tojson

    def begin(self, budget: Budget, mark: str) -> None:
        self._local.budget = budget
        self._local.mark = mark

    @property
    def budget(self) -> Budget:
        budget: Budget = self._local.budget
        return budget

    # Called from compiled templates

    def tick(self) -> None:
        self.budget.charge()

    def ticked(self, value: Any) -> Any:
        self.budget.charge()
        return value

    def checked(self, value: Any) -> Any:
        self.budget.charge()
        if isinstance(value, str | int | list | tuple | dict):
            self.budget.measure(value)
        elif isinstance(value, GeneratorType):
            return self._counted(value)
        return value

    def concat(self, parts: Iterable[str]) -> str:
        """Joins what a block or macro wrote."""
        pieces = list(parts)
        size = sum(map(len, pieces))
        self.budget.charge(len(pieces) + size // 64)
        self.budget.require(size)
        return "".join(pieces)

    def concat_values(self, values: tuple[Any, ...]) -> str:
        """The operator `~`."""
        for value in values:
            self.budget.measure(value)
        return self.concat(map(str, values))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget = self.budget
        budget.charge()
        if operator == "*":
            self._require_product(left, right)
        elif operator == "+" and isinstance(left, str | list | tuple) and isinstance(right, type(left)):
            budget.require(len(left) + len(right))
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            if left.bit_length() * max(right, 1) > _MAX_INTEGER_BITS:
                raise BudgetExceededError(f"it makes an integer of more than {_MAX_INTEGER_BITS} bits")
        elif operator == "%" and isinstance(left, str):
            self._require_formatted(left, "%", right)
        return self.checked(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(__obj, "__self__", None)
        name = getattr(__obj, "__name__", "")
        if name == "format":  # the sandbox wraps it
            owner = getattr(getattr(__obj, "__wrapped__", None), "__self__", owner)
        if isinstance(owner, str):
            if name == "replace":
                __self._require_replaced(owner, *args)
            elif name == "join" and len(args) == 1:
                args = (__self._require_joined(args[0], owner),)
            elif name == "format":
                named = (value for key, value in kwargs.items() if key not in ("_loop_vars", "_block_vars"))
                __self._require_formatted(owner, "{", (*args, *named))
        return super().call(__context, __obj, *args, **kwargs)

    # What the sandbox allows

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, int | float | bytes | None):
            return False
        for kind, allowed in _METHODS.items():
            if isinstance(obj, kind):
                return attr in allowed
        return super().is_safe_attribute(obj, attr, value)

    # Sizes that are known before a value is made

    def _require_product(self, left: Any, right: Any) -> None:
        if isinstance(left, int) and isinstance(right, int):
            if left.bit_length() + right.bit_length() > _MAX_INTEGER_BITS:
                raise BudgetExceededError(f"it makes an integer of more than {_MAX_INTEGER_BITS} bits")
            return
        for sequence, count in ((left, right), (right, left)):
            if isinstance(sequence, str | list | tuple) and isinstance(count, int):
                self.budget.require(self.budget.measure(sequence)[0] * max(count, 0))

    def _require_replaced(self, text: str, old: object = "", new: object = "", count: object = -1) -> None:
        old, new = str(old), str(new)
        found = len(text) + 1 if not old else text.count(old)
        self.budget.require(len(text) + found * len(new))

    def _require_joined(self, items: Iterable[Any], separator: object) -> list[Any]:
        joined = []
        for item in items:
            joined.append(item)
            self.budget.charge()
        self.budget.require(self.budget.measure(joined)[0] + len(joined) * len(str(separator)))
        return joined

    def _require_formatted(self, pattern: str, opening: str, arguments: Any) -> None:
        size, _ = self.budget.measure(arguments if isinstance(arguments, tuple) else (arguments,))
        numbers = [int(found) for found in _FORMAT_NUMBER.findall(pattern) if len(found) < 10 or self._refuse_width()]
        if (opening == "{" and re.search(r"\{[^}]*\{", pattern)) or (opening == "%" and "*" in pattern):
            self._refuse_width()
        self.budget.require(len(pattern) + pattern.count(opening) * (size + max(numbers, default=0)))

    def _refuse_width(self) -> bool:
        raise BudgetExceededError("it formats with a width that is not a small constant")

    def _counted(self, items: Iterator[Any]) -> Iterator[Any]:
        for item in items:
            self.budget.charge()
            yield item

    # Filters and globals

    def _guarded_filter(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        passes_context = hasattr(function, "jinja_pass_arg")

        @wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            head, values = (args[:1], args[1:]) if passes_context else ((), args)
            self.budget.charge()
            values = tuple(
                list(self._counted(value)) if isinstance(value, GeneratorType) else value for value in values
            )
            if name not in ("length", "count", "first", "last", "default", "d"):
                for value in (*values, *kwargs.values()):
                    if isinstance(value, str | int | list | tuple | dict):
                        self.budget.measure(value)
            self._require_filtered(name, *values, **kwargs)
            return function(*head, *values, **kwargs)

        return guarded

    def _require_filtered(self, name: str, value: Any = "", *args: Any, **kwargs: Any) -> None:
        if name == "replace":
            self._require_replaced(str(value), *args, **{k: v for k, v in kwargs.items() if k in ("old", "new")})
        elif name == "join":
            self._require_joined(value, args[0] if args else kwargs.get("d", ""))
        elif name == "indent":
            width = args[0] if args else kwargs.get("width", 4)
            width = width if isinstance(width, int) else len(str(width))
            self.budget.require(len(str(value)) + (str(value).count("\n") + 1) * width)
        elif name == "format":
            self._require_formatted(str(value), "%", (*args, *kwargs.values()))
        elif name in ("batch", "slice", "round"):  # filled up to this count; or to ten to this power
            for count in (*args, *kwargs.values()):
                if isinstance(count, int) and abs(count) > (
                    _MAX_PRECISION if name == "round" else self.budget.max_size
                ):
                    raise BudgetExceededError(f"it asks the filter {name} for {count:.3g}")
        elif name == "sum":
            start = args[1] if len(args) > 1 else kwargs.get("start", 0)
            if not isinstance(start, int | float):
                raise SecurityError("sum adds numbers only")

    def _tojson(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """As in transformers: without HTML escapes, which Jinja's own filter adds."""
        size, depth = self.budget.measure(value)
        width = indent if isinstance(indent, int) else len(indent or "")
        separator_size = sum(map(len, separators)) if separators else 0
        self.budget.require(size * (1 + separator_size + depth * max(width, 0)))
        text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
        mark = self._local.mark
        return text.replace(json.dumps(mark)[1:-1], mark) if ensure_ascii and mark else text

    def _range(self, *bounds: int) -> range:
        found = range(*bounds)
        self.budget.require(len(found))
        return found


def _raise_exception(message: object) -> None:
    raise RefusedByTemplateError(str(message)[:1000])


def _strftime_now(pattern: str) -> str:
    if len(pattern) > 100 or _FORMAT_NUMBER.search(pattern):  # C libraries take widths here
        raise SecurityError("strftime_now takes a short pattern without numbers")
    return datetime.now().strftime(pattern)


def compile_template(environment: TemplateEnvironment, source: str) -> jinja2.Template:
    """Compiles `source`. Raises jinja2.TemplateError, or BudgetExceededError where it is too long or too deep."""
    if len(source) > MAX_SOURCE:
        raise BudgetExceededError(f"it is longer than {MAX_SOURCE} characters")
    try:
        return environment.from_string(source)
    except (RecursionError, MemoryError, SyntaxError) as error:
        raise BudgetExceededError("it is nested too deeply") from error


def render_template(
    environment: TemplateEnvironment, template: jinja2.Template, budget: Budget, mark: str, variables: Mapping[str, Any]
) -> str:
    """Text of `template`. Raises BudgetExceededError, RefusedByTemplateError, or whatever the template runs into.

    Args:
        mark: a character that JSON output keeps as it is, even where it escapes all others; may be empty.
    """
    environment.begin(budget, mark)
    context = template.new_context(dict(variables))
    size = 0
    pieces = []
    for piece in template.root_render_func(context):
        size += len(piece)
        budget.charge()
        budget.require(size)
        pieces.append(piece)
    return "".join(pieces)
